"""What annealed importance sampling costs beside the decoder's gradients that it needs, on a trained run.

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

from avb_jax.data import to_pixels
from avb_jax.evaluation import ais
from avb_jax.players import decode, evaluation_variables
from experiments import evaluate
from experiments.configs import evaluate as config

WORKDIR = flags.DEFINE_string("workdir", None, "A run of experiments.mnist.", required=True)
IMAGES = flags.DEFINE_integer("images", 100, "Test images.")
CHUNK = flags.DEFINE_integer("chunk", 20, "Images at once.")
CHAINS, TEMPERATURES, STEPS = 16, 500, 10


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    subject = next(iter(evaluate.load(config.get_config(), pathlib.Path(WORKDIR.value), []).values()))[0]
    model, state, key = subject.model, subject.state, jax.random.key(0)

    def gradients(z, x):
        """TEMPERATURES * STEPS gradients in a row at z [B, Z], each moving z too little to matter."""
        params, stats = evaluation_variables(state)

        def log_prob(z):
            output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
            return jnp.sum(model.likelihood.log_prob(output, x))

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
        return ais.log_likelihood(
            key, state, images, model=model, numbers=numbers, binarize=subject.dataset.binarize, chunk=CHUNK.value,
            chains=CHAINS, temperatures=TEMPERATURES, leapfrog_steps=STEPS,
        )  # fmt: skip

    times, programs = [], None
    for first in range(0, IMAGES.value, CHUNK.value):
        numbers = jnp.arange(first, first + CHUNK.value)
        images = jnp.asarray(subject.dataset.test)[numbers]
        x = jnp.repeat(to_pixels(key, images, subject.dataset.binarize), CHAINS, axis=0)
        z = jax.random.normal(key, (len(x), model.prior.dim))
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
