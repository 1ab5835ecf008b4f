"""A look at held-out examples while a method trains: the ELBO under T beside a bound that does not use T."""

from typing import NamedTuple

import jax
import numpy as np

from avb_jax.evaluation import importance
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.players import Model
from avb_jax.types import Array, State

DRAWS = 4  # of z for the ELBO, per example
SAMPLES = 128  # of importance sampling, per example


class HeldOut(NamedTuple):
    """Means over the examples, nats."""

    elbo: float  # under T
    log_likelihood: float  # by importance sampling: a stochastic lower bound on log p(x)
    excess: float  # elbo - log_likelihood
    excess_error: float  # its standard error over the examples
    effective_sample_size: float  # of SAMPLES

    @property
    def parted(self) -> bool:
        """Whether the ELBO stands more than a nat, and three standard errors, above the bound.

        No ELBO exceeds log p(x): then T is too small at the encoder's z, or importance sampling is far from log p(x).
        """
        return self.excess > max(1.0, 3.0 * self.excess_error)


def compare(key: Array, state: State, images: np.ndarray, *, method, model: Model, binarize: str = "none") -> HeldOut:
    """The two numbers on a few examples; both see the same binary images.

    Args:
      key: the same one each time makes the numbers of two steps comparable.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      method: a module of `avb_jax.methods` with `elbo_terms`.
      model: the method's model, with a likelihood.
      binarize: see `data.dataset.to_pixels`.
    """
    terms = elbo_terms(key, state, images, method=method, model=model, binarize=binarize, draws=DRAWS, chunk=16)
    bound = importance.log_likelihood(key, state, images, model=model, binarize=binarize, samples=SAMPLES, chunk=2)
    terms, bound = jax.device_get((terms, bound))
    difference = terms.elbo - bound.log_likelihood
    error = np.std(difference, ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return HeldOut(
        float(terms.elbo.mean()), float(bound.log_likelihood.mean()), float(difference.mean()), float(error),
        float(bound.effective_sample_size.mean()),
    )  # fmt: skip
