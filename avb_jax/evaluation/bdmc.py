"""Bidirectional Monte Carlo (Grosse, Ghahramani & Adams 2015): how far annealed importance sampling is off, measured.

On data that the model itself simulates, x ~ p(x|z) with z ~ p(z), that z is an exact draw from the posterior. Annealing back
from it bounds log p(x) from above, annealing forward from below, and the width between the two is the error bar that the
forward number alone does not have.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax.evaluation import ais
from avb_jax.evaluation.examples import sum_up
from avb_jax.evaluation.proposal import proposal
from avb_jax.players import Model, decode, evaluation_variables, log_joint
from avb_jax.streams import stream
from avb_jax.types import Array, State


class Sandwich(NamedTuple):
    """Per simulated example, in nats; both bounds hold in expectation."""

    lower: Array  # [N] log-mean weight of the forward chains
    upper: Array  # [N] minus that of the reverse chains
    lower_error: Array  # [N] standard errors of the two
    upper_error: Array  # [N]
    divergent: Array  # [N, K] of the forward chains, see `ais.AnnealedEstimate`

    @property
    def width(self) -> Array:
        """Upper minus lower [N]: in expectation no less than the error of either; of one example it may be negative."""
        return self.upper - self.lower


@functools.partial(
    jax.jit,
    static_argnames=("model", "chains", "temperatures", "leapfrog_steps", "initial", "fit_draws", "inflation", "chunk"),
)
def sandwich(
    key: Array, state: State, numbers: Array, *, model: Model, chains: int = 16, temperatures: int = 500,
    leapfrog_steps: int = 10, initial: str = ais.INITIAL, fit_draws: int = 64, inflation: float = 1.2, chunk: int = 20,
) -> Sandwich:  # fmt: skip
    """Bounds log p(x) of simulated examples from both sides, with the annealing of `ais.log_likelihood`.

    Args:
      key: randomness; an example's follows from it and its number.
      state: one run's, without a leading axis of seeds.
      numbers: [N] which of the endless row of simulated examples.
      model: the method's model.
      chains: K in each direction.
      temperatures: as there.
      leapfrog_steps: as there.
      initial: as there.
      fit_draws: as there.
      inflation: as there.
      chunk: examples at once.

    Raises:
      UserError: as there.
    """
    log_density = log_joint(state, model)
    betas = ais.schedule(temperatures)
    ais.check_counts(chains=chains, leapfrog_steps=leapfrog_steps)

    params, stats = evaluation_variables(state)

    def one(number: Array) -> Sandwich:
        own_key = jax.random.fold_in(stream(key, "bdmc"), number)
        z_key, x_key, fit_key, forward_key, reverse_key = jax.random.split(own_key, 5)
        z = model.prior.sample(z_key, (1,))
        output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
        x = model.likelihood.sample(x_key, output)[0]
        start = proposal(fit_key, state, model, x, initial, fit_draws, inflation)
        annealing = (lambda z: log_density(x, z[None])[0], start, betas, chains, leapfrog_steps)
        lower = ais.forward(forward_key, *annealing)
        upper = sum_up(ais.reverse(reverse_key, *annealing, z[0], lower.step_size))
        return Sandwich(
            lower.log_likelihood, -upper.log_mean, lower.standard_error, upper.standard_error, lower.divergent
        )

    return jax.lax.map(one, jnp.asarray(numbers), batch_size=min(chunk, len(numbers)))
