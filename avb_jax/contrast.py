"""Contrasts: the density r(z|x) that stands between q(z|x) and the prior.

T compares the encoder's draws with r's, so that T* = log q(z|x) - log r(z|x): of the KL term it has to learn only what r
misses, and KL(q, p) = E[T*] + E[log r(z|x) - log p(z)]. r may be any density that depends on x alone, and is held fixed where
the encoder is differentiated: E_q[T* + log r] is E_q[log q] for every r.

- `PriorContrast`: r = p(z), the paper's own game.
- `GaussianContrast`: adaptive contrast (Mescheder, Nowozin & Geiger 2017, the later version of the paper): a Gaussian with the
  moments of q(.|x). T sees (x, (z - mean) / std) and (x, N(0, I)).
- `FullCovariance`: the same with q's covariances, standardised by their Cholesky factor.
- `SemiImplicitContrast`: of a semi-implicit encoder, a mixture of its conditionals at some draws of its noise, and of a
  Gaussian wider than q, without which log r falls without end where the conditionals have nothing, and T knows nothing of it.

With `moment_gradients`, gradients flow through a Gaussian's moments, those in r and those in (z - mean) / std; otherwise not.
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
from numpyro.distributions import Categorical, Distribution, MixtureSameFamily

from avb_jax import players
from avb_jax.distributions import kl_divergence, normal, standard_normal
from avb_jax.network import Network
from avb_jax.priors import AtParams
from avb_jax.types import Array, Draws, Posterior, PyTree, UserError

SMALLEST_STD = 1e-3  # an encoder that ignores its noise would leave nothing to divide by

More = Callable[[int], Posterior]  # count -> draws from q(z|x) [count, B, Z], of noise that is the same for every x and step


class Contrasted(NamedTuple):
    """Draws from q(z|x) and r(z|x), which is the prior where there is no other."""

    z: Array  # [S, B, Z] the encoder's draws
    compared: Array  # [2, S, B, Z] these, and r's draws, as T sees both
    log_ratio: Array  # [S, B] log r(z|x) - log p(z) at the encoder's draws, nats: what the KL term has in addition to T
    kl: Array | None = None  # [B] KL(r(z|x), p(z)), nats; None for the prior, or where it has no closed form


@dataclasses.dataclass(frozen=True)
class PriorContrast:
    """r(z|x) = p(z): T has the whole KL to learn."""

    def base(self, prior: Distribution) -> Distribution:
        """What r's draws are made of; T sees it as it is, but under a mixture."""
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
        return Contrasted(posterior.z, jnp.stack([posterior.z, base]), log_ratio)


@dataclasses.dataclass(frozen=True)
class GaussianContrast:
    """Adaptive contrast: r(z|x) = N(mean, diag std^2) with the moments that the encoder gives, or else those of more draws.

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

    def base(self, prior: Distribution) -> Distribution:
        """As r is once standardised."""
        return standard_normal(prior.event_shape[0])

    def __call__(self, prior: Distribution, posterior: Posterior, more: More, base: Array) -> Contrasted:
        """The encoder's draws, standardised, next to N(0, I)."""
        mean, std = posterior.mean, posterior.std
        if mean is None or std is None:
            z = more(self.moment_draws).z
            # Bounded under the root, whose gradient has no end at a variance of 0.
            mean, std = z.mean(axis=0), jnp.sqrt(jnp.maximum(z.var(axis=0, ddof=1), SMALLEST_STD**2))
        moments = mean, jnp.maximum(std, SMALLEST_STD)
        mean, std = moments if self.moment_gradients else jax.lax.stop_gradient(moments)
        r, z = normal(mean, std), posterior.z
        log_ratio = r.log_prob(z) - prior.log_prob(z)
        return Contrasted(z, jnp.stack([(z - mean) / std, base]), log_ratio, kl_divergence(r, prior))


@dataclasses.dataclass(frozen=True)
class FullCovariance:
    """r(z|x) = N(mean, covariance) with the moments of some draws of z.

    Attributes:
      moment_draws: of z; more than it has dimensions, or r has no density.

    Raises:
      UserError: fewer than 2 draws; where it is called, no more draws than z has dimensions.
    """

    moment_draws: int = 64

    def __post_init__(self):
        if self.moment_draws < 2:
            raise UserError(f"moment_draws={self.moment_draws}: must be at least 2")

    def base(self, prior: Distribution) -> Distribution:
        """As r is once standardised."""
        if self.moment_draws <= (dim := prior.event_shape[0]):
            raise UserError(f"moment_draws={self.moment_draws}: must be more than z's {dim} dimensions, for a covariance")
        return standard_normal(dim)

    def __call__(self, prior: Distribution, posterior: Posterior, more: More, base: Array) -> Contrasted:
        """The encoder's draws, standardised, next to N(0, I)."""
        drawn = jax.lax.stop_gradient(more(self.moment_draws).z)
        mean = drawn.mean(axis=0)
        centred = drawn - mean
        covariance = jnp.einsum("mbi,mbj->bij", centred, centred) / (self.moment_draws - 1)
        factor = jnp.linalg.cholesky(covariance + SMALLEST_STD**2 * jnp.eye(mean.shape[-1]))
        z = posterior.z
        standard = jax.vmap(lambda one, z: solve_triangular(one, z.T, lower=True).T, (0, 1), 1)(factor, z - mean)
        log_scale = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)
        log_r = standard_normal(mean.shape[-1]).log_prob(standard) - log_scale
        return Contrasted(z, jnp.stack([standard, base]), log_r - prior.log_prob(z))


@dataclasses.dataclass(frozen=True)
class SemiImplicitContrast:
    """r(z|x) = (1 - broad) mean_k N(z; mean(x, u_k), std(x, u_k)^2) + broad N(z; q's mean, (inflation q's std)^2).

    Of a semi-implicit encoder, at fixed u_1 .. u_K: the nearer the mixture comes to q, the less is left for T, which sees z
    itself, next to draws from r.

    Attributes:
      components: K.
      broad: share of the wide Gaussian, in (0, 1].
      inflation: of its standard deviation over q's, at least 1.

    Raises:
      UserError: a setting out of its range.
    """

    components: int = 16
    broad: float = 0.5
    inflation: float = 1.2

    def __post_init__(self):
        if self.components < 2:
            raise UserError(f"components={self.components}: must be at least 2")
        if not 0 < self.broad <= 1:
            raise UserError(f"broad={self.broad!r}: must be above 0 and at most 1")
        if not self.inflation >= 1:
            raise UserError(f"inflation={self.inflation!r}: must be at least 1")

    def base(self, prior: Distribution) -> Distribution:
        """N(0, I) of one dimension more than z has, which says of which component a draw is."""
        return standard_normal(prior.event_shape[0] + 1)

    def __call__(self, prior: Distribution, posterior: Posterior, more: More, base: Array) -> Contrasted:
        """The encoder's draws next to r's."""
        conditional = more(self.components).conditional
        if conditional is None:
            raise UserError("contrast: the encoder is not semi-implicit; use networks.SemiImplicitEncoder, or another contrast")
        means, stds = (jnp.moveaxis(moment, 0, 1) for moment in jax.lax.stop_gradient(conditional))  # [B, K, Z]
        mean = means.mean(axis=1, keepdims=True)
        variance = jnp.mean(jnp.square(stds) + jnp.square(means - mean), axis=1, keepdims=True)
        means = jnp.concatenate([means, mean], axis=1)
        stds = jnp.maximum(jnp.concatenate([stds, self.inflation * jnp.sqrt(variance)], axis=1), SMALLEST_STD)
        shares = jnp.append(jnp.full(self.components, (1.0 - self.broad) / self.components), self.broad)
        r, z = MixtureSameFamily(Categorical(probs=shares), normal(means, stds)), posterior.z
        # Uniform on [0, 1], for one of the K + 1.
        uniform = jax.scipy.stats.norm.cdf(base[..., -1])
        which = jnp.minimum(jnp.searchsorted(jnp.cumsum(shares), uniform), self.components)  # [S, B]
        of_mean, of_std = (moment[jnp.arange(z.shape[1]), which] for moment in (means, stds))
        drawn = of_mean + of_std * base[..., :-1]
        return Contrasted(z, jnp.stack([z, drawn]), r.log_prob(z) - prior.log_prob(z))


Contrast = PriorContrast | GaussianContrast | FullCovariance | SemiImplicitContrast


def encode(
    contrast: Contrast,
    prior: Distribution,
    network: Network,
    params: PyTree,
    collections: dict,
    draws: Draws,
    *,
    train: bool,
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

    Returns:
      The draws, and the encoder's new collections.
    """
    (x, noise, base), dim = draws, prior.event_shape[0]
    posterior, after = players.encode(network, params, collections, x, noise, dim, train=train)

    def more(count: int) -> Posterior:
        fixed = jax.random.normal(jax.random.key(0), (count, 1, noise.shape[-1]))
        fixed = jnp.broadcast_to(fixed, (count, x.shape[0], noise.shape[-1]))
        return players.encode(network, params, collections, x, fixed, dim, train=train)[0]

    return contrast(prior, posterior, more, base), after
