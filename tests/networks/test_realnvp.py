"""Real NVP of images: the change of variables against autodiff, and its inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import models, networks
from avb_jax.networks.model_decoder import Conditioned
from tests.networks.test_autoregressive import scattered

SLOW = [pytest.param(shape, scales, marks=pytest.mark.slow) for shape, scales in (((4, 4), 2), ((8, 8), 3))]


@pytest.mark.parametrize(("shape", "scales"), [((6, 4, 2), 2), ((5, 4), 3), ((2, 2), 1), *SLOW])
def test_the_change_of_variables(shape, scales):
    """Log |det du/dx| is that of the Jacobian, and the inverse goes back."""
    net = networks.RealNVP(shape, channels=3, layers=2, scales=scales)
    x = jax.random.uniform(jax.random.key(0), (2, *shape), minval=0.05, maxval=0.95)
    variables = scattered(net, x, scale=0.1)
    forward = jax.jit(lambda x: net.apply(variables, x))
    u, log_det = forward(x)
    size = int(np.prod(shape))
    assert u.shape == (2, size)
    jacobian = jax.jit(jax.jacobian(lambda x: forward(x.reshape(1, *shape))[0][0]))
    for one, found in zip(x, log_det, strict=True):
        np.testing.assert_allclose(found, np.linalg.slogdet(jacobian(one.ravel()))[1], rtol=1e-3)
    inverse = jax.jit(lambda u: net.apply(variables, u, method="inverse"))
    np.testing.assert_allclose(inverse(u), x, atol=1e-4)


@pytest.mark.slow
def test_its_density_is_one():
    """Of one pixel pair, by quadrature over the square; draws lie in [0, 1] and have its mean."""
    net = networks.RealNVP((1, 2), channels=3, layers=1, scales=1)
    variables = scattered(net, jnp.zeros((1, 1, 2)))
    of_x = models.flow(net)(Conditioned(jnp.zeros((1, 1, 2, 0)), variables))
    edges = (np.arange(400) + 0.5) / 400
    grid = jnp.stack(jnp.meshgrid(edges, edges, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    density = np.exp(of_x.log_prob(grid)) / 400**2
    outside = 1.0 - density.sum()  # the logit has mass beyond [0, 1], where images are clipped
    assert -0.01 < outside < 0.4
    drawn = of_x.sample(jax.random.key(0), (20_000,)).reshape(-1, 2)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    inside = np.all((drawn > 0) & (drawn < 1), axis=1)
    np.testing.assert_allclose(1.0 - inside.mean(), outside, atol=0.02)
    mean = (density[:, None] * grid.reshape(-1, 2)).sum(axis=0) / density.sum()
    np.testing.assert_allclose(drawn[inside].mean(axis=0), mean, atol=0.02)
