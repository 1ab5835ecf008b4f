"""Priors p(z) and likelihoods p(x|z) are NumPyro distributions; here is what NumPyro lacks, and the ones used most, by name.

A likelihood is a function from the decoder's output to a distribution with batch shape [B] and the event shape of x:
`lambda output: dist.Poisson(jnp.exp(output)).to_event(1)`, for one. Those here take outputs [B, *x, P], P numbers per pixel.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from avb_jax.types import Array, UserError

Likelihood = Callable[[Array], dist.Distribution]


def standard_normal(dim: int) -> dist.Distribution:
    """N(0, I) over `dim` latents."""
    return dist.Normal(jnp.zeros(dim), 1.0).to_event(1)


def normal(mean: Array, std: Array) -> dist.Distribution:
    """N(mean, diag std^2) over the latents [..., Z]: one, or one per example."""
    return dist.Normal(mean, std).to_event(1)


def kl_divergence(q: dist.Distribution, p: dist.Distribution) -> Array | None:
    """KL(q, p) [B] in nats, where NumPyro knows it in closed form; None where it does not."""
    try:
        return dist.kl_divergence(q, p)
    except NotImplementedError:
        return None


def base_distribution(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution of one number (or vector) of x, without `to_event`, `expand` and `mask`."""
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def log_likelihood(of_x: dist.Distribution, x: Array) -> Array:
    """Log p(x|z) [B] of x [B, ...]; of categories, which NumPyro indexes with, the floating-point x as integers."""
    categories = isinstance(base_distribution(of_x), dist.CategoricalLogits | dist.CategoricalProbs)
    return of_x.log_prob(x.astype(jnp.int32) if categories else x)


def bernoulli(output: Array) -> dist.Distribution:
    """Independent Bernoulli pixels, from a logit each [B, *x, 1] (section 4).

    x in [0, 1]. For x strictly between, `log_prob` is the cross-entropy, which is the expected log-likelihood of a
    binary image drawn from the intensities x, and no density; so NumPyro's own check of values is off.
    """
    _check_parameters("bernoulli", output, 1)
    return _Bernoulli(output[..., 0], validate_args=False).to_event(output.ndim - 2)


class _Bernoulli(dist.BernoulliLogits):
    """NumPyro's, which has a log-probability of 0 where a logit is not a number and the pixel black; here it is none."""

    def log_prob(self, value: Array) -> Array:
        return jnp.where(jnp.isnan(self.logits), jnp.nan, super().log_prob(value))


def gaussian(std: float | None = None, min_std: float = 0.01, max_std: float = 1.0) -> Likelihood:
    """Independent Gaussian pixels.

    With `std` given, every pixel has that standard deviation and the decoder emits the mean [B, *x, 1]. Without, it emits
    (mean, raw scale) [B, *x, 2], and the standard deviation of each pixel is learned, bounded below by `min_std` so that the
    density cannot run to infinity on constant pixels, and above by `max_std`.

    Raises:
      UserError: scales that are not positive, or in the wrong order.
    """
    if std is not None and not std > 0:
        raise UserError(f"likelihood std={std!r}: must be a positive number, or None to learn it per pixel")
    if not 0 < min_std < max_std:
        raise UserError(f"likelihood min_std={min_std!r}, max_std={max_std!r}: need 0 < min_std < max_std")

    def likelihood(output: Array) -> dist.Distribution:
        _check_parameters("gaussian", output, 1 if std is not None else 2)
        mean = output[..., 0]
        scale = jnp.full_like(mean, std) if std is not None else _between(min_std, max_std, output[..., 1])
        return dist.Normal(mean, scale).to_event(mean.ndim - 1)

    return likelihood


def discretized_logistic(levels: int = 256, min_scale: float = 0.002, max_scale: float = 0.5) -> Likelihood:
    """A `DiscretizedLogistic` per pixel, from (mean, raw scale) [B, *x, 2]; the scale is learned between the two given.

    Raises:
      UserError: fewer than 2 levels, scales that are not positive, or in the wrong order.
    """
    if levels < 2 or not 0 < min_scale < max_scale:
        raise UserError(
            f"likelihood levels={levels}, min_scale={min_scale!r}, max_scale={max_scale!r}: need at least 2 levels and 0 < "
            "min_scale < max_scale"
        )

    def likelihood(output: Array) -> dist.Distribution:
        _check_parameters("discretized_logistic", output, 2)
        scale = _between(min_scale, max_scale, output[..., 1])
        return DiscretizedLogistic(output[..., 0], scale, levels).to_event(output.ndim - 2)

    return likelihood


def deterministic(output: Array) -> dist.Distribution:
    """An image in [0, 1] and no density: the decoder of a generative adversarial network emits a logit per pixel [B, *x, 1]."""
    _check_parameters("deterministic", output, 1)
    return dist.Delta(jax.nn.sigmoid(output[..., 0]), event_dim=output.ndim - 2)


class DiscretizedLogistic(dist.Distribution):
    """A logistic distribution, integrated over the `levels` values k / (levels - 1) that a pixel can take.

    Log-probabilities of 8-bit images, not densities (Kingma et al. 2016; Salimans et al. 2017): the lowest and the highest
    level take the tails. The logistic's standard deviation is pi / sqrt(3) times its scale.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.unit_interval
    pytree_data_fields = ("loc", "scale")
    pytree_aux_fields = ("levels",)

    def __init__(self, loc: Array, scale: Array, levels: int = 256, *, validate_args: bool | None = None):
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(jax.lax.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)), validate_args=validate_args)

    def log_prob(self, value: Array) -> Array:
        """Log P(value) in nats, of values on the levels."""
        half, scale = 0.5 / (self.levels - 1), self.scale
        upper, lower = (value - self.loc + half) / scale, (value - self.loc - half) / scale
        # sigma(u) - sigma(l) = sigma(u) sigma(-l) (1 - e^(l - u)), each factor of which has a stable logarithm.
        below, above = -jax.nn.softplus(-upper), -jax.nn.softplus(lower)
        inside = below + above + jnp.log(-jnp.expm1(-2.0 * half / scale))
        return jnp.where(value < half, below, jnp.where(value > 1.0 - half, above, inside))

    @property
    def mean(self) -> Array:
        """The logistic's mean; not clipped to [0, 1]."""
        return jnp.broadcast_to(self.loc, self.batch_shape)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Values on the levels."""
        x = self.loc + self.scale * jax.random.logistic(key, sample_shape + self.batch_shape)
        return jnp.round(jnp.clip(x, 0.0, 1.0) * (self.levels - 1)) / (self.levels - 1)


def _check_parameters(likelihood: str, output: Array, parameters: int) -> None:
    if output.ndim < 2 or output.shape[-1] != parameters:
        raise UserError(
            f"decoder: returned shape {output.shape}; the {likelihood} likelihood needs [B, *x, {parameters}], {parameters} "
            "number(s) per pixel on a last axis"
        )


def _between(low: float, high: float, raw: Array) -> Array:
    """A scale between two others, on a logarithmic scale the sigmoid of a raw number."""
    return jnp.exp(math.log(low) + (math.log(high) - math.log(low)) * jax.nn.sigmoid(raw))
