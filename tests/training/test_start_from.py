"""A training that begins with another's players."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import avb_jax
from avb_jax import Posterior, UserError, distributions, networks, transforms

X = jax.random.uniform(jax.random.key(0), (4, 3))
SHARED = {
    "prior": distributions.standard_normal(2),
    "likelihood": distributions.bernoulli,
    "optimizers": optax.adam(1e-2),
}


class Normalised(nn.Module):
    """A Gaussian encoder with batch statistics, and a count that is no number of floating point."""

    scaled: bool = False

    @nn.compact
    def __call__(self, x, noise, *, train=False):
        mean = nn.Dense(2)(nn.BatchNorm(not train)(x))
        if self.scaled:
            mean = mean * self.param("scale", nn.initializers.ones, (2,))
        return Posterior(mean + noise, mean, jnp.ones_like(mean), gaussian=True)


def begun(encoder=None, width=5, adversary=False, seed=1, steps=0, decay=None):
    """A method's State after some steps."""
    encoder, decoder = encoder or Normalised(), networks.MLPDecoder((3,), widths=(width,))
    if adversary:
        pairs = networks.InnerProductAdversary(networks.MLP((4,)), networks.MLP((4,)), features=2)
        method = avb_jax.avb(encoder, decoder, pairs, noise_dim=2, **SHARED)
    else:
        method = avb_jax.vae(encoder, decoder, noise_dim=2, **SHARED)
    method = transforms.with_ema(method, decay) if decay else method
    state = method.init(jax.random.key(seed), X)
    for step in range(steps):
        state, _ = method.train_step(jax.random.key(step), state, X)
    return state


@pytest.mark.slow
def test_players_are_taken_with_their_averages_and_statistics():
    other, own = begun(steps=3, decay=0.9), begun(Normalised(scaled=True), adversary=True, seed=2, decay=0.5)
    state, taken = avb_jax.start_from(other, own)
    assert taken == ["encoder", "decoder"]
    for of_state, of_other in ((state.params, other.ema.params), (state.ema.params, other.ema.params)):
        chex.assert_trees_all_equal(of_state.decoder, of_other.decoder)
        chex.assert_trees_all_equal(of_state.encoder, {**of_other.encoder, "scale": jnp.ones(2)})
    assert float(jnp.abs(other.ema.params.decoder["Dense_0"]["kernel"] - other.params.decoder["Dense_0"]["kernel"]).max()) > 0
    chex.assert_trees_all_equal(state.collections.encoder, other.ema.collections.encoder)
    chex.assert_trees_all_equal(state.ema.collections.encoder, other.ema.collections.encoder)
    chex.assert_trees_all_equal(state.params.adversary, own.params.adversary)
    chex.assert_trees_all_equal(state.opt_state, own.opt_state)
    assert int(state.step) == 0


def test_a_player_that_does_not_fit_stays():
    """An encoder that lacks what the other's has; of a run without averages the params are taken."""
    other, own = begun(Normalised(scaled=True), steps=1), begun(seed=2)
    state, taken = avb_jax.start_from(other, own)
    assert taken == ["decoder"]
    chex.assert_trees_all_equal(state.params.encoder, own.params.encoder)
    chex.assert_trees_all_equal(state.params.decoder, other.params.decoder)
    assert state.ema is None


def test_where_no_player_fits_it_says_why():
    with pytest.raises(
        UserError, match=r"encoder\['scale'\] is \(2,\) there, not here; decoder\[.*\] is \(5, 3\) there, \(6, 3\)"
    ):
        avb_jax.start_from(begun(Normalised(scaled=True)), begun(width=6))
