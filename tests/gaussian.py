"""A game whose every quantity is known: Gaussian encoder, linear-Gaussian decoder, exact log-ratio as adversary.

x [2]; q(z|x) = N(m x + c, diag s^2) in 2 latents; p(x|z) = N(w z, sigma^2 I).
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax import Players, distributions, players
from avb_jax.contrast import Compared
from avb_jax.methods import avb
from avb_jax.network import as_network

SIGMA = 0.7
PRIOR = distributions.standard_normal(2)
START = {"m": 0.8, "c": -0.3, "log_s": -0.5}
POINTS = jnp.array([[0.5, -1.0], [1.0, 0.2], [-0.7, 0.4], [0.0, 1.5]])


def log_normal(z, mean=0.0, log_std=0.0):
    """Log N(z; mean, std^2), elementwise."""
    return -0.5 * jnp.square((z - mean) * jnp.exp(-log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)


def params_of_q(module):
    """The calling module's params m, c and log_s [2]."""
    return (module.param(name, nn.initializers.constant(value), (2,)) for name, value in START.items())


class LinearEncoder(nn.Module):
    """z = m x + c + exp(log_s) noise, elementwise."""

    @nn.compact
    def __call__(self, x, noise):
        m, c, log_s = params_of_q(self)
        return m * x + c + jnp.exp(log_s) * noise


class LinearDecoder(nn.Module):
    """Mean w z, elementwise."""

    @nn.compact
    def __call__(self, z):
        return (self.param("w", nn.initializers.constant(0.9), (2,)) * z)[..., None]


class ExactLogRatio(nn.Module):
    """T* = log q(z|x) - log p(z) for the encoder's q, plus a learned `offset` that is 0 at the optimum."""

    @nn.compact
    def __call__(self, x, z):
        m, c, log_s = params_of_q(self)
        offset = self.param("offset", nn.initializers.zeros, ())
        return offset + jnp.sum(log_normal(z, m * x + c, log_s) - log_normal(z), axis=-1)


class Game:
    """The networks, their params as they start, and the two losses as functions of params and draws alone.

    `contrast` is for both losses, further settings are for those that have them.
    """

    def __init__(self, encoder=None, adversary=None, *, contrast=avb.PRIOR, divergence=None, **settings):
        modules = encoder or LinearEncoder(), LinearDecoder(), adversary or ExactLogRatio()
        self.networks = Players(*map(as_network, modules))
        x, z = jnp.zeros((4, 2)), jnp.zeros((4, 2))
        inputs = Players((x, z), (z,), (x, z))
        variables = (network.init(jax.random.key(0), *of) for network, of in zip(self.networks, inputs, strict=True))
        self.params = Players(*(of_player.get("params", {}) for of_player in variables))
        self.collections = Players({}, {}, {})
        self.contrast = contrast
        common = {"networks": self.networks, "prior": PRIOR, "contrast": contrast}
        self._loss = functools.partial(
            avb.negative_elbo_adversarial, likelihood=distributions.gaussian(SIGMA), **common, **settings
        )
        self._loss_of_t = functools.partial(
            avb.adversary_loss, **common, **({} if divergence is None else {"divergence": divergence})
        )

    def draw(self, key, x, count=1):
        """Draws for the examples x [B, 2]."""
        return players.draw(key, x, self.contrast.base(PRIOR), 2, count)

    def loss(self, params, draws, adversary=None, **options):
        """Of encoder and decoder: (loss, `Generative`), by T's params in `self.params` unless others are given."""
        adversary = self.params.adversary if adversary is None else adversary
        return self._loss(params, adversary, self.collections, draws, **options)

    def terms(self, draws, adversary=None):
        """Per example, at the start."""
        return self.loss(self.params, draws, adversary)[1].terms

    def loss_of_t(self, adversary, draws, z):
        """Of T, which compares the encoder's z [S, B, 2] with the prior's: (loss, `AdversaryTerms`)."""
        return self.loss_of_t_between(adversary, draws, Compared(jnp.stack([z, draws.z_prior])))

    def loss_of_t_between(self, adversary, draws, compared):
        """Of T, which compares any two sides."""
        loss, (terms, _) = self._loss_of_t(adversary, self.collections, draws, compared)
        return loss, terms

    def z(self, draws):
        """The encoder's draws [S, B, 2]."""
        encoder = self.networks.encoder, self.params.encoder, {}
        return players.encode(*encoder, draws.x, draws.noise, 2, train=True)[0].z


def analytic_negative_elbo(encoder, decoder, x):
    """The negative ELBO [] in nats, by hand: KL of Gaussians plus E|x - w z|^2 / 2 sigma^2 plus the normalisation."""
    mean, variance = encoder["m"] * x + encoder["c"], jnp.exp(2 * encoder["log_s"])
    kl = 0.5 * jnp.sum(mean**2 + variance - 1 - jnp.log(variance), axis=-1)
    expected_square = (x - decoder["w"] * mean) ** 2 + decoder["w"] ** 2 * variance
    reconstruction = jnp.sum(expected_square / (2 * SIGMA**2) + 0.5 * jnp.log(2 * jnp.pi * SIGMA**2), axis=-1)
    return jnp.mean(kl + reconstruction)
