"""Adaptive contrast: a distribution r(z|x) that stands between q(z|x) and the prior.

(Mescheder, Nowozin & Geiger 2017, the later version of the paper.) T then tells (x, (z - mean) / std) from (x, N(0, I)), so
that T* = log q(z|x) - log r(z|x): of the KL term it has to learn only what the Gaussian r, with the moments of q(.|x), misses,
and KL(q, p) = E[T*] + E[log r(z|x) - log p(z)].

With `model.moment_gradients`, gradients flow through the moments, those in r and those in (z - mean) / std; otherwise not. Both
are the gradient of the bound where T is optimal: they differ by the score of q in its location and scale, E_q[d log q] = 0. But
where they flow, and z = mean + std * v, what T sees is v, which does not move with location and scale. These are then trained
without T, by log r(z|x) - log p(z) and the reconstruction, and T's errors, divided by a small std, do not reach them: T shapes
q, no more.

r may be any density that depends on x alone: moments that are estimated make T's task harder, not the KL term wrong. They are
taken from noise that is the same for every x and step, so that r is a function of x. With fresh noise T would see z smeared by
the moments' own error, and for M draws miss about Z / M nats of the KL of a Gaussian q, half of it by the mean's and half by
the scale's (exactly, with the smeared z as a Student t of M - 1 degrees: 0.1315 nats per latent for M = 8, 0.0640 for 16).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax import players
from avb_jax.distributions import Normal, normal_kl
from avb_jax.players import Model
from avb_jax.types import Array, PyTree

SMALLEST_STD = 1e-3  # an encoder that ignores its noise would leave nothing to divide by


class Contrasted(NamedTuple):
    """Draws from q(z|x) beside r(z|x), which is the prior where there is no contrast."""

    z: Array  # [S, B, Z] the encoder's draws
    seen: Array  # [S, B, Z] the same as T sees them: (z - mean) / std, or z itself
    log_ratio: Array  # [S, B] log r(z|x) - log p(z), nats: what the KL term has beside T
    kl: Array | None  # [B] KL(r(z|x), p(z)), nats; None without contrast


def encode(
    model: Model, params: PyTree, stats: PyTree, x: Array, noise: Array, *, train: bool
) -> tuple[Contrasted, PyTree]:
    """Draws z ~ q(z|x) and sets them beside r(z|x), as `model.contrast` says.

    With 'adaptive', r is N(mean, diag std^2) with the moments that the encoder tells, or else those of `model.moment_draws`
    more draws.

    Args:
      model: the networks and their contrast.
      params: the encoder's.
      stats: the encoder's batch statistics.
      x: [B, ...].
      noise: [S, B, N].
      train: whether batch normalisation uses this batch.

    Returns:
      The draws, and the encoder's new batch statistics.
    """
    posterior, new_stats = players.encode(model, params, stats, x, noise, train=train)
    z = posterior.z
    if model.contrast == "none":
        return Contrasted(z, z, jnp.zeros(z.shape[:-1]), None), new_stats
    mean, std = posterior.mean, posterior.std
    if mean is None or std is None:
        noise = jax.random.normal(jax.random.key(0), (model.moment_draws, 1, model.noise_dim))
        noise = jnp.broadcast_to(noise, (model.moment_draws, x.shape[0], model.noise_dim))
        more = players.encode(model, params, stats, x, noise, train=train)[0].z
        # Bounded under the root, whose gradient has no end at a variance of 0.
        mean, std = more.mean(axis=0), jnp.sqrt(jnp.maximum(more.var(axis=0, ddof=1), SMALLEST_STD**2))
    moments = mean, jnp.maximum(std, SMALLEST_STD)
    r = Normal(*(moments if model.moment_gradients else jax.lax.stop_gradient(moments)))
    log_ratio = r.log_prob(z) - model.prior.log_prob(z)
    return Contrasted(z, (z - r.mean) / r.std, log_ratio, normal_kl(r.mean, r.std)), new_stats
