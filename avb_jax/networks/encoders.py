"""Encoders: a trunk's features turned into a draw z ~ q(z|x)."""

import jax.numpy as jnp
from flax import linen as nn

from avb_jax.types import Array, Posterior


class BlackBoxEncoder(nn.Module):
    """z = enc(x, noise) [B, Z]: q(z|x) is whatever the network makes of the noise (Figure 1b)."""

    trunk: nn.Module
    latent_dim: int

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Array:
        return nn.Dense(self.latent_dim)(self.trunk(x, noise, train=train))


class GaussianEncoder(nn.Module):
    """q(z|x) = N(mean(x), diag std(x)^2), drawn as mean + std * noise (Kingma & Welling 2013; Figure 1a).

    The noise [B, Z] is not seen by the trunk, so that q is Gaussian.
    """

    trunk: nn.Module
    latent_dim: int

    @nn.compact
    def __call__(self, x: Array, noise: Array, *, train: bool = False) -> Posterior:
        features = self.trunk(x, None, train=train)
        mean = nn.Dense(self.latent_dim, name="mean")(features)
        std = jnp.exp(nn.Dense(self.latent_dim, name="log_std")(features))
        return Posterior(mean + std * noise, mean, std)
