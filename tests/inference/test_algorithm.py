"""blackjax's interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.base import VIAlgorithm

from avb_jax import UserError, inference

KEY = jax.random.key(2)
SMALL = {"widths": (8,), "adversary_widths": (32,), "num_samples": 64}


def density(position):
    """N((1, -2), I) and N(4, 0.25) of two named parts."""
    return -0.5 * jnp.sum((position["a"] - jnp.array([1.0, -2.0])) ** 2) - 0.5 * ((position["b"] - 4.0) / 0.5) ** 2


@pytest.mark.parametrize("method", ["avb", "sivi"])
@pytest.mark.slow
def test_steps_under_jit_come_to_the_density(method):
    algorithm = inference.as_vi_algorithm(density, method=method, sampler_rate=1e-3, **SMALL)
    assert isinstance(algorithm, VIAlgorithm)
    position = {"a": jnp.array([0.5, 0.5]), "b": jnp.array(3.0)}
    state = algorithm.init(position)
    draws = algorithm.sample(KEY, state, 300)
    assert jax.tree.map(jnp.shape, draws) == {"a": (300, 2), "b": (300,)}
    np.testing.assert_allclose(draws["b"].mean(), 3, atol=0.3)  # about the position

    def body(state, key):
        state, info = algorithm.step(key, state)
        return state, info.elbo.mean()

    state, elbos = jax.jit(lambda state, keys: jax.lax.scan(body, state, keys))(state, jax.random.split(KEY, 1500))
    assert elbos[-50:].mean() > elbos[:50].mean()
    draws = algorithm.sample(KEY, state, 2000)
    np.testing.assert_allclose(draws["a"].mean(axis=0), [1, -2], atol=0.25)
    np.testing.assert_allclose((draws["b"].mean(), draws["b"].std()), (4, 0.5), atol=0.15)


def test_settings_are_those_of_a_fit():
    with pytest.raises(UserError, match="num_samples=1"):
        inference.as_vi_algorithm(density, num_samples=1)
    with pytest.raises(UserError, match="clip=0: must be above 0"):
        inference.as_vi_algorithm(density, clip=0).init(jnp.zeros(2))
