"""Encoders whose density is known: next to the draw z ~ q(z|x), they tell log q(z|x) there.

Each maps x [B, ...] and noise [..., B, N] to a `Posterior`: z [..., B, Z] and log_q [..., B] in nats, with the mean and std
[B, Z] of q(z|x) where they have a closed form. The trunk sees x alone, once, however many draws there are.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from avb_jax.networks.encoders import gaussian_heads, scaled
from avb_jax.types import Array, Posterior, UserError

GATE_BIAS = 2.0  # of IAF's gates, which start at sigmoid(2) = 0.88 (Kingma et al. 2016: 1 to 2)


class FullCovarianceEncoder(nn.Module):
    """q(z|x) = N(mean(x), L(x) L(x)^T) with L lower triangular and its diagonal positive (Kingma & Welling 2019).

        z = mean + L noise,    log q(z|x) = log N(noise; 0, I) - sum_i log L_ii

    L starts diagonal, so that q starts as `GaussianEncoder`'s. The std given is each latent's own, sqrt(diag(L L^T)).

    Maps x [B, ...] and noise [..., B, Z] to z [..., B, Z], mean and std [B, Z], log_q [..., B] in nats.

    Raises:
        UserError: noise of other than Z dimensions.
    """

    trunk: nn.Module
    latent_dim: int
    head_scale: float = 1.0  # as `GaussianEncoder`'s

    shares_x = True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        _check_noise(self, noise)
        features = self.trunk(x, None, train=train)
        mean, diagonal = gaussian_heads(features, self.latent_dim, self.head_scale)
        cholesky = jax.vmap(jnp.diag)(diagonal)
        if self.latent_dim > 1:
            rows, columns = np.tril_indices(self.latent_dim, -1)
            below = nn.Dense(len(rows), kernel_init=nn.initializers.zeros, name="below_diagonal")(features)
            cholesky = cholesky.at[:, rows, columns].set(below)
        z = mean + jnp.einsum("bij,...bj->...bi", cholesky, noise)
        return Posterior(z, mean, jnp.linalg.norm(cholesky, axis=-1), log_normal(noise, diagonal))


class PlanarFlowEncoder(nn.Module):
    """A Gaussian pushed through planar maps whose parameters depend on x (Rezende & Mohamed 2015).

        z_0 ~ N(mean(x), diag std(x)^2),    z_k = z_{k-1} + u^ tanh(w.z_{k-1} + b),    u^ = u + (m(w.u) - w.u) w / |w|^2
        log q(z|x) = log q(z_0|x) - sum_k log(1 + (1 - tanh(w.z_{k-1} + b)^2) w.u^)

    m(a) > -1 keeps every map invertible (appendix A.1). It is softplus(a + log(e - 1)) - 1 here, which reaches the same maps
    as the paper's softplus(a) - 1 but has m(0) = 0: u = 0 is then the identity, where the flow starts, and u^ stays bounded
    as w goes to 0.

    Maps x [B, ...] and noise [..., B, Z] to z [..., B, Z] and log_q [..., B] in nats; the moments are not known.

    Raises:
        UserError: noise of other than Z dimensions.
    """

    trunk: nn.Module
    latent_dim: int
    flows: int = 8
    head_scale: float = 1.0  # as `GaussianEncoder`'s

    shares_x = True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        features = self.trunk(x, None, train=train)
        z, log_q = _gaussian_base(self, features, noise)
        count = self.flows * self.latent_dim
        u = nn.Dense(count, kernel_init=nn.initializers.zeros, name="u")(features)
        u, w = (v.reshape(-1, self.flows, self.latent_dim) for v in (u, nn.Dense(count, name="w")(features)))
        b = nn.Dense(self.flows, name="b")(features)

        inner = jnp.sum(w * u, axis=-1, keepdims=True)
        above = jax.nn.softplus(inner + math.log(math.e - 1.0))  # 1 + m, which is 1 + w.u^
        # The constant guards w = 0; whatever w, it changes w.u^ by less than 1e-6 |u|.
        u = u + (above - 1.0 - inner) * w / (jnp.sum(jnp.square(w), axis=-1, keepdims=True) + 1e-12)
        for k in range(self.flows):
            h = jnp.tanh(jnp.sum(w[:, k] * z, axis=-1) + b[:, k])
            z = z + u[:, k] * h[..., None]
            # 1 + (1 - h^2) m, written so that it stays positive in floating point.
            log_q = log_q - jnp.log(jnp.square(h) + (1.0 - jnp.square(h)) * above[:, k, 0])
        return Posterior(z, log_q=log_q)


class IAFEncoder(nn.Module):
    """A Gaussian pushed through inverse autoregressive steps (Kingma et al. 2016).

        z_0 ~ N(mean(x), diag std(x)^2),    z_k = g * z_{k-1} + (1 - g) * m,    g = sigmoid(s)
        log q(z|x) = log q(z_0|x) - sum_k sum_i log g_i

    m and s of latent i are functions of x and of the latents before i in z_{k-1}, by a masked network (MADE, Germain et al.
    2015) with x's features as its context; every other step takes the latents in reversed order. The gates start at 0.88 and
    m at 0: q starts Gaussian, its mean and std 0.88^flows times those of the heads.

    Maps x [B, ...] and noise [..., B, Z] to z [..., B, Z] and log_q [..., B] in nats; the moments are not known.

    Raises:
        UserError: noise of other than Z dimensions.
    """

    trunk: nn.Module
    latent_dim: int
    flows: int = 4
    widths: Sequence[int] = (64, 64)
    head_scale: float = 1.0  # as `GaussianEncoder`'s

    shares_x = True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        features = self.trunk(x, None, train=train)
        z, log_q = _gaussian_base(self, features, noise)
        order = tuple(range(self.latent_dim))
        for k in range(self.flows):
            made = _Conditional(2 * self.latent_dim, self.widths, order=order[:: (-1) ** k], name=f"made_{k}")
            m, s = jnp.split(made(z, features), 2, axis=-1)
            gate = jax.nn.sigmoid(s + GATE_BIAS)
            z = gate * z + (1.0 - gate) * m
            log_q = log_q - jnp.sum(jax.nn.log_sigmoid(s + GATE_BIAS), axis=-1)
        return Posterior(z, log_q=log_q)


class RealNVPEncoder(nn.Module):
    """A Gaussian pushed through affine coupling layers (Dinh et al. 2017).

        z_0 ~ N(mean(x), diag std(x)^2),    changed <- changed * exp(s) + t,    s = c * tanh(s'),    (s', t) = net(kept, x)
        log q(z|x) = log q(z_0|x) - sum over layers and changed latents of s

    One half of the latents is kept and the other changed, by turns; c is learned, one per changed latent. Every layer starts
    as the identity.

    Maps x [B, ...] and noise [..., B, Z] to z [..., B, Z] and log_q [..., B] in nats; the moments are not known.

    Raises:
        UserError: latent_dim below 2; noise of other than Z dimensions.
    """

    trunk: nn.Module
    latent_dim: int
    flows: int = 4
    widths: Sequence[int] = (64, 64)
    head_scale: float = 1.0  # as `GaussianEncoder`'s

    shares_x = True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        if self.latent_dim < 2:
            raise UserError(f"latent_dim={self.latent_dim}: RealNVPEncoder couples two halves; use 2 or more, or IAFEncoder")
        features = self.trunk(x, None, train=train)
        z, log_q = _gaussian_base(self, features, noise)
        first, second = jnp.split(z, [self.latent_dim // 2], axis=-1)
        for k in range(self.flows):
            kept, changed = (first, second) if k % 2 == 0 else (second, first)
            size = changed.shape[-1]
            s, t = jnp.split(_Conditional(2 * size, self.widths, name=f"coupling_{k}")(kept, features), 2, axis=-1)
            s = self.param(f"scale_{k}", nn.initializers.ones, (size,)) * jnp.tanh(s)
            changed = changed * jnp.exp(s) + t
            log_q = log_q - jnp.sum(s, axis=-1)
            first, second = (kept, changed) if k % 2 == 0 else (changed, kept)
        return Posterior(jnp.concatenate([first, second], axis=-1), log_q=log_q)


class AuxiliaryEncoder(nn.Module):
    """A Gaussian mixed over auxiliary variables a, q(z|x) = E_q(a|x)[q(z|a,x)] (Maaloe et al. 2016).

        log_q = log q(a|x) + log q(z|a,x) - log r(a|z,x)

    q(a|x), q(z|a,x) and r(a|z,x) are Gaussians with diagonal covariance. Averaged over a given z, log_q is log q(z|x) +
    KL(q(a|z,x), r(a|z,x)), at least log q(z|x): the ELBO with log_q in its place is still a lower bound, the tighter the
    closer r is to q(a|z,x). The encoder's params include r's: maximising that ELBO trains both.

    Maps x [B, ...] and noise [..., B, Z + A], for any A >= 1, to z [..., B, Z] and log_q [..., B] in nats; the moments are
    not known.

    Raises:
        UserError: noise of no more than Z dimensions.
    """

    trunk: nn.Module
    latent_dim: int
    widths: Sequence[int] = (64, 64)  # of the networks of q(z|a,x) and r(a|z,x)
    head_scale: float = 1.0  # as `GaussianEncoder`'s, for all three Gaussians

    shares_x, bounds_log_q = True, True

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        extra = noise.shape[-1] - self.latent_dim
        if extra < 1:
            raise UserError(
                f"noise_dim={noise.shape[-1]}: AuxiliaryEncoder needs latent_dim={self.latent_dim} plus 1 or more; raise it"
            )

        def gaussian(name: str, size: int, v: Array) -> tuple[Array, Array]:
            net = _Conditional(2 * size, self.widths, self.head_scale, name=name)
            mean, log_std = jnp.split(net(v, features), 2, axis=-1)
            return mean, jnp.exp(log_std)

        features = self.trunk(x, None, train=train)
        eps_z, eps_a = noise[..., : self.latent_dim], noise[..., self.latent_dim :]
        a_mean, a_std = gaussian_heads(features, extra, self.head_scale)
        a = a_mean + a_std * eps_a
        z_mean, z_std = gaussian("z_given_a", self.latent_dim, a)
        z = z_mean + z_std * eps_z
        r_mean, r_std = gaussian("a_given_z", extra, z)
        log_q = log_normal(eps_a, a_std) + log_normal(eps_z, z_std) - log_normal((a - r_mean) / r_std, r_std)
        return Posterior(z, log_q=log_q)


class _Conditional(nn.Module):
    """An MLP of (v [..., B, I], x's features [B, F]) to [..., B, out], every layer of which gets the features.

    With `order`, a permutation of range(I), it is a MADE: of the outputs, read as repetitions of I numbers, those at i depend
    only on the inputs j with order[j] < order[i]. A unit of degree d sees the inputs j with order[j] < d.
    """

    out: int
    widths: Sequence[int]
    scale: float = 0.0  # of the last layer's kernels, as `head_scale`; at 0 it starts at 0
    order: Sequence[int] | None = None

    @nn.compact
    def __call__(self, v: Array, features: Array) -> Array:
        h, degrees = v, None if self.order is None else np.array(self.order) + 1
        for i, width in enumerate((*self.widths, self.out)):
            last = i == len(self.widths)
            init = scaled(self.scale if last else 1.0)
            kernel = self.param(f"kernel_{i}", init, (h.shape[-1], width))
            if degrees is not None:
                # From 0, which gets x alone, to I - 1, which gets all inputs but the last.
                above = np.resize(self.order, width) if last else np.linspace(0, len(self.order) - 1, width).round()
                kernel, degrees = kernel * (degrees[:, None] <= above), above
            h = h @ kernel + nn.Dense(width, kernel_init=init, name=f"features_{i}")(features)
            h = h if last else nn.tanh(h)
        return h


def _gaussian_base(encoder: nn.Module, features: Array, noise: Array) -> tuple[Array, Array]:
    """Where a flow starts: z_0 [..., B, Z] ~ N(mean(x), diag std(x)^2) and its log density [..., B]."""
    _check_noise(encoder, noise)
    mean, std = gaussian_heads(features, encoder.latent_dim, encoder.head_scale)
    return mean + std * noise, log_normal(noise, std)


def log_normal(standardised: Array, std: Array) -> Array:
    """Log density [..., B] in nats of independent normals, at (value - mean) / std [..., B, Z]."""
    return -jnp.sum(0.5 * (jnp.square(standardised) + math.log(2.0 * math.pi)) + jnp.log(std), axis=-1)


def _check_noise(encoder: nn.Module, noise: Array) -> None:
    """A single dimension of noise would broadcast, and the density given would be that of nothing."""
    if noise.shape[-1] != encoder.latent_dim:
        name = type(encoder).__name__
        raise UserError(f"noise_dim={noise.shape[-1]}: {name} needs as many as latents; set it to {encoder.latent_dim}")
