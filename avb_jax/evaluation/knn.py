"""Kullback-Leibler divergence from samples alone, by k-nearest neighbours (Wang, Kulkarni & Verdu 2009)."""

import numpy as np
from scipy.spatial import cKDTree

from avb_jax.types import UserError


def kl_divergence(a: np.ndarray, b: np.ndarray, k: int = 10) -> float:
    """Estimates KL(q, p) in nats from a [n, d] ~ q and b [m, d] ~ p; what the paper's Table 1 uses for q(z).

    (d / n) sum_i log(nu_k(i) / rho_k(i)) + log(m / (n - 1)), with rho_k(i) the distance of a_i to its k-th neighbour in
    a without itself, nu_k(i) to its k-th in b. A small k has little bias and more variance.

    Raises:
      UserError: too few samples for k, unequal dimensions, or samples that coincide k + 1 times.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"a, b: shapes {a.shape} and {b.shape}; give samples [n, d] and [m, d]")
    if not 1 <= k < min(len(a), len(b) + 1):
        raise UserError(f"k={k}: needs more than k samples from q (got {len(a)}) and at least k from p (got {len(b)})")
    rho = cKDTree(a).query(a, k=[k + 1], workers=-1)[0][:, 0]
    nu = cKDTree(b).query(a, k=[k], workers=-1)[0][:, 0]
    if not rho.all():
        raise UserError(f"a: some sample occurs more than {k} times, so that q has no density; raise k or check the encoder")
    return float(a.shape[1] * np.mean(np.log(nu / rho)) + np.log(len(b) / (len(a) - 1)))
