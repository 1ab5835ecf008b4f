"""The posterior's moments per latent dimension, which dimensions a model uses, and draws for estimators that need several."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from avb_jax.distributions import kl_divergence, normal
from avb_jax.evaluation.estimator import Estimator, Number, mean
from avb_jax.method import Method, prior_at
from avb_jax.settings import check_counts
from avb_jax.types import Array, State

ACTIVE = 0.01  # variance of E[z_u|x] over x above which Burda et al. (2016) call the unit u active


class MomentEstimate(NamedTuple):
    """Of q(z|x) per example and latent dimension."""

    mean: Array  # [N, Z]
    variance: Array  # [N, Z]
    mean_error: Array  # [N, Z] sampling variance of `mean`; 0 where the encoder gives its moments


class PosteriorDraws(NamedTuple):
    """Of q(z|x) per example."""

    z: Array  # [N, draws, Z]
    kl: Array | None  # [N] KL(q(z|x), p(z)) in nats, exact, where the encoder says that q is Gaussian and it has a closed form


@dataclasses.dataclass(frozen=True)
class Moments(Estimator):
    """The moments of q(z|x), those that the encoder gives or else those of some draws, and how many latents are in use.

    Attributes:
      draws: posterior draws per example, at least 2.

    Raises:
      UserError: a setting out of range.
    """

    draws: int = 64

    name: ClassVar[str] = "moments"
    requires: ClassVar[tuple[str, ...]] = ("encode",)

    def __post_init__(self):
        check_counts(2, draws=self.draws)
        check_counts(chunk=self.chunk, images=self.images)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> MomentEstimate:
        """The moments of one example's posterior."""
        posterior = method.encode(key, state, x[None], self.draws)
        if posterior.mean is not None and posterior.std is not None:
            return MomentEstimate(posterior.mean[0], jnp.square(posterior.std[0]), jnp.zeros_like(posterior.mean[0]))
        z = posterior.z[:, 0]
        variance = z.var(axis=0, ddof=1)
        return MomentEstimate(z.mean(axis=0), variance, variance / self.draws)

    def numbers(self, subject, found: MomentEstimate) -> dict[tuple[str, str], Number]:
        numbers = {("posterior_variance", self.name): mean(found.variance.mean(axis=1))}
        if len(found.mean) < 2:
            subject.note("moments: active units are those that vary over examples, of which there is one; evaluate more")
            return numbers
        return {("active_units", self.name): Number(float(np.sum(activity(found) > ACTIVE)))} | numbers


@dataclasses.dataclass(frozen=True)
class Draws(Estimator):
    """Draws from q(z|x); `stream` names their randomness, so that draws for two purposes are independent."""

    draws: int = 1000
    stream: str = "draws"
    chunk: int = 4

    requires: ClassVar[tuple[str, ...]] = ("encode",)

    @property
    def name(self) -> str:
        """Of its random stream."""
        return self.stream

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> PosteriorDraws:
        """The draws for one example."""
        posterior = method.encode(key, state, x[None], self.draws)
        kl = None
        if posterior.gaussian and method.prior is not None:
            kl = kl_divergence(normal(posterior.mean[0], posterior.std[0]), prior_at(method, state))
        return PosteriorDraws(posterior.z[:, 0], kl)


def activity(moments: MomentEstimate) -> np.ndarray:
    """Variance over x of E[z_u|x] per latent [Z], cleared of the sampling error of the means; active above `ACTIVE`."""
    return np.var(moments.mean, axis=0, ddof=1) - np.mean(moments.mean_error, axis=0)
