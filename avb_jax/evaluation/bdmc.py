"""Bidirectional Monte Carlo (Grosse, Ghahramani & Adams 2015): how far annealed importance sampling is off, measured.

On data that the model itself simulates, x ~ p(x|z) with z ~ p(z), that z is an exact draw from the posterior. Annealing back
from it bounds log p(x) from above, annealing forward from below, and the width between the two is the error bar that the
forward number alone does not have.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation import ais, proposal
from avb_jax.evaluation.estimator import Number, mean, so_far
from avb_jax.evaluation.examples import sum_up
from avb_jax.method import Method, prior_at
from avb_jax.streams import stream
from avb_jax.types import Array, State, UserError


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


@dataclasses.dataclass(frozen=True)
class BDMC(ais.AIS):
    """Bounds log p(x) of simulated examples from both sides, with the annealing of `AIS`, whose settings it has.

    Attributes:
      images: how many examples are simulated.

    Raises:
      UserError: a setting out of range.
    """

    images: int = 20

    name: ClassVar[str] = "bdmc"
    requires: ClassVar[tuple[str, ...]] = ("log_joint", "decode", "prior")

    def __post_init__(self):
        super().__post_init__()
        if self.images is None:
            raise UserError("images=None: must be how many examples to simulate")

    def over(self, method: Method, key: Array, state: State, images: None, numbers: Array, binarize: str) -> Sandwich:
        """The bounds of several of the endless row of simulated examples."""
        del images, binarize

        def one(number: Array) -> Sandwich:
            return self.simulated(method, jax.random.fold_in(stream(key, "bdmc"), number), state)

        return jax.lax.map(one, jnp.asarray(numbers), batch_size=min(self.chunk, len(numbers)))

    def simulated(self, method: Method, key: Array, state: State) -> Sandwich:
        """The bounds of one simulated example."""
        z_key, x_key, fit_key, forward_key, reverse_key = jax.random.split(key, 5)
        z = prior_at(method, state).sample(z_key, (1,))
        x = method.decode(state, z).sample(x_key)[0].astype(jnp.float32)
        start = proposal.proposal(fit_key, state, method, x, self.initial, self.fit_draws, self.inflation)
        log_density = lambda z: method.log_joint(state, x[None], z[None])[0]  # noqa: E731
        annealing = (log_density, start, ais.schedule(self.temperatures), self.chains, self.leapfrog_steps)
        lower = ais.forward(forward_key, *annealing)
        upper = sum_up(ais.reverse(reverse_key, *annealing, z[0], lower.step_size))
        return Sandwich(lower.log_likelihood, -upper.log_mean, lower.standard_error, upper.standard_error, lower.divergent)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        found = subject.on_examples(self, simulated=True)
        ais.note_divergence(subject, self.name, found.divergent)
        return {
            ("log_likelihood_lower", self.name): mean(found.lower, found.lower_error),
            ("log_likelihood_upper", self.name): mean(found.upper, found.upper_error),
            ("width", self.name): mean(found.width, np.hypot(found.lower_error, found.upper_error)),
        }

    def describe(self, found: Sandwich) -> str:
        return so_far("width", found.width, 3)
