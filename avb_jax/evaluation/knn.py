"""Kullback-Leibler divergence from samples alone, by k-nearest neighbours (Wang, Kulkarni & Verdu 2009)."""

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import digamma

from avb_jax.types import Diverged, UserError


def kl_divergence(a: np.ndarray, b: np.ndarray, k: int = 10) -> float:
    """Estimates KL(q, p) in nats from a [n, d] ~ q and b [m, d] ~ p; what the paper's Table 1 uses for q(z).

    (d / n) sum_i log(nu_k(i) / rho_k(i)) + log(m / (n - 1)), with rho_k(i) the distance of a_i to its k-th neighbour in
    a without itself, nu_k(i) to its k-th in b. A small k has little bias and more variance. The bias grows with the dimension
    and with the distance of q from p; `python -m benchmarks.knn` tabulates it.

    Raises:
      UserError: too few samples for k, unequal dimensions, or samples of q that are among those of p; `Diverged`: samples
        that are not finite, or coincide k + 1 times.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"a, b: shapes {a.shape} and {b.shape}; give samples [n, d] and [m, d]")
    if not 1 <= k < min(len(a), len(b) + 1):
        raise UserError(f"k={k}: needs more than k samples from q (got {len(a)}) and at least k from p (got {len(b)})")
    for name, samples in (("a", a), ("b", b)):
        if not np.isfinite(samples).all():
            raise Diverged(f"{name}: {np.sum(~np.isfinite(samples).all(axis=1))} of {len(samples)} samples are not finite")
    rho = cKDTree(a).query(a, k=[k + 1], workers=-1)[0][:, 0]
    nearest, nu = cKDTree(b).query(a, k=[1, k], workers=-1)[0].T
    if not rho.all():
        raise Diverged(f"a: some sample occurs more than {k} times, so that q has no density; raise k or check the encoder")
    # In one dimension a few independent samples of 32 bits are equal, too.
    if not nu.all() or np.mean(nearest == 0) > 0.1:
        raise UserError(f"a, b: {np.sum(nearest == 0)} samples of a are in b; draw the two independently of each other")
    return float(a.shape[1] * np.mean(np.log(nu / rho)) + np.log(len(b) / (len(a) - 1)))


def kl_to_standard_normal(a: np.ndarray, k: int = 10, seed: int = 0) -> float:
    """Estimates KL(q, N(0, I)) in nats from a [n, d] ~ q alone, however far q is from N(0, I).

    With g the Gaussian of q's mean and covariance, KL(q, p) = KL(q, g) + KL(g, p) exactly, because log g - log p is quadratic.
    The second term is a closed form and holds most of the distance; the first is left to the neighbours, who are good at
    what is near: draws of q against as many of g, both whitened.

    Args:
      a: [n, d] samples.
      k: of the neighbours.
      seed: of the draws from g.

    Raises:
      UserError: as `kl_divergence`, or no more samples than twice the dimensions; `Diverged`: samples in a plane.
    """
    a = np.asarray(a, np.float64)
    if a.ndim != 2 or len(a) <= 2 * a.shape[1]:
        raise UserError(f"a: shape {a.shape}; give samples [n, d] with n more than twice d")
    count, dim = a.shape
    mean = a.mean(axis=0)
    try:
        factor = np.linalg.cholesky(np.cov(a, rowvar=False).reshape(dim, dim))
    except np.linalg.LinAlgError:
        raise Diverged("a: the samples lie in a plane of fewer dimensions, so that q has no density") from None
    whitened = np.linalg.solve(factor, (a - mean).T).T
    # A sample covariance's log determinant is low on average, by a Wishart's; |mean|^2 is high by trace / n.
    shrinkage = np.sum(digamma((count - np.arange(1, dim + 1)) / 2.0)) + dim * np.log(2.0 / (count - 1))
    log_determinant = 2.0 * np.sum(np.log(np.diag(factor))) - shrinkage
    trace = np.sum(np.square(factor))
    gaussian = 0.5 * (trace * (1.0 - 1.0 / count) + mean @ mean - dim - log_determinant)
    # g's draws are whitened by their own moments as q's were, or else the difference would count.
    draws = np.random.default_rng(seed).standard_normal((count, dim))
    draws = np.linalg.solve(np.linalg.cholesky(np.cov(draws, rowvar=False).reshape(dim, dim)), (draws - draws.mean(axis=0)).T).T
    return float(gaussian + kl_divergence(whitened, draws, k))
