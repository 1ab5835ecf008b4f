"""Log-likelihood by importance sampling: a bound that does not depend on T."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation import proposal
from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.evaluation.examples import pareto_k, sum_up
from avb_jax.method import Method
from avb_jax.settings import check_counts
from avb_jax.types import Array, State


class ImportanceEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] log-mean weight, nats: a stochastic lower bound on log p(x) (Burda et al. 2016)
    standard_error: Array  # [N] of log_likelihood, nats; too small where the effective sample size is
    effective_sample_size: Array  # [N] in [1, samples]; near 1 the bound is loose
    pareto_k: Array  # [N] of the weights' tail; over 0.7 the standard error cannot be trusted


@dataclasses.dataclass(frozen=True)
class ImportanceSampling(Estimator):
    """Bounds log p(x) of each example from below with a proposal that comes of the encoder's draws.

    The bound holds whatever the proposal, and is tight where the proposal covers the posterior.

    Attributes:
      samples: importance samples per example.
      initial: 'encoder', 'prior' or 'semi_implicit', see `proposal.proposal`.
      fit_draws: draws that the proposal is fitted to.
      inflation: of the proposal's standard deviation, to cover the tails.

    Raises:
      UserError: a setting out of range.
    """

    samples: int = 256
    initial: str = "encoder"
    fit_draws: int = 64
    inflation: float = 1.2
    chunk: int = 20

    name: ClassVar[str] = "importance"
    requires: ClassVar[tuple[str, ...]] = ("log_joint",)

    def __post_init__(self):
        check_counts(samples=self.samples, chunk=self.chunk, images=self.images)
        proposal.check(self.initial, self.fit_draws, self.inflation)

    def lacks(self, method: Method) -> str:
        """As `Estimator`'s; an encoder too, where the proposal is fitted to it."""
        return super().lacks(method) or proposal.lacks(self.initial, method)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> ImportanceEstimate:
        """The estimate for one example."""
        fit_key, sample_key = jax.random.split(key)
        start = proposal.proposal(fit_key, state, method, x, self.initial, self.fit_draws, self.inflation)
        z = start.sample(sample_key, (self.samples,))
        log_joint = method.log_joint(state, jnp.broadcast_to(x, (self.samples, *x.shape)), z)
        log_weight = log_joint - start.log_prob(z)
        return ImportanceEstimate(*sum_up(log_weight), pareto_k(log_weight))

    def numbers(self, subject, found: ImportanceEstimate) -> dict[tuple[str, str], Number]:
        numbers = {
            ("log_likelihood", self.name): mean(found.log_likelihood, found.standard_error),
            ("effective_sample_size", self.name): mean(found.effective_sample_size),
        }
        if not np.isnan(found.pareto_k).all():  # as it is of few weights
            numbers["pareto_k", self.name] = mean(found.pareto_k)
        return numbers

    def describe(self, found: ImportanceEstimate) -> str:
        return so_far("log-likelihood", found.log_likelihood)
