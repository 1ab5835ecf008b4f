"""Densities q(z|x) = E_u N(z; mean(x, u), diag std(x, u)^2) between two bounds (Yin & Zhou 2018; Molchanov et al. 2019).

With z drawn at noise u_0 and u_1 .. u_K independent of it,

    E log (1 / (K + 1)) sum_{k=0..K} q(z|x, u_k)  >=  E log q(z|x)  >=  E log (1 / K) sum_{k=1..K} q(z|x, u_k),

the first by Jensen's inequality over which of the K + 1 was z's own, the second over u_1 .. u_K. Both close as K grows.
"""

from avb_jax.distributions import normal
from avb_jax.importance import log_mean
from avb_jax.types import Array


def log_conditional(z: Array, conditional: tuple[Array, Array]) -> Array:
    """Log q(z|x, u) [S, D, B] of draws z [S, B, Z] at D values of u, whose moments are [D, B, Z] each; nats."""
    mean, std = conditional
    return normal(mean, std).log_prob(z[:, None])


def smoothed(conditional: tuple[Array, Array], noise: Array) -> Array:
    """A draw z [B, Z] given the first of the u whose moments are [S, B, Z], by the first Z numbers of noise[1] [S, B, N]."""
    mean, std = conditional
    return mean[0] + std[0] * noise[1, :, : mean.shape[-1]]


def upper_log_density(z: Array, conditional: tuple[Array, Array]) -> Array:
    """On average at least log q(z|x) [S, B], for z [S, B, Z] drawn at the first S of the D values of u with these moments."""
    return log_mean(log_conditional(z, conditional), axis=1)
