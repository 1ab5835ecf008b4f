"""Adversaries: networks for T(x, z)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax.networks.mlp import MLP
from avb_jax.types import AdversaryOutput, Array


def _treats_each_z_by_itself(adversary: nn.Module) -> bool:
    """Whether g is known to, which a network of the user's, or one derived from `MLP`, need not."""
    return type(adversary.z_net) is MLP


class InnerProductAdversary(nn.Module):
    """T(x, z) = <f(x), g(z)> / sqrt(features) (section 4), with f(x) computed once for however many z.

    The root keeps T near 1 at initialisation, whatever the width. With `starts_at_zero` the inner product starts at 0, as T*
    does under adaptive contrast where q starts as a Gaussian.

    Maps x [B, ...] and z [..., B, Z] to T [..., B].
    """

    x_net: nn.Module
    z_net: nn.Module
    features: int = 512
    starts_at_zero: bool = False

    shares_x = True

    pointwise = property(_treats_each_z_by_itself)

    @nn.compact
    def __call__(self, x: Array, z: Array, *, train: bool = False) -> Array:
        kernel_init = nn.initializers.zeros if self.starts_at_zero else nn.linear.default_kernel_init
        f = nn.Dense(self.features, kernel_init=kernel_init, name="f")(self.x_net(x, train=train))
        g = nn.Dense(self.features, name="g")(self.z_net(z, train=train))
        return jnp.sum(f * g, axis=-1) / math.sqrt(self.features)


class JointAdversary(nn.Module):
    """T(x, z) by fully connected layers on the products and sums of f(x) and g(z).

    An inner product alone is linear in either; layers behind it let T be as sharp in z at one x as it is at another. g sees z
    with its sines and cosines, so that T is quick to resolve structure finer than the prior's. f(x) is computed once for
    however many z. The layers start at 0.

    With `components`, to what the layers make is added the logarithm of a mixture of as many Gaussians whose weights, means and
    deviations are linear in x's features: with `minus_log_prior`, T then begins as a mixture density's log-ratio to the prior,
    and follows a sharp q by moving components.

    Maps x [B, ...] and z [..., B, Z] to T [..., B].
    """

    x_net: nn.Module
    z_net: nn.Module
    features: int = 256
    widths: Sequence[int] = (256, 256)  # of the layers behind
    frequencies: Sequence[float] = (2.0,)  # of the sines and cosines, radians per unit of z
    components: int = 0  # of a mixture of Gaussians
    activation: Callable[[Array], Array] = nn.silu

    shares_x = True

    pointwise = property(_treats_each_z_by_itself)

    @nn.compact
    def __call__(self, x: Array, z: Array, *, train: bool = False) -> Array:
        waves = [wave(frequency * z) for frequency in self.frequencies for wave in (jnp.sin, jnp.cos)]
        of_x = self.x_net(x, train=train)
        f = nn.Dense(self.features, name="f")(of_x)
        g = nn.Dense(self.features, name="g")(self.z_net(jnp.concatenate([z, *waves], axis=-1), train=train))
        h = MLP(self.widths, self.activation, name="joint")(jnp.concatenate([f * g, f + g], axis=-1))
        t = nn.Dense(1, kernel_init=nn.initializers.zeros, name="t")(h)[..., 0]
        return t + LogMixture(self.components, name="mixture")(of_x, z) if self.components else t


class MixtureAdversary(nn.Module):
    """T(x, z) as the logarithm of a mixture of Gaussians that x's features choose, up to a constant: a density of z for each x.

    With `minus_log_prior` it is log q'(z|x) - log p(z) of a density q' that AVB's game fits to q: it follows a sharp q by
    moving components, and cannot say that there is more of q than there is. Its `components` limit how close it comes.

    Maps x [B, ...] and z [..., B, Z] to T [..., B].
    """

    x_net: nn.Module
    components: int = 16

    shares_x, pointwise = True, True

    @nn.compact
    def __call__(self, x: Array, z: Array, *, train: bool = False) -> Array:
        return LogMixture(self.components, name="mixture")(self.x_net(x, train=train), z)


class LogMixture(nn.Module):
    """The logarithm of a mixture's density at z [..., B, Z], up to the constant (2 pi)^(-Z / 2); linear in features."""

    components: int

    @nn.compact
    def __call__(self, features: Array, z: Array) -> Array:
        count, dim = self.components, z.shape[-1]
        log_weight = jax.nn.log_softmax(nn.Dense(count, name="log_weight")(features))
        mean = nn.Dense(count * dim, name="mean")(features).reshape(-1, count, dim)
        log_std = nn.Dense(count * dim, name="log_std")(features).reshape(-1, count, dim)
        scaled = (z[..., None, :] - mean) * jnp.exp(-log_std)  # [..., B, K, Z]
        log_density = -0.5 * jnp.sum(jnp.square(scaled) + 2.0 * log_std, axis=-1)
        return jax.nn.logsumexp(log_weight + log_density, axis=-1)


class LatentAdversary(nn.Module):
    """T(z) by a fully connected network, for posteriors that depend on no x; it starts at 0. Maps z [B, Z] to T [B]."""

    widths: Sequence[int] = (256, 256)
    activation: Callable[[Array], Array] = nn.silu

    pointwise = True

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        del x
        h = MLP(self.widths, self.activation)(z)
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="t")(h)[:, 0]


class ImageAdversary(nn.Module):
    """T(x) of an image alone, with the features of the trunk's last layer; it starts at 0.

    Maps x [B, ...] to an `AdversaryOutput`.
    """

    trunk: nn.Module

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> AdversaryOutput:
        features = self.trunk(x, None, train=train)
        return AdversaryOutput(nn.Dense(1, kernel_init=nn.initializers.zeros, name="t")(features)[:, 0], features)
