"""Probabilistic PCA as a `Method` (Tipping & Bishop 1999): log p(x) and the posterior in closed form.

p(z) = N(0, I), p(x|z) = N(W z + b, sigma^2 I). The encoder is Gaussian with the posterior's mean, shifted, and the diagonal
of its covariance: about as good as a mean-field VAE gets, and not exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import Method, Posterior, State, Terms
from avb_jax.distributions import kl_divergence, normal, standard_normal

PIXELS = 784
SHIFT = 0.2  # of the encoder's mean, in its standard deviations


def method(dim: int, sigma: float, moments: bool = True) -> Method:
    """The model, for a State with params a, b, std and w; without `moments` its encoder is a black box with the same draws."""
    prior = standard_normal(dim)

    def encode(key, state, x, draws=None):
        p, shape = state.params, (len(x), dim) if draws is None else (draws, len(x), dim)
        mean = (x - p["b"]) @ p["a"].T + SHIFT * p["std"]
        std = jnp.broadcast_to(p["std"], mean.shape)
        z = mean + std * jax.random.normal(key, shape)
        return Posterior(z, mean, std, gaussian=True) if moments else Posterior(z)

    def decode(state, z):
        return normal(z @ state.params["w"].T + state.params["b"], sigma)

    def log_joint(state, x, z):
        return decode(state, z).log_prob(x) + prior.log_prob(z)

    def elbo(key, state, x):
        posterior = encode(key, state, x)
        return Terms(-decode(state, posterior.z).log_prob(x), kl_divergence(normal(posterior.mean, posterior.std), prior))

    def sample(key, state, count):
        return decode(state, prior.sample(key, (count,))).mean

    return Method("vae", None, None, sample, prior, encode, decode, log_joint, elbo)


class Case:
    """The model with its State, data drawn from it [N, 784], their posterior draws [N, Z], and log p(x) [N] in float64."""

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
        self.method = method(dim, sigma)
        self.black_box = method(dim, sigma, moments=False)
        params = {"a": to_mean, "std": self.posterior_std, "b": b, "w": w}
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
        self.state = State(jnp.zeros((), jnp.int32), params, None, None)
        self.x = self.x.astype(np.float32)
