"""The ELBO, by Monte Carlo over the posterior's draws."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.method import Method
from avb_jax.settings import check_counts
from avb_jax.types import Array, State


class ELBOEstimate(NamedTuple):
    """Per example, in nats."""

    reconstruction: Array  # [N] -log p(x|z)
    kl: Array  # [N] KL(q(z|x), p(z)): in closed form, from log q, or T's estimate of it
    standard_error: Array  # [N] of elbo, from the spread of the draws; not a number where there is one draw

    @property
    def elbo(self) -> Array:
        """The evidence lower bound [N]."""
        return -self.reconstruction - self.kl


def of_kl(method: Method) -> str:
    """Where a method's KL term comes from.

    'adversary': it is T's estimate, which is no bound and only as good as T; 'bound': it is on average too large, and the ELBO
    too low, as without a T where the encoder is semi-implicit or has auxiliary variables; 'density': the encoder knows its
    density.
    """
    return "adversary" if method.adversary is not None else "bound" if method.bounds_kl else "density"


@dataclasses.dataclass(frozen=True)
class ELBO(Estimator):
    """The ELBO and its two terms, averaged over posterior draws.

    Its quantities are under the name of where the KL term comes from, see `of_kl`.

    Attributes:
      draws: of z per example.

    Raises:
      UserError: no draws.
    """

    draws: int = 4
    chunk: int = 250

    name: ClassVar[str] = "elbo"
    requires: ClassVar[tuple[str, ...]] = ("elbo",)

    def __post_init__(self):
        check_counts(draws=self.draws, chunk=self.chunk, images=self.images)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> ELBOEstimate:
        """The ELBO's terms of one example."""
        terms = jax.vmap(lambda key: method.elbo(key, state, x[None]))(jax.random.split(key, self.draws))
        spread = jnp.std(terms.elbo, ddof=1) if self.draws > 1 else jnp.nan
        return ELBOEstimate(terms.reconstruction.mean(), terms.kl.mean(), spread / jnp.sqrt(self.draws))

    def numbers(self, subject, found: ELBOEstimate) -> dict[tuple[str, str], Number]:
        kind = of_kl(subject.method)
        if subject.method.adversary is not None:
            subject.note("the ELBO and its KL are T's: estimates that bound nothing")
        return {
            ("elbo", kind): mean(found.elbo, found.standard_error),
            ("reconstruction_error", kind): mean(found.reconstruction),
            ("kl", kind): mean(found.kl),
        }

    def describe(self, found: ELBOEstimate) -> str:
        return so_far("ELBO", found.elbo)
