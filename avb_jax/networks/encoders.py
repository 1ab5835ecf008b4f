"""Encoders: a trunk's features turned into a draw z ~ q(z|x)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax.networks.mlp import MLP
from avb_jax.types import Array, Posterior, UserError

STANDARD_DRAWS = 512


def gaussian_heads(features: Array, latent_dim: int, scale: float) -> tuple[Array, Array]:
    """The layers of the calling module that make a mean and a standard deviation [B, Z] of features."""
    mean = nn.Dense(latent_dim, kernel_init=scaled(scale), name="mean")(features)
    return mean, jnp.exp(nn.Dense(latent_dim, kernel_init=scaled(scale), name="log_std")(features))


def identity(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Initial kernels that pass on what comes in."""
    del key
    return jnp.eye(*shape, dtype=dtype)


def scaled(scale: float) -> nn.initializers.Initializer:
    """Initial kernels of variance scale / inputs."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


def joined(
    features: Array, others: dict[str, tuple[Array, float]], widths: Sequence[int], activation: Callable[[Array], Array]
) -> Array:
    """Layers of the calling module behind x's features [B, F]; none without widths.

    The first reads `others` [..., B, N], too, each by kernels of its name and of variance scale / N, the scale given with it.
    """
    if not widths:
        return features
    first, *behind = widths
    h = nn.Dense(first, name="of_x")(features)
    for name, (other, scale) in others.items():
        h += nn.Dense(first, use_bias=False, kernel_init=scaled(scale), name=name)(other)
    return MLP(behind, activation, name="joint")(activation(h))


class BlackBoxEncoder(nn.Module):
    """z = enc(x, noise) [B, Z]: q(z|x) is whatever the network makes of the noise (Figure 1b)."""

    trunk: nn.Module
    latent_dim: int

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Array:
        return nn.Dense(self.latent_dim)(self.trunk(x, noise, train=train))


class GaussianEncoder(nn.Module):
    """q(z|x) = N(mean(x), diag std(x)^2), drawn as mean + std * noise (Kingma & Welling 2013; Figure 1a).

    The noise [..., B, Z] is not seen by the trunk, so that q is Gaussian.

    With the `widths` of a `SemiImplicitEncoder` it is that one without u, which can start from its params.
    """

    trunk: nn.Module
    latent_dim: int
    head_scale: float = 1.0  # variance of the head's kernels, relative to 1 / features; near 0, q starts near the prior
    widths: Sequence[int] = ()  # of layers behind the trunk
    activation: Callable[[Array], Array] = nn.silu

    shares_x = True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        if noise.shape[-1] != self.latent_dim:
            raise UserError(
                f"noise_dim={noise.shape[-1]}: GaussianEncoder draws z as mean + std * noise; set it to latent_dim="
                f"{self.latent_dim}"
            )
        h = joined(self.trunk(x, None, train=train), {}, self.widths, self.activation)
        mean, std = gaussian_heads(h, self.latent_dim, self.head_scale)
        return Posterior(mean + std * noise, mean, std, gaussian=True)


class SemiImplicitEncoder(nn.Module):
    """A semi-implicit q(z|x): z = mean(x, u) + std(x, u) * n with u, n ~ N(0, I) (Yin & Zhou 2018).

    Whatever a network makes of u, smoothed by a little Gaussian noise. So log q(z|x) = log E_u N(z; mean, std^2) has stochastic
    bounds from both sides (`evaluation.SemiImplicit`), and q can be trained without a T (`avb_jax.sivi`) or with one.

    x's features are computed once, and joined with u in fully connected layers of their own.

    Maps x [B, ...] and noise [..., B, Z + U], n first, to z [..., B, Z] and its conditional moments.

    Raises:
      UserError: noise that leaves no u.
    """

    trunk: nn.Module
    latent_dim: int
    widths: Sequence[int] = (256, 256)  # of the layers that join x's features and u
    activation: Callable[[Array], Array] = nn.silu
    head_scale: float = 1.0  # as `GaussianEncoder`'s
    smallest_std: float = 0.0  # below which no std(x, u) goes: q stays as smooth as T, or the bounds, can resolve
    noise_scale: float = 1.0  # variance of the kernels that read u, relative to 1 / U; near 0, q starts as a Gaussian

    shares_x, semi_implicit = True, True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        n, u = noise[..., : self.latent_dim], noise[..., self.latent_dim :]
        if u.shape[-1] < 1:
            raise UserError(
                f"noise_dim={noise.shape[-1]}: SemiImplicitEncoder needs latent_dim={self.latent_dim} numbers for n and at "
                f"least one for u; set it to {self.latent_dim + 1} or more"
            )
        others = {"of_u": (u, self.noise_scale)}
        h = joined(self.trunk(x, None, train=train), others, self.widths, self.activation)
        mean, std = gaussian_heads(h, self.latent_dim, self.head_scale)
        if self.smallest_std:
            std = jnp.sqrt(jnp.square(std) + self.smallest_std**2)
        return Posterior(mean + std * n, conditional=(mean, std))


class ReverseModel(nn.Module):
    """tau(noise|x, z) = N(mean, diag std^2): the noise that may have led a semi-implicit encoder to z (Sobolev & Vetrov 2019).

    It starts at N(0, I), as the noise is before z is known. Maps x [B, ...] and z [B, Z] to the mean and std [B, N].
    """

    trunk: nn.Module
    noise_dim: int
    widths: Sequence[int] = (256, 256)  # of the layers that join x's features and z
    activation: Callable[[Array], Array] = nn.silu

    @nn.compact
    def __call__(self, x: Array, z: Array, *, train: bool = False) -> tuple[Array, Array]:
        h = joined(self.trunk(x, None, train=train), {"of_z": (z, 1.0)}, self.widths, self.activation)
        heads = [nn.Dense(self.noise_dim, kernel_init=nn.initializers.zeros, name=name)(h) for name in ("mean", "log_std")]
        return heads[0], jnp.exp(heads[1])


class MomentEncoder(nn.Module):
    """An implicit q(z|x) that knows its moments: z = mean(x) + std(x) * v.

        v = sqrt(rho) n + sqrt(1 - rho) sum_i w_i(x) u_i(eps_i)

    Each u_i [Z] is a small network of noise eps_i of its own, standardised per latent, and sum_i w_i(x)^2 = 1 per latent, so
    that v has mean 0 and variance 1: the encoder z0(x) + sum_i a_i(x) v_i(eps_i) of adaptive contrast (Mescheder, Nowozin &
    Geiger 2017, the later version of the paper) with a_i = std * w_i. A share rho of the variance is plain Gaussian, n ~
    N(0, I): q can then not concentrate where no T resolves it.

    q starts as the Gaussian of its moments, but for 1% of each u_i's variance at most: u_i adds a network of all of eps_i to
    the first Z of its numbers. (From random linear maps of 16 numbers to 32 latents T first had to learn correlations that
    served nothing.) The w_i read the trunk's features
    but do not train them: the trunk serves the moments.

    The u_i are standardised by their moments over `STANDARD_DRAWS` draws of noise that are always the same: the moments then
    depend on params alone, not on what else is in the batch, when training as when evaluating.

    Maps x [B, ...] and noise [..., B, Z + bases * (Z + K)] to z [..., B, Z], for any K >= 0, and its moments [B, Z].

    Raises:
      UserError: noise of another size.
    """

    trunk: nn.Module
    latent_dim: int
    bases: int = 4
    widths: Sequence[int] = (64, 64)  # of the networks u_i
    gaussian_share: float = 0.5  # rho, in [0, 1]
    head_scale: float = 1.0  # as `GaussianEncoder`'s

    shares_x = True
    semi_implicit = property(lambda self: self.gaussian_share > 0)
    SHAPE = ("weights", "bases")  # params of v, which q's shape takes from, next to those of its moments

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        features = self.trunk(x, None, train=train)
        mean, std = gaussian_heads(features, self.latent_dim, self.head_scale)
        w = 1.0 + nn.Dense(self.bases * self.latent_dim, name="weights")(jax.lax.stop_gradient(features))
        w = w.reshape(-1, self.bases, self.latent_dim)
        w = w / jnp.linalg.norm(w, axis=1, keepdims=True)

        gaussian, eps = noise[..., : self.latent_dim], noise[..., self.latent_dim :]
        if eps.shape[-1] % self.bases or eps.shape[-1] < self.bases * self.latent_dim:
            least = self.latent_dim * (1 + self.bases)
            raise UserError(
                f"noise_dim={noise.shape[-1]}: MomentEncoder needs latent_dim={self.latent_dim} numbers, and as many or more, "
                f"equally many, for each of bases={self.bases}; set it to {least} plus a multiple of {self.bases}"
            )
        eps = eps.reshape(*eps.shape[:-1], self.bases, -1)
        bases = _Bases(self.latent_dim, self.widths, name="bases")
        standard = bases(jax.random.normal(jax.random.key(0), (STANDARD_DRAWS, *eps.shape[-2:])))
        u = (bases(eps) - standard.mean(axis=0)) / jnp.sqrt(standard.var(axis=0) + 1e-8)
        v = jnp.sum(w * u, axis=-2)
        smooth = math.sqrt(self.gaussian_share) * std
        center = mean + math.sqrt(1.0 - self.gaussian_share) * std * v
        conditional = (center, jnp.broadcast_to(smooth, center.shape)) if self.gaussian_share else None
        return Posterior(center + smooth * gaussian, mean, std, conditional=conditional)


class _Bases(nn.Module):
    """One small network per basis, [..., bases, Z + K] -> [..., bases, Z], with a linear path of the first Z numbers."""

    latent_dim: int
    widths: Sequence[int]

    @nn.compact
    def __call__(self, eps: Array) -> Array:
        def one(parent: nn.Module, eps: Array) -> Array:
            del parent
            h = MLP(self.widths, nn.tanh, name="hidden")(eps)
            linear = nn.Dense(self.latent_dim, kernel_init=identity, use_bias=False, name="linear")
            return linear(eps[..., : self.latent_dim]) + nn.Dense(self.latent_dim, kernel_init=scaled(0.01), name="out")(h)

        return nn.vmap(one, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=-2, out_axes=-2)(self, eps)


class Sampler(nn.Module):
    """An implicit q(z) that depends on no x and knows its moments: z = mean + std * (sqrt(1 - rho) u(eps) + sqrt(rho) n).

    u is a network of noise, with a linear path that starts it near N(0, I). A share rho of each latent's variance is at the
    start n's, N(0, I): q is smooth at that scale, so that a T can resolve it.

    The moments given are those over `STANDARD_DRAWS` draws of eps that are always the same. These do not enter z: u is not
    standardised by them, unlike the bases of `MomentEncoder`. It was, and its moments over them came apart from those over
    other draws: on the tests' Rosenbrock density z gave a standard deviation of 1.0 and had 1.7.

    `mean` and the log of `std` are `speed` times params: Adam moves each param by about its rate, and these may have a long
    way to go.

    Maps x [B, ...], of which B alone matters, and noise [..., B, 2 Z + K] (Z for n, Z + K for u, whose linear path sees the
    first Z of them) to z [..., B, Z], for any K >= 0, and its moments [B, Z].
    """

    latent_dim: int
    widths: Sequence[int] = (128, 128)
    gaussian_share: float = 0.05  # rho, in [0, 1]
    speed: float = 10.0

    shares_x = True
    semi_implicit = property(lambda self: self.gaussian_share > 0)

    @nn.compact
    def __call__(self, x: Array, noise: Array) -> Posterior:
        linear = nn.Dense(self.latent_dim, kernel_init=identity, name="linear")
        hidden, out = MLP(self.widths, nn.tanh, name="hidden"), nn.Dense(self.latent_dim, kernel_init=scaled(0.1), name="out")

        def network(eps: Array) -> Array:
            return linear(eps[..., : self.latent_dim]) + out(hidden(eps))

        params = (self.param(name, nn.initializers.zeros, (self.latent_dim,)) for name in ("mean", "log_std"))
        mean, log_std = (self.speed * param for param in params)
        std = jnp.exp(log_std)
        n, eps = noise[..., : self.latent_dim], noise[..., self.latent_dim :]
        of_u, of_n = math.sqrt(1.0 - self.gaussian_share), math.sqrt(self.gaussian_share)
        center = mean + std * of_u * network(eps)
        standard = of_u * network(jax.random.normal(jax.random.key(0), (STANDARD_DRAWS, eps.shape[-1])))
        moments = mean + std * standard.mean(axis=0), std * jnp.sqrt(standard.var(axis=0) + self.gaussian_share)
        moments = (jnp.broadcast_to(moment, (x.shape[0], self.latent_dim)) for moment in moments)
        conditional = (center, jnp.broadcast_to(std * of_n, center.shape)) if self.gaussian_share else None
        return Posterior(center + std * of_n * n, *moments, conditional=conditional)
