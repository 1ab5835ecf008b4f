"""What every estimator is: settings, what it needs of a method, and numbers from its results."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from avb_jax.evaluation.examples import map_examples
from avb_jax.method import Method
from avb_jax.types import Array, PyTree, State

if TYPE_CHECKING:
    from avb_jax.evaluation.run import Subject

LACKS = {
    "log_joint": "has no likelihood p(x|z)",
    "decode": "has no decoder",
    "encode": "has no encoder",
    "log_likelihood": "does not know its own log p(x)",
    "elbo": "has no ELBO",
    "prior": "has no prior",
    "adversary": "has no T",
    "fresh_adversary": "has no T whose optimality could be measured",
}


class Number(NamedTuple):
    """A quantity of one run."""

    mean: float  # infinite, or not a number, where that of some example is
    examples: int | None = None  # that it is a mean over
    examples_error: float | None = None  # standard error over these examples
    estimator_error: float | None = None  # what the estimator's own randomness contributes to that mean
    reason: str = ""  # why the mean is not finite, and what the other examples have for a mean
    per_example: np.ndarray | None = None  # [N]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Settings of an estimator; a subclass has a `name`, what it `requires` of a method, and does one example at a time.

    Attributes:
      images: how many examples it takes, from the first; all where it is None.
      chunk: examples at once on each device, which changes memory and speed, not results.
    """

    images: int | None = None
    chunk: int = 100

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()  # fields of a `Method`

    def lacks(self, method: Method) -> str:
        """What the method does not have that this needs, in words; '' where it has all."""
        for field in self.requires:
            if getattr(method, field) is None:
                return LACKS.get(field, f"has no {field}")
        return ""

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> PyTree:
        """The estimate for one example x [*x], a NamedTuple of arrays; pure."""
        raise NotImplementedError

    def over(self, method: Method, key: Array, state: State, images: Array, numbers: Array, binarize: str) -> PyTree:
        """The estimates for several stored examples; pure."""
        one = lambda key, x: self(method, key, state, x)  # noqa: E731
        return map_examples(self.name, one, key, images, numbers, binarize, self.chunk)

    def run(self, subject: "Subject") -> dict[tuple[str, str], Number]:
        """Evaluates a run: (quantity, estimator) -> number."""
        return self.numbers(subject, subject.on_examples(self))

    def numbers(self, subject: "Subject", found: Any) -> dict[tuple[str, str], Number]:
        """The numbers that per-example results [N] come to."""
        raise NotImplementedError

    def describe(self, found: Any) -> str:
        """A few words of progress on the results so far."""
        del found
        return ""


def finite_mean(values: np.ndarray) -> tuple[float, str]:
    """The mean [] over all examples [N], and why it is not a finite number; '' where it is one.

    The reason alone has the mean over the examples with a finite value: without those whose log-likelihood is minus infinity,
    for one, it is too high.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if finite.all():
        return float(values.mean()), ""
    lost, reason = values[~finite], f"{np.sum(~finite)} of {len(values)} examples have no finite value"
    if finite.any():
        bias = " upwards" if np.all(lost == -np.inf) else " downwards" if np.all(lost == np.inf) else ""
        reason += f"; the mean over the other {np.sum(finite)}, {values[finite].mean():.3f}, is biased{bias}"
    with np.errstate(invalid="ignore"):  # infinities of both signs
        return float(values.mean()), reason


def mean(values: np.ndarray, errors: np.ndarray | None = None) -> Number:
    """The mean over all examples [N], with its errors where it is finite.

    Args:
      values: one per example.
      errors: the estimator's own standard error for each of them.
    """
    values = np.asarray(values)
    count, (average, reason) = len(values), finite_mean(values)
    if reason:
        return Number(average, count, reason=reason, per_example=values)
    spread = float(np.std(values, ddof=1, dtype=np.float64) / np.sqrt(count)) if count > 1 else None
    own = None if errors is None else float(np.sqrt(np.sum(np.square(errors, dtype=np.float64))) / count)
    own = own if own is not None and np.isfinite(own) else None  # one draw alone has no spread
    return Number(average, count, spread, own, per_example=values)


def so_far(what: str, values: np.ndarray, digits: int = 2) -> str:
    """Words of progress."""
    number = mean(values)
    error = "" if number.examples_error is None else f" +- {number.examples_error:.{digits}f}"
    return f"{what} {number.mean:.{digits}f}{error}{number.reason and f' ({number.reason})'}"
