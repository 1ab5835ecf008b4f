"""Priors p(z) whose params are learned (`avb_jax.priors.Learned`): a flow, or a mixture of the encoder's own posteriors."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax.networks.mlp import MLP
from avb_jax.networks.posteriors import log_normal
from avb_jax.types import Array, Posterior, UserError

Encode = Callable[[Array], Posterior]  # x [K, ...] -> what the encoder knows of q(.|x)


class FlowPrior(nn.Module):
    """N(0, I) pushed through affine couplings of one half of z and the other by turns (Dinh et al. 2016); it starts as N(0, I).

    Raises:
      UserError: fewer than 2 latents.
    """

    latent_dim: int
    flows: int = 4
    widths: Sequence[int] = (64, 64)

    def setup(self):
        if self.latent_dim < 2:
            raise UserError(f"latent_dim={self.latent_dim}: a flow prior couples two halves; use 2 or more")
        half = self.latent_dim // 2
        sizes = [(self.latent_dim - half) if k % 2 == 0 else half for k in range(self.flows)]  # of what changes
        self.hidden = [MLP(self.widths, nn.tanh) for _ in sizes]
        self.heads = [nn.Dense(2 * size, kernel_init=nn.initializers.zeros) for size in sizes]
        self.scales = [self.param(f"scale_{k}", nn.initializers.ones, (size,)) for k, size in enumerate(sizes)]

    def log_prob(self, z: Array, encode: Encode | None = None) -> Array:
        """Log p(z) [...], nats: back through the couplings."""
        del encode
        first, second = jnp.split(z, [self.latent_dim // 2], axis=-1)
        log_det = jnp.zeros(z.shape[:-1])
        for k in reversed(range(self.flows)):
            kept, changed = (first, second) if k % 2 == 0 else (second, first)
            s, t = self._coupling(k, kept)
            changed = (changed - t) * jnp.exp(-s)
            log_det -= jnp.sum(s, axis=-1)
            first, second = (kept, changed) if k % 2 == 0 else (changed, kept)
        return log_normal(jnp.concatenate([first, second], axis=-1), jnp.ones(self.latent_dim)) + log_det

    def draw(self, key: Array, count: int, encode: Encode | None = None) -> Array:
        """Draws z [count, Z]."""
        del encode
        first, second = jnp.split(jax.random.normal(key, (count, self.latent_dim)), [self.latent_dim // 2], axis=-1)
        for k in range(self.flows):
            kept, changed = (first, second) if k % 2 == 0 else (second, first)
            s, t = self._coupling(k, kept)
            changed = changed * jnp.exp(s) + t
            first, second = (kept, changed) if k % 2 == 0 else (changed, kept)
        return jnp.concatenate([first, second], axis=-1)

    def _coupling(self, k: int, kept: Array) -> tuple[Array, Array]:
        s, t = jnp.split(self.heads[k](self.hidden[k](kept)), 2, axis=-1)
        return self.scales[k] * jnp.tanh(s), t


class VampPrior(nn.Module):
    """VampPrior (Tomczak & Welling 2018): a mixture of q(z|u_k) at inputs u_k [K, *x] in [0, 1] that are learned.

    Of Gaussian encoders, whose noise has z's dimensions; gradients flow into the encoder as well.

    Raises:
      UserError: the encoder gives no moments, or is not Gaussian.
    """

    latent_dim: int
    x_shape: Sequence[int]
    components: int = 100

    def setup(self):
        self.logits = self.param("inputs", nn.initializers.normal(1.0), (self.components, *self.x_shape))

    def log_prob(self, z: Array, encode: Encode) -> Array:
        """Log p(z) [...], nats."""
        mean, std = self._moments(encode)
        of_each = log_normal((z[..., None, :] - mean) / std, std)
        return jax.nn.logsumexp(of_each, axis=-1) - math.log(self.components)

    def draw(self, key: Array, count: int, encode: Encode) -> Array:
        """Draws z [count, Z]."""
        which_key, noise_key = jax.random.split(key)
        mean, std = self._moments(encode)
        which = jax.random.randint(which_key, (count,), 0, self.components)
        return mean[which] + std[which] * jax.random.normal(noise_key, (count, self.latent_dim))

    def _moments(self, encode: Encode) -> tuple[Array, Array]:
        if self.is_initializing():
            return jnp.zeros((self.components, self.latent_dim)), jnp.ones((self.components, self.latent_dim))
        posterior = encode(nn.sigmoid(self.logits))
        if not posterior.gaussian:
            raise UserError(
                "prior: a Vamp prior needs an encoder that gives q's moments and is Gaussian, such as networks.GaussianEncoder"
            )
        return posterior.mean, posterior.std
