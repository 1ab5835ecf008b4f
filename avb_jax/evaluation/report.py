"""What an evaluation comes to: numbers by quantity and estimator, with their errors, as text, JSON and comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from avb_jax.evaluation.estimator import Number, finite_mean
from avb_jax.types import UserError


class Estimate(NamedTuple):
    """A quantity by one estimator, over the seeds of a run."""

    mean: float
    seeds_error: float | None  # standard error over seeds, where there are several
    per_seed: list[float]
    examples: int | None  # per seed, that it is a mean over
    examples_error: float | None  # standard error over these examples
    estimator_error: float | None  # what the estimator's own randomness contributes
    reason: str  # why the mean is not finite; '' where it is
    per_example: np.ndarray | None  # [N], or [seeds, N] where the State has seeds

    @property
    def standard_error(self) -> float | None:
        """Over seeds where there are several, else over examples, else the estimator's own."""
        for error in (self.seeds_error, self.examples_error, self.estimator_error):
            if error is not None:
                return error
        return None

    def to_json(self) -> dict:
        """As `results.json` has it, for which `training.workdir.write_json` makes null of what is not finite."""
        fields = {"mean": self.mean, "standard_error": self.seeds_error, "per_seed": self.per_seed}
        others = {
            "examples": self.examples,
            "examples_standard_error": self.examples_error,
            "estimator_standard_error": self.estimator_error,
            "reason": self.reason or None,
        }
        return fields | {name: value for name, value in others.items() if value is not None}


def combine(numbers: Sequence[Number], seeds: bool = True) -> Estimate:
    """The seeds' numbers as one estimate; without seeds, that of the one number."""
    values = np.asarray([number.mean for number in numbers], np.float64)
    finite = np.isfinite(values).all()
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 and finite else None
    reasons = [f"seed {i}: {n.reason}" if len(numbers) > 1 else n.reason for i, n in enumerate(numbers) if n.reason]

    def of_mean(field: str) -> float | None:
        errors = [getattr(number, field) for number in numbers]
        return None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)

    per_example, examples_error = None, numbers[0].examples_error
    if all(number.per_example is not None for number in numbers):
        per_example = np.stack([number.per_example for number in numbers]) if seeds else numbers[0].per_example
    if len(numbers) > 1:  # the seeds see the same examples: what these have in common does not average out
        errors = [number.examples_error for number in numbers]
        examples_error = None if None in errors else sum(errors) / len(errors)  # at most that
        if examples_error is not None and per_example is not None:
            shared = np.mean(per_example, axis=0, dtype=np.float64)
            examples_error = float(shared.std(ddof=1) / np.sqrt(len(shared)))
    with np.errstate(invalid="ignore"):
        average = float(values.mean())
    return Estimate(
        average,
        error,
        values.tolist(),
        numbers[0].examples,
        examples_error,
        of_mean("estimator_error"),
        ". ".join(reasons),
        per_example,
    )


class Report:
    """The numbers of one evaluated method: `report["log_likelihood", "ais"].mean`.

    Attributes:
      name: of what was evaluated.
      estimates: by (quantity, estimator).
      notes: lines for the reader.
      results: per seed, by estimator, what it found per example, for figures.
    """

    def __init__(self, name: str, estimates: Mapping[tuple[str, str], Estimate], notes: Sequence[str] = (), results: Any = ()):
        self.name, self.estimates, self.notes, self.results = name, dict(estimates), list(notes), list(results)

    def __getitem__(self, key: tuple[str, str]) -> Estimate:
        """The estimate of (quantity, estimator).

        Raises:
          UserError: there is none.
        """
        if key not in self.estimates:
            raise UserError(f"{key!r}: {self.name} has no such number; there are {', '.join(map(repr, self.estimates))}")
        return self.estimates[key]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.estimates

    def to_json(self) -> dict[str, dict]:
        """{quantity_estimator: numbers}, as `results.json` has it."""
        return {f"{quantity}_{estimator}": number.to_json() for (quantity, estimator), number in self.estimates.items()}

    def to_markdown(self) -> str:
        """A table with a row per number, and the notes below it."""
        lines = ["| quantity | estimator | mean | seeds | examples | estimator's own | of |", "| --- | --- |" + " ---: |" * 5]
        for (quantity, estimator), number in self.estimates.items():
            errors = (number.seeds_error, number.examples_error, number.estimator_error)
            cells = [f"± {error:.3g}" if error is not None else "" for error in errors]
            of = f"{number.examples:,}" if number.examples is not None else ""
            lines.append(f"| {quantity} | {estimator} | {number.mean:.4g} | {' | '.join(cells)} | {of} |")
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])])

    @staticmethod
    def compare(
        reports: Mapping[str, "Report"],
        reference: str | None = None,
        columns: Sequence[tuple[str, str]] | None = None,
        paired: tuple[str, str] | None = None,
    ) -> str:
        """A table in Markdown with a row per report, a dash where one has no such number.

        Args:
          reports: by name.
          reference: the report that `paired` is taken relative to.
          columns: (quantity, estimator) each; all that any report has where it is None.
          paired: a quantity, given per example, of which a last column has the mean difference to the reference and its
            standard error, pair by pair; by default the first log-likelihood that the reference has per example.

        Raises:
          UserError: no report of the reference's name.
        """
        if reference is not None and reference not in reports:
            raise UserError(f"reference={reference!r}: must be one of {', '.join(reports)}")
        if paired is not None and reference is None:
            raise UserError(f"paired={paired!r}: name the reference that it is taken relative to")
        columns = columns or list(dict.fromkeys(key for report in reports.values() for key in report.estimates))
        if reference is not None and paired is None:
            found = reports[reference].estimates.items()
            paired = next((key for key, n in found if key[0] == "log_likelihood" and n.per_example is not None), None)
        titles = ["", *[f"{quantity}, {estimator}" for quantity, estimator in columns]]
        titles += [f"{paired[0]} above {reference}'s, paired"] if paired and reference else []
        lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
        for name, report in reports.items():
            cells = [cell(report.estimates[key]) if key in report.estimates else "-" for key in columns]
            if paired and reference:
                cells.append(_difference(report, reports[reference], paired) if name != reference else "")
            lines.append("| " + " | ".join([name, *cells]) + " |")
        return "\n".join(lines)


def _difference(report: Report, reference: Report, key: tuple[str, str]) -> str:
    one, other = (r.estimates[key].per_example if key in r.estimates else None for r in (report, reference))
    if one is None or other is None:
        return "-"
    one, other = np.atleast_2d(one), np.atleast_2d(other)
    return cell(paired_difference(one, other), signed=True) if one.shape == other.shape else "-"


def paired_difference(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """Mean of [seeds, N] less the reference's; its standard error is over seeds where there are several, else over examples."""
    with np.errstate(invalid="ignore"):  # where both are minus infinity
        difference = np.subtract(values, reference, dtype=np.float64)
    average, reason = finite_mean(difference.ravel())
    per_seed = difference.mean(axis=1).tolist()
    if reason:
        return Estimate(average, None, per_seed, difference.shape[1], None, None, reason, difference)
    independent = difference.mean(axis=1) if len(difference) > 1 else difference[0]
    error = float(independent.std(ddof=1) / np.sqrt(len(independent))) if len(independent) > 1 else None
    of_seeds = len(difference) > 1
    return Estimate(
        average, error if of_seeds else None, per_seed, difference.shape[1], None if of_seeds else error, None, "", difference
    )


def cell(number: Estimate, signed: bool = False) -> str:
    """A mean and its standard error in a table."""
    if not math.isfinite(number.mean):
        return "not finite"
    error = number.seeds_error if number.seeds_error is not None else number.examples_error
    digits = 1 if abs(number.mean) >= 1000 else 2 if abs(number.mean) >= 10 else 3
    text = f"{number.mean:{'+' if signed else ''},.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if error is not None else text
