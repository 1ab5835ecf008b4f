"""Log p(x) of models that know it: no latents, nothing to integrate."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.method import Method
from avb_jax.settings import check_counts
from avb_jax.types import Array, State


class ExactEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] nats; under a density of dequantised x a lower bound, on average
    standard_error: Array  # [N] of dequantisation; 0 without it, not a number of a single draw


@dataclasses.dataclass(frozen=True)
class Exact(Estimator):
    """The log-likelihood of `avb_jax.explicit`'s models.

    Attributes:
      draws: of the noise of dequantisation, where there is any.

    Raises:
      UserError: a count below 1.
    """

    draws: int = 1
    chunk: int = 20

    name: ClassVar[str] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("log_likelihood",)

    def __post_init__(self):
        check_counts(draws=self.draws, chunk=self.chunk, images=self.images)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> ExactEstimate:
        """The estimate for one example."""
        found = method.log_likelihood(key, state, jnp.broadcast_to(x, (self.draws, *x.shape)))
        spread = jnp.std(found, ddof=1) if self.draws > 1 else jnp.nan
        return ExactEstimate(found.mean(), spread / jnp.sqrt(self.draws))

    def numbers(self, subject, found: ExactEstimate) -> dict[tuple[str, str], Number]:
        return {("log_likelihood", self.name): mean(found.log_likelihood, found.standard_error)}

    def describe(self, found: ExactEstimate) -> str:
        return so_far("log-likelihood", found.log_likelihood)
