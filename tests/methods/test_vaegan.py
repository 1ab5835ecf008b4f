"""The VAE/GAN: what it needs of its networks, and which loss moves which player; `test_step` has its losses."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from avb_jax import Players, UserError, distributions, networks
from avb_jax.methods import vaegan
from tests.conftest import method_of, small_modules


class NoFeatures(nn.Module):
    """T of images and no more."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x.reshape(len(x), -1))[:, 0]


def test_what_it_needs_is_named(images):
    settings = {"prior": distributions.standard_normal(3), "noise_dim": 3, "optimizers": optax.sgd(1.0)}
    modules = small_modules("vaegan")
    black_box = small_modules("vaegan", encoder=networks.BlackBoxEncoder)
    for broken, message in (
        (modules._replace(adversary=NoFeatures()), "adversary=NoFeatures: a VAE/GAN needs features"),
        (black_box, "encoder=BlackBoxEncoder: a VAE/GAN needs an encoder that returns"),
    ):
        method = method_of("vaegan", broken, **settings)
        with pytest.raises(UserError, match=message):
            method.train_step(jax.random.key(1), method.init(jax.random.key(0), images), images)


def test_each_player_follows_its_own_loss():
    """Gradients of two losses of both params, by hand: encoder a b^2, decoder a^2 b."""

    def losses(params):
        return Players(params.encoder * params.decoder**2, params.encoder**2 * params.decoder), "found"

    gradients, found = vaegan.gradients(losses, Players(jnp.array(2.0), jnp.array(3.0)))
    assert (float(gradients.encoder), float(gradients.decoder), gradients.adversary) == (9.0, 4.0, None)
    assert found == "found"
