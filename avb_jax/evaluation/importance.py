"""Log-likelihood by importance sampling: a number that takes nobody's word for the KL."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from avb_jax.evaluation.examples import map_examples, sum_up
from avb_jax.evaluation.proposal import proposal
from avb_jax.players import Model, log_joint
from avb_jax.types import Array, State


class ImportanceEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] log-mean weight, nats: a stochastic lower bound on log p(x) (Burda et al. 2016)
    standard_error: Array  # [N] of log_likelihood, nats; too small where the effective sample size is
    effective_sample_size: Array  # [N] in [1, samples]; near 1 the bound is loose


@functools.partial(
    jax.jit, static_argnames=("model", "binarize", "samples", "initial", "fit_draws", "inflation", "chunk")
)
def log_likelihood(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", samples: int = 256, initial: str = "encoder", fit_draws: int = 64, inflation: float = 1.2,
    chunk: int = 20,
) -> ImportanceEstimate:  # fmt: skip
    """Bounds log p(x) of each example from below with a Gaussian proposal fitted to the encoder's draws.

    The bound holds whatever the proposal, and is tight where the proposal covers the posterior.

    Args:
      key: randomness, see `examples.map_examples`.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      model: the method's model.
      numbers: [N] which examples they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      samples: importance samples per example.
      initial: 'encoder' or 'prior', see `proposal.proposal`.
      fit_draws: draws that the proposal is fitted to.
      inflation: of the proposal's standard deviation, to cover the tails.
      chunk: examples at once.

    Raises:
      UserError: a model without a likelihood, or an unknown `initial`.
    """
    log_density = log_joint(state, model)

    def one(key: Array, x: Array) -> ImportanceEstimate:
        fit_key, sample_key = jax.random.split(key)
        start = proposal(fit_key, state, model, x, initial, fit_draws, inflation)
        z = start.sample(sample_key, samples)
        return ImportanceEstimate(*sum_up(log_density(x, z) - start.log_prob(z)))

    return map_examples("importance", one, key, images, numbers, binarize, chunk)
