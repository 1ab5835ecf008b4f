"""A game whose every quantity is known: Gaussian encoder, linear-Gaussian decoder, exact log-ratio as adversary.

x [2]; q(z|x) = N(m x + c, diag s^2) in 2 latents; p(x|z) = N(w z, sigma^2 I).
"""

import jax.numpy as jnp
from flax import linen as nn

from avb_jax import Gaussian, Model, Players, StandardNormal
from avb_jax.distributions import normal_log_prob

SIGMA = 0.7


class LinearEncoder(nn.Module):
    """z = m x + c + exp(log_s) noise, elementwise."""

    @nn.compact
    def __call__(self, x, noise):
        m = self.param("m", nn.initializers.constant(0.8), (2,))
        c = self.param("c", nn.initializers.constant(-0.3), (2,))
        log_s = self.param("log_s", nn.initializers.constant(-0.5), (2,))
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
        m = self.param("m", nn.initializers.constant(0.8), (2,))
        c = self.param("c", nn.initializers.constant(-0.3), (2,))
        log_s = self.param("log_s", nn.initializers.constant(-0.5), (2,))
        offset = self.param("offset", nn.initializers.zeros, ())
        return offset + jnp.sum(normal_log_prob(z, m * x + c, log_s) - normal_log_prob(z), axis=-1)


def model(**options) -> Model:
    """The game's model."""
    players = Players(LinearEncoder(), LinearDecoder(), ExactLogRatio())
    return Model(players, StandardNormal(2), Gaussian(SIGMA), 2, **options)


def analytic_negative_elbo(encoder, decoder, x):
    """The negative ELBO [] in nats, by hand: KL of Gaussians plus E|x - w z|^2 / 2 sigma^2 plus the normalisation."""
    mean, variance = encoder["m"] * x + encoder["c"], jnp.exp(2 * encoder["log_s"])
    kl = 0.5 * jnp.sum(mean**2 + variance - 1 - jnp.log(variance), axis=-1)
    expected_square = (x - decoder["w"] * mean) ** 2 + decoder["w"] ** 2 * variance
    reconstruction = jnp.sum(expected_square / (2 * SIGMA**2) + 0.5 * jnp.log(2 * jnp.pi * SIGMA**2), axis=-1)
    return jnp.mean(kl + reconstruction)
