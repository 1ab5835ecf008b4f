"""A look at held-out examples while a method trains: the ELBO under T, and bounds that do not use T."""

from typing import NamedTuple

import jax
import numpy as np

from avb_jax.data.dataset import Dataset
from avb_jax.evaluation.elbo import ELBO
from avb_jax.evaluation.examples import PRECISION
from avb_jax.evaluation.importance import ImportanceSampling
from avb_jax.evaluation.semi_implicit import SemiImplicit
from avb_jax.method import Method
from avb_jax.settings import check_settings
from avb_jax.streams import stream
from avb_jax.training import checkpoints
from avb_jax.training.callbacks import Callback, Run, short
from avb_jax.types import Array, State, UserError

SAMPLES = 128  # of importance sampling, per example
ESTIMATORS = ELBO(draws=4, chunk=16), ImportanceSampling(samples=SAMPLES, chunk=2)
BOUNDS = SemiImplicit(draws=4, inner=1000, chunk=2)  # of q's own ELBO, where the encoder is semi-implicit


class Comparison(NamedTuple):
    """Means over the examples, nats."""

    elbo: float  # under T
    log_likelihood: float  # by importance sampling: a stochastic lower bound on log p(x)
    excess: float  # elbo - log_likelihood
    excess_error: float  # its standard error over the examples
    effective_sample_size: float  # of SAMPLES
    elbo_lower: float | None = None  # of a semi-implicit q's ELBO, without T: from below
    elbo_upper: float | None = None  # and from above
    above_upper_error: float | None = None  # standard error over the examples of elbo - elbo_upper

    @property
    def above_its_bounds(self) -> bool:
        """Whether the ELBO under T stands more than half a nat, and three standard errors, above q's own ELBO: T is wrong."""
        return self.elbo_upper is not None and self.elbo - self.elbo_upper > max(0.5, 3.0 * self.above_upper_error)

    @property
    def inconsistent(self) -> bool:
        """Whether the ELBO stands more than a nat, and three standard errors, above the bound.

        No ELBO exceeds log p(x): then T is too small at the encoder's z, or importance sampling is far from log p(x).
        """
        return self.excess > max(1.0, 3.0 * self.excess_error)


def estimates(method: Method, binarize: str, key: Array, state: State, images: Array) -> tuple:
    """What each estimator finds per example; pure."""
    numbers = jax.numpy.arange(len(images))
    estimators = (*ESTIMATORS, BOUNDS) if method.semi_implicit else ESTIMATORS
    return tuple(estimator.over(method, key, state, images, numbers, binarize) for estimator in estimators)


def summarise(estimates: tuple) -> Comparison:
    """The means, from what `estimates` returns."""
    terms, bound, *of_q = jax.device_get(estimates)
    difference = terms.elbo - bound.log_likelihood

    def error(values: np.ndarray) -> float:
        return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0

    ends = [(q.elbo_lower.mean(), q.elbo_upper.mean(), error(terms.elbo - q.elbo_upper)) for q in of_q]
    return Comparison(
        float(terms.elbo.mean()),
        float(bound.log_likelihood.mean()),
        float(difference.mean()),
        error(difference),
        float(bound.effective_sample_size.mean()),
        *(float(end) for one in ends for end in one),
    )


class HeldOut(Callback):
    """At each checkpoint looks at held-out examples: the ELBO, and bounds that do not use T; warns where T is wrong.

    The bounds are one on log p(x), and where the encoder is semi-implicit both on q's own ELBO. In a workdir the State of the
    best bound on log p(x), a mean over the examples and seeds, is kept in `best/NAME` (`load(step='best')`).

    It does so where there are held-out examples, and a method with an ELBO, an encoder, a likelihood and a prior over all
    vectors; the same draws each time make the numbers of two steps comparable.
    """

    def __init__(self, images: int = 32, quiet: bool = False, patience: int | None = None):
        """Takes the first `images` held-out examples.

        Args:
          images: how many; 0: none, and nothing is looked at.
          quiet: reports warnings alone.
          patience: of so many checkpoints in a row without a better bound on log p(x) the last one ends the training; counted
            anew where a run goes on. None: none does.

        Raises:
          UserError: a patience out of range, or when a training starts, one that has nothing to watch.
        """
        check_settings(patience=(patience, patience is None or patience >= 1, "at least 1, or None"))
        self._count, self._quiet, self._patience = images, quiet, patience

    def start(self, run: Run) -> None:
        super().start(run)
        data, method = run.data, run.method
        self._images = self._best = None
        self._bound, self._since = -np.inf, 0
        held_out = isinstance(data, Dataset) and self._count and len(data.test) and data.test is not data.train
        watched = held_out and not any(estimator.lacks(method) for estimator in ESTIMATORS)
        if self._patience and not watched:
            raise UserError(
                f"patience={self._patience}: {run.name} has no bound on log p(x) to watch; give held-out examples "
                "(check_images), and a method with an encoder and a likelihood, or None"
            )
        if not watched or run.start >= run.steps:
            return
        self._images = np.asarray(data.test[: self._count])
        self._key = stream(jax.random.key(run.seed), "held_out")
        self._estimates = jax.jit(lambda key, state, images: estimates(method, data.binarize, key, state, images))
        if run.workdir is not None:
            self._best = run.workdir / "best" / run.name
            checkpoints.remove(self._best, [step for step in checkpoints.steps(self._best) if step > run.start])
            for step in checkpoints.steps(self._best):
                self._bound = checkpoints.found(self._best, step)["log_likelihood"]

    def checkpoint(self, step: int, state: State) -> bool:
        """Whether there has been nothing better for too long."""
        if self._images is None:
            return False
        with jax.default_matmul_precision(PRECISION):
            found = [summarise(self._estimates(self._key, one, self._images)) for one in self.run.per_seed(state)]
        fields = [field for field in Comparison._fields if getattr(found[0], field) is not None]
        numbers = {f"held_out_{field}": np.array([getattr(one, field) for one in found]) for field in fields}
        self.run.record(step, numbers)
        bound = float(numbers["held_out_log_likelihood"].mean())
        better = bound > self._bound  # which one that is not a number never is
        self._since = 0 if better else self._since + 1
        self._bound = bound if better else self._bound
        if better and self._best is not None:
            folder = self.run.workdir / "checkpoints" / self.run.name
            checkpoints.keep(folder, step, self._best, {"log_likelihood": bound})
        under_t = " under T" if self.run.method.adversary is not None else ""
        if not self._quiet:
            of_q = ""
            if "elbo_upper" in fields:
                ends = (short(numbers[f"held_out_elbo_{end}"].mean()) for end in ("lower", "upper"))
                of_q = " (without T: from {} to {})".format(*ends)
            elbo = short(numbers["held_out_elbo"].mean())
            self.run.note(
                f"step {step}, held out: ELBO{under_t} {elbo}{of_q}, log p(x) by importance sampling at least {short(bound)}"
            )
        for seed, one in enumerate(found if under_t else ()):
            which = f" (seed number {seed})" if len(found) > 1 else ""
            if one.above_its_bounds:
                self.run.note(
                    f"warning: the ELBO under T stands {one.elbo - one.elbo_upper:.1f} +- {one.above_upper_error:.1f} nats "
                    f"above what q's own can be{which}: T is behind the encoder. Lower the encoder's rate, raise "
                    "adversary_steps, noise_draws or encoder.smallest_std"
                )
            elif one.inconsistent:
                self.run.note(
                    f"warning: the ELBO under T stands {one.excess:.1f} +- {one.excess_error:.1f} nats above that "
                    f"bound{which}: T is behind the encoder, or the bound is loose (effective sample size "
                    f"{one.effective_sample_size:.1f} of {SAMPLES}). Lower the encoder's rate, raise adversary_steps, or use "
                    "adaptive contrast"
                )
        done = self._patience is not None and self._since >= self._patience
        if done:
            best = "" if self._best is None else f", and the best State is in {self._best}"
            self.run.note(
                f"step {step}: {self._since} checkpoints without a better bound than {short(self._bound)}: done{best}"
            )
        return done
