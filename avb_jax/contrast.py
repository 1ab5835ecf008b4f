"""Adaptive contrast: a distribution r(z|x) that stands between q(z|x) and the prior.

(Mescheder, Nowozin & Geiger 2017, the later version of the paper.) T then compares (x, (z - mean) / std) with (x, N(0, I)), so
that T* = log q(z|x) - log r(z|x): of the KL term it has to learn only what the Gaussian r, with the moments of q(.|x), misses,
and KL(q, p) = E[T*] + E[log r(z|x) - log p(z)].

With `moment_gradients`, gradients flow through the moments, those in r and those in (z - mean) / std; otherwise not. Both
are the gradient of the bound where T is optimal: they differ by the score of q in its location and scale, E_q[d log q] = 0. But
where they flow, and z = mean + std * v, what T sees is v, which does not move with location and scale. These are then trained
without T, by log r(z|x) - log p(z) and the reconstruction, and T's errors, divided by a small std, do not reach them: T shapes
q, no more.

r may be any density that depends on x alone: moments that are estimated make T's task harder, not the KL term wrong. They are
taken from noise that is the same for every x and step, so that r is a function of x. With fresh noise T would see z smeared by
the moments' own error, and for M draws miss about Z / M nats of the KL of a Gaussian q, half of it by the mean's and half by
the scale's (exactly, with the smeared z as a Student t of M - 1 degrees: 0.1315 nats per latent for M = 8, 0.0640 for 16).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import kl_divergence, normal
from avb_jax.network import Network
from avb_jax.types import Array, PyTree, UserError

SMALLEST_STD = 1e-3  # an encoder that ignores its noise would leave nothing to divide by


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Settings of adaptive contrast.

    Attributes:
      moment_draws: of z, for r's moments where the encoder does not give them.
      moment_gradients: whether gradients flow through the moments.

    Raises:
      UserError: fewer than 2 draws.
    """

    moment_draws: int = 8
    moment_gradients: bool = False

    def __post_init__(self):
        if self.moment_draws < 2:
            raise UserError(f"moment_draws={self.moment_draws}: must be at least 2")


class Contrasted(NamedTuple):
    """Draws from q(z|x) and r(z|x), which is the prior where there is no contrast."""

    z: Array  # [S, B, Z] the encoder's draws
    compared: Array  # [S, B, Z] the same as T sees them: (z - mean) / std, or z itself
    log_ratio: Array  # [S, B] log r(z|x) - log p(z), nats: what the KL term has in addition to T
    kl: Array | None  # [B] KL(r(z|x), p(z)), nats; None without contrast, or where it has no closed form


def encode(
    contrast: Adaptive | None,
    prior: Distribution,
    network: Network,
    params: PyTree,
    collections: dict,
    x: Array,
    noise: Array,
    *,
    train: bool,
) -> tuple[Contrasted, dict]:
    """Draws z ~ q(z|x), and compares them with r(z|x).

    Under adaptive contrast, r is N(mean, diag std^2) with the moments that the encoder gives, or else those of
    `contrast.moment_draws` more draws.

    Args:
      contrast: None where T compares with the prior.
      prior: p(z).
      network: the encoder.
      params: the encoder's.
      collections: the encoder's.
      x: [B, ...].
      noise: [S, B, N].
      train: whether batch normalisation uses this batch.

    Returns:
      The draws, and the encoder's new collections.
    """
    dim = prior.event_shape[0]
    posterior, after = players.encode(network, params, collections, x, noise, dim, train=train)
    z = posterior.z
    if contrast is None:
        return Contrasted(z, z, jnp.zeros(z.shape[:-1]), None), after
    mean, std = posterior.mean, posterior.std
    if mean is None or std is None:
        noise = jax.random.normal(jax.random.key(0), (contrast.moment_draws, 1, noise.shape[-1]))
        noise = jnp.broadcast_to(noise, (contrast.moment_draws, x.shape[0], noise.shape[-1]))
        more = players.encode(network, params, collections, x, noise, dim, train=train)[0].z
        # Bounded under the root, whose gradient has no end at a variance of 0.
        mean, std = more.mean(axis=0), jnp.sqrt(jnp.maximum(more.var(axis=0, ddof=1), SMALLEST_STD**2))
    moments = mean, jnp.maximum(std, SMALLEST_STD)
    mean, std = moments if contrast.moment_gradients else jax.lax.stop_gradient(moments)
    r = normal(mean, std)
    return Contrasted(z, (z - mean) / std, r.log_prob(z) - prior.log_prob(z), kl_divergence(r, prior)), after
