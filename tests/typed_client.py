"""What a caller's type checker sees of the library; checked, and run, by `tests/test_packaging.py`."""

import jax
import numpy as np
import optax

import avb_jax
from avb_jax import Method, Players, Report, State, distributions, inference, networks
from avb_jax.evaluation import ELBO, ImportanceSampling


def train(x: np.ndarray) -> tuple[Method, State]:
    """A VAE after four steps."""
    method: Method = avb_jax.vae(
        networks.GaussianEncoder(networks.MLP((8,)), latent_dim=2),
        networks.MLPDecoder(x_shape=(4,), parameters=1, widths=(8,)),
        prior=distributions.standard_normal(2),
        likelihood=distributions.bernoulli,
        optimizers=Players(optax.adam(1e-3), optax.adam(1e-3)),
        noise_dim=2,
    )
    state: State = avb_jax.fit(method, x, steps=4, batch_size=4, quiet=True)
    return method, state


def evaluate(method: Method, state: State, x: np.ndarray) -> float:
    """The importance bound."""
    report: Report = avb_jax.evaluate(method, state, x, [ELBO(draws=2), ImportanceSampling(samples=8)], quiet=True)
    mean: float = report["log_likelihood", "importance"].mean
    return mean


def density() -> float | None:
    """The evidence of a density that is none."""
    fit: inference.Fit = inference.fit(lambda z: -z @ z, 2, steps=2, method="sivi", quiet=True)
    draws: jax.Array = fit.sample(jax.random.key(0), 3)
    assert draws.shape == (3, 2)
    doubts: list[str] = fit.diagnostics.doubts
    assert all(isinstance(doubt, str) for doubt in doubts)
    return fit.log_evidence
