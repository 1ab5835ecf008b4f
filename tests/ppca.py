"""Probabilistic PCA as a model of ours (Tipping & Bishop 1999): log p(x) and the posterior in closed form.

p(z) = N(0, I), p(x|z) = N(W z + b, sigma^2 I). The encoder is Gaussian with the posterior's mean, shifted, and the diagonal
of its covariance: about as good as a mean-field VAE gets, and not exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from avb_jax import Gaussian, Model, Players, Posterior, StandardNormal, State

PIXELS = 784


class Decoder(nn.Module):
    """Mean W z + b."""

    @nn.compact
    def __call__(self, z):
        w = self.param("w", nn.initializers.zeros, (PIXELS, z.shape[-1]))
        return (z @ w.T + self.param("b", nn.initializers.zeros, (PIXELS,)))[..., None]


class Encoder(nn.Module):
    """Mean A (x - b) + shift * std, standard deviation std."""

    dim: int
    shift: float = 0.2

    @nn.compact
    def __call__(self, x, noise):
        a = self.param("a", nn.initializers.zeros, (self.dim, x.shape[-1]))
        std = self.param("std", nn.initializers.ones, (self.dim,))
        mean = (x - self.param("b", nn.initializers.zeros, (x.shape[-1],))) @ a.T + self.shift * std
        std = jnp.broadcast_to(std, mean.shape)
        return Posterior(mean + std * noise, mean, std, gaussian=True)


class Case:
    """A model with its State, data drawn from it [N, 784], their posterior draws [N, Z], and log p(x) [N] in float64."""

    def __init__(self, dim: int, sigma: float = 0.3, scale: float = 0.1, count: int = 20):
        rng = np.random.default_rng(dim)
        w, b = scale * rng.standard_normal((PIXELS, dim)), 0.5 * rng.standard_normal(PIXELS)
        self.z = rng.standard_normal((count, dim))
        self.x = self.z @ w.T + b + sigma * rng.standard_normal((count, PIXELS))
        precision = np.eye(dim) + w.T @ w / sigma**2
        covariance = np.linalg.inv(precision)
        to_mean = covariance @ w.T / sigma**2
        residual = self.x - b
        # Woodbury: x' C^-1 x and |C| for C = W W' + sigma^2 I.
        projected = residual @ w / sigma**2
        square = np.sum(residual**2, axis=1) / sigma**2 - np.einsum("ni,ij,nj->n", projected, covariance, projected)
        log_determinant = np.linalg.slogdet(precision)[1] + PIXELS * np.log(sigma**2)
        self.log_likelihood = -0.5 * (square + log_determinant + PIXELS * np.log(2 * np.pi))
        self.mean_log_likelihood = -0.5 * (PIXELS + log_determinant + PIXELS * np.log(2 * np.pi))  # over the model's own data
        self.posterior_std = np.sqrt(np.diag(covariance))
        self.model = Model(Players(Encoder(dim), Decoder(), None), StandardNormal(dim), Gaussian(sigma), dim)
        params = Players(
            encoder={"a": to_mean, "std": self.posterior_std, "b": b}, decoder={"w": w, "b": b}, adversary=None
        )
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
        self.state = State(jnp.zeros((), jnp.int32), params, Players(), Players({}, {}, {}), None)
        self.x = self.x.astype(np.float32)
