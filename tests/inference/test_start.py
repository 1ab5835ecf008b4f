"""Where a density's q begins: at its start, as wide as asked, or near the density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import inference
from avb_jax.inference import fitting
from tests.inference.densities import gaussian

KEY = jax.random.key(11)
TINY = {"steps": 1, "batch_size": 16, "widths": (8,), "adversary_widths": (8,), "quiet": True}


def test_where_it_starts():
    center = jnp.array([3.0, -40.0])
    method = fitting.started(fitting.game(lambda z: gaussian(z - center), 2), center, None)
    z = method.sample(KEY, jax.jit(method.init)(KEY, jnp.zeros((1, 0))), 500)
    np.testing.assert_allclose(z.mean(axis=0), center, atol=0.3)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        pytest.param([0.2, 5.0], [0.2, 5.0], marks=pytest.mark.slow),
        pytest.param(3.0, [3.0, 3.0], marks=pytest.mark.slow),
        ("nearest", [0.02, 8.0]),
    ],
)
@pytest.mark.slow
def test_how_wide_it_starts(scale, expected):
    """As asked; or as a density that is a Gaussian of independent dimensions, which it finds."""
    center = np.array([3.0, -40.0])
    start = center + np.array([0.5, -2.0]) if scale == "nearest" else center

    def log_density(z):
        return -0.5 * jnp.sum(jnp.square((z - center) / jnp.array([0.02, 8.0])))

    fit = inference.fit(log_density, 2, start=start, scale=scale, **TINY)
    z = np.asarray(fit.sample(KEY, 2000))
    np.testing.assert_allclose(z.std(axis=0), expected, rtol=0.15)  # a network has a tenth of it, and 2,000 draws 2%
    assert (abs(z.mean(axis=0) - center) < 0.3 * np.asarray(expected)).all()


@pytest.mark.parametrize(("std", "kl"), [((0.7, 1.5), (0.1, 0.45)), ((0.02, 8.0), (1.2, 2.4))])
def test_by_default_it_starts_within_a_nat_per_dimension_of_the_nearest(std, kl):
    """As N(start, I) where that is near enough, which here it is, or is not by 1,250 nats."""
    std = np.array(std)

    def log_density(z):
        return -0.5 * jnp.sum(jnp.square(z / std))

    method = fitting.started(fitting.game(log_density, 2), jnp.zeros(2), None)
    posterior = method.encode(KEY, jax.jit(method.init)(KEY, jnp.zeros((1, 0))), jnp.zeros((1, 0)))  # with the exact moments
    mean, ratio = np.asarray(posterior.mean[0]) / std, np.asarray(posterior.std[0]) / std
    assert kl[0] < np.sum(0.5 * (mean**2 + ratio**2 - 1.0) - np.log(ratio)) < kl[1]
