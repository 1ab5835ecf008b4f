"""What annealed importance sampling costs, compared with the decoder's gradients that it needs, on a trained run.

    python -m benchmarks.ais --workdir=RUN [--images=100] [--chunk=20]

Per chunk of test images, alternating: the estimator as `experiments.evaluate` calls it (16 chains, 500 temperatures, 10
leapfrog steps), and as many gradients of log p(x|z) with respect to z, images x 16 x 500 x 10, in one scan over batches of
images x 16. Medians over the chunks; compiling is not timed.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from avb_jax import load
from avb_jax.data import to_pixels
from avb_jax.evaluation import AIS
from avb_jax.transforms import of_seed

WORKDIR = flags.DEFINE_string("workdir", None, "A run of experiments.mnist.", required=True)
IMAGES = flags.DEFINE_integer("images", 100, "Test images.")
CHUNK = flags.DEFINE_integer("chunk", 20, "Images at once.")
CHAINS, TEMPERATURES, STEPS = 16, 500, 10


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    method, state, data, _ = load(pathlib.Path(WORKDIR.value))
    state, key = of_seed(state, 0), jax.random.key(0)
    estimator = AIS(chains=CHAINS, temperatures=TEMPERATURES, leapfrog_steps=STEPS, chunk=CHUNK.value)

    def gradients(z, x):
        """TEMPERATURES * STEPS gradients in a row at z [B, Z], each moving z too little to matter."""

        def log_prob(z):
            return jnp.sum(method.decode(state, z).log_prob(x))

        def body(z, _):
            value, gradient = jax.value_and_grad(log_prob)(z)
            return z + 1e-9 * gradient, value

        return jax.lax.scan(body, z, None, length=TEMPERATURES * STEPS)

    def timed(function, *arguments) -> float:
        """Seconds of a compiled program."""
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        return time.perf_counter() - begun

    def annealed(numbers, images):
        """The estimator, as `experiments.evaluate` calls it."""
        return estimator.over(method, key, state, images, numbers, data.binarize)

    times, programs = [], None
    for first in range(0, IMAGES.value, CHUNK.value):
        numbers = jnp.arange(first, first + CHUNK.value)
        images = jnp.asarray(data.test)[numbers]
        x = jnp.repeat(to_pixels(key, images, data.binarize), CHAINS, axis=0)
        z = jax.random.normal(key, (len(x), method.prior.event_shape[0]))
        if programs is None:
            programs = jax.jit(annealed).lower(numbers, images).compile(), jax.jit(gradients).lower(z, x).compile()
        times.append((timed(programs[0], numbers, images), timed(programs[1], z, x)))
        done = f"images {first + CHUNK.value:>4}/{IMAGES.value}"
        print(f"{done}  AIS {times[-1][0]:.1f} s  gradients alone {times[-1][1]:.1f} s", flush=True)
    whole, alone = np.array(times).T
    count = IMAGES.value * CHAINS * TEMPERATURES * STEPS
    settings = f"{CHAINS} chains, {TEMPERATURES} temperatures, {STEPS} leapfrog steps"
    print(f"\n{jax.devices()[0].device_kind}, {IMAGES.value} images, {settings}")
    print(f"AIS                        {whole.sum() / 60:>8.2f} minutes")
    print(f"{count:,} gradients alone {alone.sum() / 60:>6.2f} minutes")
    print(f"ratio, median of {len(times)} chunks  {np.median(whole / alone):>8.3f}")


if __name__ == "__main__":
    app.run(main)
