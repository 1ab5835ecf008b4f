"""Kullback-Leibler divergence from samples alone, by k-nearest neighbours (Wang, Kulkarni & Verdu 2009)."""

import dataclasses
from typing import ClassVar

import numpy as np
import scipy
from numpyro.distributions import Distribution, ExpandedDistribution, Independent, Normal
from scipy.special import digamma

from avb_jax.evaluation import optimality
from avb_jax.evaluation.estimator import Estimator, Number, mean
from avb_jax.evaluation.moments import Draws
from avb_jax.method import prior_at
from avb_jax.settings import check_counts
from avb_jax.streams import stream
from avb_jax.types import Diverged, UserError

COINCIDENT = 0.25  # share of samples that may equal others, as rounding makes some; for k = 10 it costs a tenth of it in nats


def kl_divergence(a: np.ndarray, b: np.ndarray, k: int = 10) -> float:
    """Estimates KL(q, p) in nats from a [n, d] ~ q and b [m, d] ~ p; what the paper's Table 1 uses for q(z).

    (d / n) sum_i log(nu_k(i) / rho_k(i)) + log(m / (n - 1)), with rho_k(i) the distance of a_i to its k-th neighbour in
    a without itself, nu_k(i) to its k-th in b. A small k has little bias and more variance. The bias grows with the dimension
    and with the distance of q from p; `python -m benchmarks.knn` tabulates it.

    Raises:
      UserError: too few samples for k, unequal dimensions, or samples that a and b share; `Diverged`: samples that are not
        finite, or coincide k + 1 times, or in large part.
    """
    a, b = _finite("a", a), _finite("b", b)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"a, b: shapes {a.shape} and {b.shape}; give samples [n, d] and [m, d]")
    if k != int(k) or not 1 <= k < min(len(a), len(b) + 1):
        raise UserError(
            f"k={k}: needs a whole number, more than k samples from q (got {len(a)}) and at least k from p (got {len(b)})"
        )
    rho = scipy.spatial.cKDTree(a).query(a, k=[k + 1], workers=-1)[0][:, 0]
    nearest, nu = scipy.spatial.cKDTree(b).query(a, k=[1, k], workers=-1)[0].T
    if not rho.all():
        raise Diverged(f"a: some sample occurs more than {k} times, so that q has no density; raise k or check the encoder")
    for name, x in (("a", a), ("b", b)):
        again = len(x) - len(np.unique(x, axis=0))
        if again > COINCIDENT * len(x):
            raise Diverged(f"{name}: {again} of {len(x)} samples repeat others, so that they have no density; draw each anew")
    shared = int(np.sum(nearest == 0))
    if shared > COINCIDENT * len(a) or not nu.all():
        raise UserError(f"a, b: {shared} of a's {len(a)} samples are in b too; draw b independently of a")
    return float(a.shape[1] * np.mean(np.log(nu / rho)) + np.log(len(b) / (len(a) - 1)))


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise UserError(f"{name}: shape {x.shape}; give samples [n, d]")
    bad = int(np.sum(~np.all(np.abs(x) < 1e100, axis=1)))  # further out, squares overflow
    if bad:
        raise Diverged(f"{name}: {bad} of {len(x)} samples are not finite, or beyond 1e100; check what they are drawn from")
    return x


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
      UserError: as `kl_divergence`, or no more samples than twice the dimensions; `Diverged`: as there, or samples in a plane.
    """
    kind = np.asarray(a).dtype
    resolution = np.finfo(kind).eps if np.issubdtype(kind, np.floating) else 0.0
    a = _finite("a", a)
    if len(a) <= 2 * a.shape[1]:
        raise UserError(f"a: shape {a.shape}; give samples [n, d] with n more than twice d")
    count, dim = a.shape
    mean = a.mean(axis=0)
    try:
        factor = np.linalg.cholesky(np.cov(a, rowvar=False).reshape(dim, dim))
        flat = np.any(np.diag(factor) <= 32.0 * resolution * np.abs(a).max(axis=0))  # no wider than rounding makes a plane
    except np.linalg.LinAlgError:
        flat = True
    if flat:
        raise Diverged("a: the samples lie in a plane of fewer dimensions, so that q has no density")
    whitened = np.linalg.solve(factor, (a - mean).T).T
    # A sample covariance's log determinant is low on average, by a Wishart's; |mean|^2 is high by trace / n.
    shrinkage = np.sum(digamma((count - np.arange(1, dim + 1)) / 2.0)) + dim * np.log(2.0 / (count - 1))
    log_determinant = 2.0 * np.sum(np.log(np.diag(factor))) - shrinkage
    trace = np.sum(np.square(factor))
    gaussian = 0.5 * (trace * (1.0 - 1.0 / count) + mean @ mean - dim - log_determinant)
    # g's draws are whitened by their own moments as q's were, or else the difference would count.
    draws = np.random.default_rng([seed, 1]).standard_normal((count, dim))  # not those that `default_rng(seed)` gives anyone
    draws = np.linalg.solve(np.linalg.cholesky(np.cov(draws, rowvar=False).reshape(dim, dim)), (draws - draws.mean(axis=0)).T).T
    return float(gaussian + kl_divergence(whitened, draws, k))


def is_standard_normal(prior: Distribution) -> bool:
    """Whether a prior is N(0, I), as NumPyro writes it."""
    while isinstance(prior, Independent | ExpandedDistribution):
        prior = prior.base_dist
    return isinstance(prior, Normal) and bool(np.all(prior.loc == 0) and np.all(prior.scale == 1))


@dataclasses.dataclass(frozen=True)
class KNN(Estimator):
    """The KL divergences behind the ELBO from draws alone, and I(x; z), which is their difference.

    KL(q(z|x), p(z)) of `images` examples, and KL(q(z), p(z)) of the aggregated posterior: the latter by two samples, as in the
    paper's Table 1 ('knn'), and where the prior is N(0, I) about a Gaussian of q's moments too ('knn_gaussian', see
    `kl_to_standard_normal`), as the former is.

    Attributes:
      images: of which q(z|x) is drawn from; with 0, KL(q(z), p(z)) is all.
      draws: from each of them.
      codes: from q(z) in all, spread over all examples.
      neighbours: k.

    Raises:
      UserError: a setting out of range.
    """

    images: int | None = 64
    draws: int = 1000
    codes: int = 10_000
    neighbours: int = 10
    chunk: int = 4

    name: ClassVar[str] = "knn"
    requires: ClassVar[tuple[str, ...]] = ("encode", "prior")

    def __post_init__(self):
        check_counts(draws=self.draws, codes=self.codes, neighbours=self.neighbours, chunk=self.chunk)
        check_counts(0, images=self.images)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        prior, k = prior_at(subject.method, subject.state), self.neighbours
        per_image = -(-self.codes // len(subject.examples))
        chunk = max(1, self.chunk * self.draws // per_image)
        codes = subject.on_examples(Draws(draws=per_image, stream="codes", chunk=chunk)).z
        codes = codes.reshape(-1, codes.shape[-1])
        drawn = np.asarray(prior.sample(stream(subject.key, "prior"), (len(codes),)))
        numbers = {("kl_aggregated_posterior", "knn"): Number(kl_divergence(codes, drawn, k))}
        if not is_standard_normal(prior):
            subject.note("knn: KL(q(z|x), p(z)) and I(x; z) by neighbours about a Gaussian need the prior N(0, I)")
            return numbers
        aggregated = kl_to_standard_normal(codes, k)
        numbers["kl_aggregated_posterior", "knn_gaussian"] = Number(aggregated)
        if self.images == 0:
            return numbers
        posterior = subject.on_examples(Draws(draws=self.draws, stream="posterior", chunk=self.chunk, images=self.images))
        kl = np.array([kl_to_standard_normal(z, k) for z in posterior.z])
        of_x = kl if posterior.kl is None else np.asarray(posterior.kl)
        if subject.method.adversary is not None and subject.method.elbo is not None:
            terms = subject.on_examples(
                optimality.AdversaryEstimator(draws=self.draws, images=self.images, chunk=self.chunk, kept="calibration")
            )
            subject.results["kl_by_both"] = kl, terms.kl
        return numbers | {
            ("kl", "knn"): mean(kl),
            ("mutual_information", "knn"): mean(of_x - aggregated),
        }
