"""Seconds of training until a model is as good as asked: log p(x) on held-out examples, measured apart from the clock.

    python -m benchmarks.quality --config=experiments/configs/synthetic.py:full --target=-1.41 --config.num_seeds=1
    python -m benchmarks.quality --config=experiments/configs/mnist.py:vae32 --target=-90 --config.data.dir=DIR

Every `checkpoint_every` steps, on up to 500 examples: by quadrature for two latents or fewer, else by importance sampling,
which is a lower bound.
The clock runs from the start of the command, compiling included, and stands still while the model is measured.
"""

import time

import jax
from absl import app, flags

import avb_jax
from avb_jax import Callback, build
from avb_jax.evaluation import ImportanceSampling, Quadrature
from experiments import launch

BEGUN = time.monotonic()
TARGET = flags.DEFINE_float("target", None, "Nats of log p(x) at which to end.", required=True)
IMAGES = 500


class Reached(Exception):
    """The target is."""


class Clock(Callback):
    """Measures at each checkpoint."""

    def __init__(self, estimator):
        self._estimator, self._apart = estimator, 0.0

    def checkpoint(self, step, state) -> None:
        seconds = time.monotonic() - BEGUN - self._apart
        report = avb_jax.evaluate(
            self.run.method, state, self.run.data, [self._estimator], num_seeds=self.run.num_seeds, quiet=True
        )
        found = report["log_likelihood", self._estimator.name].mean
        print(f"{self.run.name} step {step:>7,}: {found:9.3f} nats after {seconds:7.1f} s", flush=True)
        self._apart = time.monotonic() - BEGUN - seconds
        if found >= TARGET.value:
            raise Reached


def main(argv: list[str]) -> None:
    """Trains each of the config's methods until it is as good."""
    del argv
    config = flags.FLAGS.config
    data = build.dataset(config)
    exact = config.latent_dim <= 2
    estimator = Quadrature(images=IMAGES) if exact else ImportanceSampling(images=IMAGES)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: log p(x) by {estimator.name}")
    for name, method in build.methods(config, data.x_shape).items():
        try:
            launch.train(config, None, method, data, [Clock(estimator)], name)
        except Reached:
            continue


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: launch.parse("synthetic", argv))
