"""Priors p(z) and likelihoods p(x|z): what is drawn from, and what is scored, in nats.

A likelihood turns the decoder's output into a distribution of x. Its `parameters` says how many numbers per pixel
the decoder has to emit: the decoder's output has shape [..., *x.shape, parameters].
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax.types import Array, UserError

LOG_2PI = math.log(2.0 * math.pi)


def normal_log_prob(x: Array, mean: Array | float = 0.0, log_std: Array | float = 0.0) -> Array:
    """Log density of independent normals, elementwise, in nats."""
    return -0.5 * (jnp.square((x - mean) * jnp.exp(-log_std)) + LOG_2PI) - log_std


def normal_kl(mean: Array, std: Array) -> Array:
    """KL(N(mean, diag std^2), N(0, I)) [B] in nats, from [B, Z] (Kingma & Welling 2013, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.square(std) - 1.0 - 2.0 * jnp.log(std), axis=-1)


class Normal(NamedTuple):
    """N(mean, diag std^2) over the latents: one, or one per example."""

    mean: Array  # [Z] or [B, Z]
    std: Array  # as mean

    def sample(self, key: Array, count: int) -> Array:
        """Draws [count, *mean.shape]."""
        return self.mean + self.std * jax.random.normal(key, (count, *self.mean.shape))

    def log_prob(self, z: Array) -> Array:
        """Log density [...] in nats, from z [..., Z]."""
        return jnp.sum(normal_log_prob(z, self.mean, jnp.log(self.std)), axis=-1)


@dataclasses.dataclass(frozen=True)
class StandardNormal:
    """The prior p(z) = N(0, I) over `dim` latents."""

    dim: int

    def sample(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Draws [*shape, dim]."""
        return jax.random.normal(key, (*shape, self.dim))

    def log_prob(self, z: Array) -> Array:
        """Log p(z) [...] in nats, from z [..., dim]."""
        return jnp.sum(normal_log_prob(z), axis=-1)


def _sum_pixels(values: Array, x_ndim: int) -> Array:
    return jnp.sum(values, axis=tuple(range(values.ndim - x_ndim, values.ndim)))


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent Bernoulli pixels; the decoder emits one logit per pixel (section 4).

    x in [0, 1]. For x strictly between, `log_prob` is the cross-entropy, which is the expected log-likelihood of a
    binary image drawn from the intensities x, and no density.
    """

    parameters = 1

    def log_prob(self, output: Array, x: Array) -> Array:
        """Log p(x|z) [B] in nats, from output [B, *x, 1] and x [B, *x]."""
        logits = output[..., 0]
        return _sum_pixels(x * logits - jax.nn.softplus(logits), x.ndim - 1)

    def mean(self, output: Array) -> Array:
        """The mean image [B, *x], pixels in [0, 1]."""
        return jax.nn.sigmoid(output[..., 0])

    def sample(self, key: Array, output: Array) -> Array:
        """A binary image [B, *x] as float32."""
        return jax.random.bernoulli(key, self.mean(output)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian pixels.

    With `std` given, every pixel has that standard deviation and the decoder emits the mean. With `std=None` the
    decoder emits (mean, raw scale) and the standard deviation of each pixel is learned, bounded below by `min_std`
    so that the density cannot run to infinity on constant pixels, and above by `max_std`.
    """

    std: float | None = None
    min_std: float = 0.01
    max_std: float = 1.0

    def __post_init__(self):
        if self.std is not None and not self.std > 0:
            raise UserError(f"likelihood std={self.std!r}: must be a positive number, or None to learn it per pixel")
        if not 0 < self.min_std < self.max_std:
            raise UserError(f"likelihood min_std={self.min_std!r}, max_std={self.max_std!r}: need 0 < min_std < max_std")

    @property
    def parameters(self) -> int:
        return 1 if self.std is not None else 2

    def log_std(self, output: Array) -> Array:
        """Log standard deviation per pixel [B, *x]."""
        if self.std is not None:
            return jnp.full(output.shape[:-1], math.log(self.std))
        low, high = math.log(self.min_std), math.log(self.max_std)
        return low + (high - low) * jax.nn.sigmoid(output[..., 1])

    def log_prob(self, output: Array, x: Array) -> Array:
        """Log p(x|z) [B] in nats (a density: it can be positive), from output [B, *x, parameters] and x [B, *x]."""
        return _sum_pixels(normal_log_prob(x, output[..., 0], self.log_std(output)), x.ndim - 1)

    def mean(self, output: Array) -> Array:
        """The mean image [B, *x]; not clipped to [0, 1]."""
        return output[..., 0]

    def sample(self, key: Array, output: Array) -> Array:
        """An image with its pixel noise [B, *x]."""
        noise = jax.random.normal(key, output.shape[:-1])
        return self.mean(output) + jnp.exp(self.log_std(output)) * noise


@dataclasses.dataclass(frozen=True)
class DiscretizedLogistic:
    """A logistic distribution per pixel, integrated over the `levels` values k / (levels - 1) that a pixel can take.

    Log-probabilities of 8-bit images, not densities (Kingma et al. 2016; Salimans et al. 2017): the lowest and the highest
    level take the tails. The decoder emits (mean, raw scale); the scale is learned between `min_scale` and `max_scale`.
    """

    levels: int = 256
    min_scale: float = 0.002
    max_scale: float = 0.5

    parameters = 2

    def __post_init__(self):
        if self.levels < 2 or not 0 < self.min_scale < self.max_scale:
            raise UserError(
                f"likelihood levels={self.levels}, min_scale={self.min_scale!r}, max_scale={self.max_scale!r}: need at least 2 "
                "levels and 0 < min_scale < max_scale"
            )

    def scale(self, output: Array) -> Array:
        """Scale of the logistic per pixel [B, *x]; the standard deviation is pi / sqrt(3) times it."""
        low, high = math.log(self.min_scale), math.log(self.max_scale)
        return jnp.exp(low + (high - low) * jax.nn.sigmoid(output[..., 1]))

    def log_prob(self, output: Array, x: Array) -> Array:
        """Log P(x|z) [B] in nats, from output [B, *x, 2] and x [B, *x] on the levels."""
        half, scale = 0.5 / (self.levels - 1), self.scale(output)
        upper, lower = (x - output[..., 0] + half) / scale, (x - output[..., 0] - half) / scale
        # sigma(u) - sigma(l) = sigma(u) sigma(-l) (1 - e^(l - u)), each factor of which has a stable logarithm.
        below, above = -jax.nn.softplus(-upper), -jax.nn.softplus(lower)
        inside = below + above + jnp.log(-jnp.expm1(-2.0 * half / scale))
        values = jnp.where(x < half, below, jnp.where(x > 1.0 - half, above, inside))
        return _sum_pixels(values, x.ndim - 1)

    def mean(self, output: Array) -> Array:
        """The logistic's mean image [B, *x]; not clipped to [0, 1]."""
        return output[..., 0]

    def sample(self, key: Array, output: Array) -> Array:
        """An image on the levels [B, *x]."""
        x = output[..., 0] + self.scale(output) * jax.random.logistic(key, output.shape[:-1])
        return jnp.round(jnp.clip(x, 0.0, 1.0) * (self.levels - 1)) / (self.levels - 1)


@dataclasses.dataclass(frozen=True)
class Deterministic:
    """An image in [0, 1] and no distribution of it: the decoder of a generative adversarial network emits a logit per pixel."""

    parameters = 1

    def mean(self, output: Array) -> Array:
        """The image [B, *x], from output [B, *x, 1]."""
        return jax.nn.sigmoid(output[..., 0])


Likelihood = Bernoulli | Gaussian | DiscretizedLogistic
