"""Contrasts: the density r(z|x) that stands between q(z|x) and the prior.

T compares the encoder's draws with r's, so that T* = log q(z|x) - log r(z|x): of the KL term it has to learn only what r
misses, and KL(q, p) = E[T*] + E[log r(z|x) - log p(z)]. r may be any density that depends on x alone, and is held fixed where
the encoder is differentiated: E_q[T* + log r] is E_q[log q] for every r.

- `PriorContrast`: r = p(z), the paper's own game.
- `GaussianContrast`: adaptive contrast (Mescheder, Nowozin & Geiger 2017, the later version of the paper): a Gaussian with the
  moments of q(.|x), or with its covariances. T sees (x, (z - mean) / std) and (x, N(0, I)), or something that lies wider.

With `moment_gradients`, gradients flow through the moments, those in r and those in (z - mean) / std; otherwise not.
Both are the gradient of the bound where T is optimal: they differ by the score of q in its location and scale, E_q[d log q] =
0. But where they flow, and z = mean + std * v, what T sees is v, which does not move with location and scale. These are then
trained without T, by log r(z|x) - log p(z) and the reconstruction, and T's errors, divided by a small std, do not reach them: T
shapes q, no more.

Moments that are estimated make T's task harder, not the KL term wrong. They are taken from noise that is the same for every x
and step, so that r is a function of x. With fresh noise T would see z smeared by the moments' own error, and for M draws miss
about Z / M nats of the KL of a Gaussian q, half of it by the mean's and half by the scale's (exactly, with the smeared z as a
Student t of M - 1 degrees: 0.1315 nats per latent for M = 8, 0.0640 for 16).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.stats import norm
from numpyro.distributions import Distribution, constraints

from avb_jax import players
from avb_jax.distributions import kl_divergence, normal, standard_normal
from avb_jax.importance import weighed_twice
from avb_jax.network import Network
from avb_jax.priors import AtParams
from avb_jax.types import Array, Draws, Posterior, PyTree, UserError

SMALLEST_STD = 1e-3  # an encoder that ignores its noise would leave nothing to divide by

More = Callable[[int], Posterior]  # count -> draws from q(z|x) [count, B, Z], of noise that is the same for every x and step


class Compared(NamedTuple):
    """The two sides that T's loss tells apart."""

    z: Array  # [2, S, B, Z] the encoder's draws and those of r, or of an s in its place, as T sees both
    offset: Array | None = None  # [2, S, B] log s(z|x) - log r(z|x) there, nats; None where s is r


class Contrasted(NamedTuple):
    """Draws from q(z|x) and r(z|x), which is the prior where there is no other."""

    z: Array  # [S, B, Z] the encoder's draws
    compared: Compared
    log_ratio: Array  # [S, B] log r(z|x) - log p(z) at the encoder's draws, nats: what the KL term has in addition to T
    kl: Array | None = None  # [B] KL(r(z|x), p(z)), nats; None for the prior, or where it has no closed form
    zero: Array | None = None  # [S, B] as `weighed_twice` makes it, where draws are weighted


@dataclasses.dataclass(frozen=True)
class PriorContrast:
    """r(z|x) = p(z): T has the whole KL to learn."""

    def reference(self, prior: Distribution) -> Distribution:
        """What r is, as T sees it."""
        return prior

    def base(self, prior: Distribution) -> Distribution:
        """What the draws are made of that the encoder's are compared with."""
        return prior

    def __call__(self, prior: Distribution, posterior: Posterior, more: More, base: Array) -> Contrasted:
        """The encoder's draws next to draws [S, B, Z] of the prior.

        Log r - log p is 0, with the gradient of -log p where p is learned: T, whose params are held fixed, has none.
        """
        del more
        log_ratio = jnp.zeros(posterior.z.shape[:-1])
        if isinstance(prior, AtParams):
            log_p = prior.log_prob(jax.lax.stop_gradient(posterior.z))
            log_ratio = jax.lax.stop_gradient(log_p) - log_p
        return Contrasted(posterior.z, Compared(jnp.stack([posterior.z, base])), log_ratio)


@dataclasses.dataclass(frozen=True)
class GaussianContrast:
    """Adaptive contrast: r(z|x) = N(mean, diag std^2) with the moments that the encoder gives, or else those of more draws.

    T stands in for log q - log r, and sees z standardised, next to draws of r; or, with `inflation` or `prior_share`, of

        s(z|x) = (1 - prior_share) N(mean, (inflation std)^2) + prior_share p(z),

    which lies wherever q does. Of r there are few draws in the tails of a q that is no Gaussian, where T would be anything.
    The logit of its loss is T + log r - log s, and T* the same for every s (noise-contrastive estimation, Gutmann & Hyvarinen
    2012).

    Attributes:
      moment_draws: of z, for r's moments where the encoder does not give them.
      moment_gradients: whether gradients flow through the moments.
      full: whether r has q's covariances, by more draws than z has dimensions, whatever moments the encoder gives.
      inflation: of s's standard deviation over q's, at least 1.
      prior_share: of s, at least 0 and below 1.

    Raises:
      UserError: a setting out of its range; where it is called, no more draws than z has dimensions for a covariance.
    """

    moment_draws: int = 8
    moment_gradients: bool = False
    full: bool = False
    inflation: float = 1.0
    prior_share: float = 0.0

    def __post_init__(self):
        if self.moment_draws < 2:
            raise UserError(f"moment_draws={self.moment_draws}: must be at least 2")
        if not self.inflation >= 1:
            raise UserError(f"inflation={self.inflation!r}: must be at least 1")
        if not 0 <= self.prior_share < 1:
            raise UserError(f"prior_share={self.prior_share!r}: must be at least 0 and below 1")

    def reference(self, prior: Distribution) -> Distribution:
        """N(0, I), which r is once standardised."""
        if self.full and self.moment_draws <= (dim := prior.event_shape[0]):
            raise UserError(f"moment_draws={self.moment_draws}: must be more than z's {dim} dimensions, for a covariance")
        return standard_normal(prior.event_shape[0])

    def base(self, prior: Distribution) -> Distribution:
        """N(0, I); with a share of the prior, a draw of each, and one of N(0, 1) that says which it is."""
        reference = self.reference(prior)
        return _Joint(reference, prior, standard_normal(1)) if self.prior_share else reference

    def __call__(self, prior: Distribution, posterior: Posterior, more: More, base: Array) -> Contrasted:
        """The encoder's draws next to r's, or to those of s, all standardised by q's moments."""
        z, dim, reference = posterior.z, prior.event_shape[0], self.reference(prior)
        moments = self._moments(posterior, more)
        v = moments.standardised(z)
        log_ratio = reference.log_prob(v) - moments.log_scale - prior.log_prob(z)
        kl = None if self.full else kl_divergence(normal(moments.mean, moments.factor), prior)
        v_s = self.inflation * base[..., :dim]
        if self.prior_share:
            from_prior = norm.cdf(base[..., -1:]) < self.prior_share
            v_s = jnp.where(from_prior, moments.standardised(base[..., dim:-1]), v_s)
        both = jnp.stack([v, v_s])
        if self.inflation == 1.0 and not self.prior_share:
            return Contrasted(z, Compared(both), log_ratio, kl)
        log_s = normal(jnp.zeros(dim), self.inflation).log_prob(both)
        if self.prior_share:
            log_p = prior.log_prob(moments.placed(both)) + moments.log_scale
            log_s = jnp.logaddexp(jnp.log1p(-self.prior_share) + log_s, jnp.log(self.prior_share) + log_p)
        return Contrasted(z, Compared(both, log_s - reference.log_prob(both)), log_ratio, kl)

    def _moments(self, posterior: Posterior, more: More) -> "_Moments":
        mean, std = posterior.mean, posterior.std
        if self.full or mean is None or std is None:
            z = more(self.moment_draws).z
            # Bounded under the root, whose gradient has no end at a variance of 0.
            mean, std = z.mean(axis=0), jnp.sqrt(jnp.maximum(z.var(axis=0, ddof=1), SMALLEST_STD**2))
        factor = jnp.maximum(std, SMALLEST_STD)
        if self.full:
            covariance = jnp.einsum("mbi,mbj->bij", z - mean, z - mean) / (self.moment_draws - 1)
            factor = jnp.linalg.cholesky(covariance + SMALLEST_STD**2 * jnp.eye(mean.shape[-1]))
        moments = _Moments(mean, factor)
        return moments if self.moment_gradients else jax.lax.stop_gradient(moments)


class _Moments(NamedTuple):
    """What standardises z."""

    mean: Array  # [B, Z]
    factor: Array  # [B, Z] standard deviations, or [B, Z, Z] a lower triangular root of the covariances

    @property
    def log_scale(self) -> Array:
        diagonal = self.factor if self.factor.ndim == 2 else jnp.diagonal(self.factor, axis1=-2, axis2=-1)
        return jnp.sum(jnp.log(diagonal), axis=-1)

    def standardised(self, z: Array) -> Array:
        """Of z [S, B, Z]."""
        if self.factor.ndim == 2:
            return (z - self.mean) / self.factor
        return jax.vmap(lambda root, z: solve_triangular(root, z.T, lower=True).T, (0, 1), 1)(self.factor, z - self.mean)

    def placed(self, v: Array) -> Array:
        """Z [..., B, Z] of what is standardised."""
        moved = self.factor * v if self.factor.ndim == 2 else jnp.einsum("bij,...bj->...bi", self.factor, v)
        return self.mean + moved


class _Joint(Distribution):
    """Draws of several distributions over vectors, next to each other."""

    support = constraints.real_vector

    def __init__(self, *parts: Distribution):
        self.parts = parts
        super().__init__((), (sum(part.event_shape[0] for part in parts),))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        keys = jax.random.split(key, len(self.parts))
        drawn = [part.sample(key, sample_shape) for part, key in zip(self.parts, keys, strict=True)]
        return jnp.concatenate(drawn, axis=-1)


Contrast = PriorContrast | GaussianContrast


def encode(
    contrast: Contrast,
    prior: Distribution,
    network: Network,
    params: PyTree,
    collections: dict,
    draws: Draws,
    *,
    train: bool,
    weighted: Array | float | None = None,
) -> tuple[Contrasted, dict]:
    """Draws z ~ q(z|x), and compares them with r(z|x).

    Args:
      contrast: what r is.
      prior: p(z).
      network: the encoder.
      params: the encoder's.
      collections: the encoder's.
      draws: x [B, ...], noise [S, B, N], and z_prior [S, B, ...] from `contrast.base(prior)`.
      train: whether batch normalisation uses this batch.
      weighted: where the loss weighs the draws, the power of p(z) / q(z|x) in a weight, beta: the encoder's gradients then are
        `weighed_twice`, but for those of location and scale where they flow through the moments: these are of all of log q,
        in which T has no part. None: it does not.

    Returns:
      The draws, and the encoder's new collections.

    Raises:
      UserError: draws are weighted, gradients flow through moments, and the encoder does not give them.
    """
    (x, noise, base), dim = draws, prior.event_shape[0]
    posterior, after = players.encode(network, params, collections, x, noise, dim, train=train)

    def more(count: int) -> Posterior:
        fixed = jax.random.normal(jax.random.key(0), (count, 1, noise.shape[-1]))
        fixed = jnp.broadcast_to(fixed, (count, x.shape[0], noise.shape[-1]))
        return players.encode(network, params, collections, x, fixed, dim, train=train)[0]

    if weighted is None:
        return contrast(prior, posterior, more, base), after
    location, scale = 0.0, 1.0
    if isinstance(contrast, GaussianContrast) and contrast.moment_gradients:
        location, scale = posterior.mean, posterior.std
        if location is None or scale is None:
            raise UserError(
                f"importance_weighted=True: with moment_gradients, encoder={network.name} has to give its moments; use "
                "networks.MomentEncoder, or moment_gradients=False"
            )
    v, zero = weighed_twice((posterior.z - location) / scale, jnp.zeros(posterior.z.shape[:-1]), weighted)
    return contrast(prior, posterior.replace(z=location + scale * v), more, base)._replace(zero=zero), after
