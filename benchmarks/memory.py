"""What a process holds: over blocks of steps, and over checkpoints; and what the estimate of a step's memory comes to.

    python -m benchmarks.memory [--blocks=1200] [--saves=100]

Resident memory of a VAE's training on 8x8 images after a third and after all of its blocks of 10 steps; of a process that saves
MNIST's VAE (`mnist.py:vae32`), which it never trains; and per config the bound of `avb_jax.training.memory`, next to what XLA
takes for the same step.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import avb_jax
from avb_jax import Callback, build
from avb_jax.data import from_arrays
from avb_jax.training import checkpoints, memory
from avb_jax.training.loop import initial_state
from benchmarks.step import Case

BLOCKS = flags.DEFINE_integer("blocks", 1200, "Blocks of 10 steps.", lower_bound=3)
SAVES = flags.DEFINE_integer("saves", 100, "Checkpoints.", lower_bound=5)
CASES = (("mnist", "digits", 128), ("celeba", "smoke", 32), ("celeba", "smoke", 256), ("celeba", "", 128))
MIB = 2**20


def resident() -> float:
    """MiB, on Linux."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / MIB


class Watch(Callback):
    """Prints it twice."""

    def report(self, step: int, numbers: dict, examples_per_second: float | None) -> None:
        if step in (10 * (BLOCKS.value // 3), 10 * BLOCKS.value):
            print(f"block {step // 10:>5}: {resident():8.1f} MiB", flush=True)


def method_of(case: Case, batch_size: int):
    """A case's method and the shape of its examples."""
    config = case.config()
    config.batch_size = batch_size
    if case.experiment == "celeba":
        config.data.name = "drawn_faces"
    shape = build.dataset(config).x_shape if config.data.name != "mnist" else (28, 28)
    ((_, method),) = build.methods(config, shape).items()
    return method, shape


def main(argv: list[str]) -> None:
    """The three tables."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    method, shape = method_of(Case("mnist", "digits_vae", "vae"), 8)
    images = np.random.default_rng(0).random((512, *shape), np.float32)
    options = {"batch_size": 8, "log_every": 10, "callbacks": [Watch()]}
    avb_jax.fit(method, images, steps=10 * BLOCKS.value, **options)

    method, shape = method_of(Case("mnist", "vae32", "vae"), 128)
    state = initial_state(method, from_arrays(np.zeros((4, *shape), np.float32)), 0, None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / MIB
    print(f"a State of {size:.1f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, SAVES.value + 1):
            checkpoints.save(pathlib.Path(folder), number, state)
            if number in (1, SAVES.value // 5, SAVES.value):
                print(f"save {number:>6}: {resident():8.1f} MiB", flush=True)

    for experiment, variant, batch_size in CASES:
        method, shape = method_of(Case(experiment, variant, "avb"), batch_size)
        x = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
        state = jax.eval_shape(lambda key, x, method=method: method.init(key, x), jax.random.key(0), x)
        traced = jax.jit(method.train_step).trace(jax.random.key(0), state, x)
        of_xla = traced.lower().compile().memory_analysis()
        taken = (of_xla.argument_size_in_bytes + of_xla.temp_size_in_bytes) / MIB
        bound = memory.needed(traced.jaxpr.jaxpr) / MIB
        print(f"{experiment}:{variant}, batch of {batch_size}: at least {bound:8.1f} MiB, XLA takes {taken:8.1f}", flush=True)


if __name__ == "__main__":
    app.run(main)
