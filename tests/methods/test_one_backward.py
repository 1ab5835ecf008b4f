"""One backward pass of T for both losses, against one for each, beyond what `test_step` has of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from avb_jax import contrast, distributions, networks
from avb_jax.methods import one_backward, update
from tests.conftest import LATENTS, method_of, small_modules


class Sure(nn.Module):
    """A T that has no doubt: where it is right it says nothing to itself, and to the encoder as much as ever."""

    by: float
    t: nn.Module

    shares_x, pointwise = True, True

    @nn.compact
    def __call__(self, x, z, *, train=False):
        return self.by + self.t(x, z, train=train)


class Centred(nn.Module):
    """Of each z, how it lies to all others of the batch."""

    @nn.compact
    def __call__(self, z, *, train=False):
        del train
        return nn.tanh(nn.Dense(8)(z - z.mean(axis=(0, 1))))


PAIRS = networks.InnerProductAdversary(networks.MLP((8,), input_rank=2), networks.MLP((8,)), 5)
CASES = {
    "sure of q's side": (Sure(100.0, PAIRS), {}),
    "sure of the prior's": (Sure(-100.0, PAIRS), {"minus_log_prior": True}),
    "weighted draws": (PAIRS, {"importance_weighted": True, "noise_draws": 3, "contrast": contrast.GaussianContrast(4)}),
    "joined by layers": (networks.JointAdversary(PAIRS.x_net, PAIRS.z_net, 5, (8,), components=2), {"noise_draws": 2}),
    "each z next to all others": (PAIRS.clone(z_net=Centred()), {"noise_draws": 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_it_is_the_step_of_two(case, images, sgd, monkeypatch):
    adversary, settings = CASES[case]
    shared = {"prior": distributions.standard_normal(LATENTS), "likelihood": distributions.bernoulli, "optimizers": sgd}
    modules = small_modules("avb")._replace(adversary=adversary)
    method = method_of("avb", modules, noise_dim=3, **shared, **settings)
    monkeypatch.setattr(one_backward, "chosen", lambda *given: update.of_both)
    of_two = method_of("avb", modules, noise_dim=3, **shared, **settings)

    @jax.jit
    def both(key, images):
        state = method.init(key, images)
        shaken = jax.tree.map(lambda a: a + 0.3 * jnp.sin(jnp.arange(a.size).reshape(a.shape)), state.params)
        state = state._replace(params=shaken)
        return state, method.train_step(key, state, images), of_two.train_step(key, state, images)

    before, after, expected = both(jax.random.key(0), images)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected[0].params.encoder, before.params.encoder)
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, expected)
