"""What numbers come to: means with infinities, errors over seeds, text, JSON, and comparisons, by hand."""

import json

import numpy as np
import pytest

from avb_jax import Report, UserError
from avb_jax.evaluation import Number
from avb_jax.evaluation.estimator import finite_mean, mean, so_far
from avb_jax.evaluation.report import Estimate, cell, combine, paired_difference
from avb_jax.training import workdir

INFINITE = np.array([-1.0, -np.inf, -3.0, -2.0])
REASON = "1 of 4 examples have no finite value; the mean over the other 3, -2.000, is biased upwards"


@pytest.mark.parametrize(
    ("values", "expected", "reason"),
    [
        ([1.0, 2.0], 1.5, ""),
        (INFINITE, -np.inf, REASON),
        ([np.inf, 2.0], np.inf, "1 of 2 examples have no finite value; the mean over the other 1, 2.000, is biased downwards"),
        ([np.inf, 2.0, -np.inf], np.nan, "2 of 3 examples have no finite value; the mean over the other 1, 2.000, is biased"),
        ([np.nan, 2.0], np.nan, "1 of 2 examples have no finite value; the mean over the other 1, 2.000, is biased"),
        ([-np.inf], -np.inf, "1 of 1 examples have no finite value"),
    ],
)
def test_means_are_over_all_examples(values, expected, reason):
    np.testing.assert_equal(finite_mean(np.asarray(values)), (expected, reason))
    number = mean(np.asarray(values), np.ones(len(values)))
    np.testing.assert_equal((number.mean, number.reason, number.examples), (expected, reason, len(values)))
    assert (number.estimator_error is None) == (reason != "")


def without_examples(number):
    """A number without what it is a mean of."""
    return number._replace(per_example=None)


def test_a_number_by_hand():
    """Standard errors over examples, and of the estimator's own as of independent ones."""
    number = mean(np.array([1.0, 2.0, 6.0]), np.array([0.3, 0.4, 1.2]))
    assert without_examples(number) == Number(3.0, 3, pytest.approx(np.sqrt(7 / 3)), pytest.approx(1.3 / 3))
    np.testing.assert_array_equal(number.per_example, [1.0, 2.0, 6.0])
    assert without_examples(mean(np.array([2.0]), np.array([np.nan]))) == Number(2.0, 1)
    assert without_examples(mean(np.array([2.0, 4.0]))) == Number(3.0, 2, pytest.approx(1.0))
    assert so_far("ELBO", np.array([1.0, 2.0, 6.0])) == "ELBO 3.00 +- 1.53"
    assert so_far("T loss", np.array([1.25]), 4) == "T loss 1.2500"
    assert so_far("log-likelihood", INFINITE) == f"log-likelihood -inf ({REASON})"


def test_errors_of_float32_are_summed_in_float64():
    """Of many examples about a large mean."""
    values = np.float32(1e4 + np.random.default_rng(0).standard_normal(100_000))
    number = mean(values, np.full(100_000, 1e-3, np.float32))
    assert number.mean == pytest.approx(np.mean(values, dtype=np.float64), rel=1e-12)
    assert number.examples_error == pytest.approx(np.std(values, ddof=1, dtype=np.float64) / np.sqrt(100_000), rel=1e-9)
    assert number.estimator_error == pytest.approx(1e-3 / np.sqrt(100_000), rel=1e-6)


def test_seeds_by_hand():
    """The error over seeds, the estimator's own as of independent means, and at most the mean of those over examples."""
    number, other = mean(np.array([1.0, 2.0, 6.0]), np.array([0.3, 0.4, 1.2])), Number(7.0, 4, 2.0, 0.1)
    assert combine([number, other]).to_json() == {
        "mean": 5.0,
        "standard_error": pytest.approx(2.0),
        "per_seed": [3.0, 7.0],
        "examples": 3,
        "examples_standard_error": pytest.approx((np.sqrt(7 / 3) + 2) / 2),
        "estimator_standard_error": pytest.approx(np.hypot(1.3 / 3, 0.1) / 2),
    }
    assert combine([Number(1.0)]).to_json() == {"mean": 1.0, "standard_error": None, "per_seed": [1.0]}
    three = combine([Number(1.0), Number(2.0), Number(6.0)])
    assert three.seeds_error == pytest.approx(np.sqrt(7 / 3))
    without = combine([other, Number(1.0, 4, 2.0)])
    assert (without.examples_error, without.estimator_error) == (pytest.approx(2.0), None)


def test_seeds_and_examples():
    """[seeds, N] where the State had seeds, of one seed too, else [N]."""
    one, two = mean(np.array([1.0, 2.0])), mean(np.array([3.0, 5.0]))
    np.testing.assert_array_equal(combine([one, two]).per_example, [[1.0, 2.0], [3.0, 5.0]])
    assert combine([one]).per_example.shape == (1, 2)
    assert combine([one], seeds=False).per_example.shape == (2,)
    assert combine([one, Number(1.0)]).per_example is None
    assert combine([one, two]).examples_error == pytest.approx(0.75)  # of the examples' means over seeds, 2.0 and 3.5
    assert combine([one, one]).examples_error == one.examples_error  # more seeds do not make more examples


def test_a_seed_that_is_not_finite():
    """Neither the mean nor an error hides it; the reason names the seed where there are several."""
    found = combine([mean(np.full(4, -2.0)), mean(INFINITE)])
    assert found.mean == -np.inf
    assert found.seeds_error is found.examples_error is found.standard_error is None
    assert found.reason == f"seed 1: {REASON}"
    assert found.per_seed == [-2.0, -np.inf]
    assert combine([mean(INFINITE)]).reason == REASON
    assert np.isnan(combine([mean(INFINITE), mean(-INFINITE)]).mean)


@pytest.mark.parametrize(
    ("errors", "expected"), [((0.1, 0.2, 0.3), 0.1), ((None, 0.2, 0.3), 0.2), ((None, None, 0.3), 0.3), ((None,) * 3, None)]
)
def test_the_standard_error_is_over_what_there_is_most_of(errors, expected):
    seeds, examples, own = errors
    assert Estimate(1.0, seeds, [1.0], 3, examples, own, "", None).standard_error == expected


def report_of(name="vae", **values):
    """A report of log-likelihoods per example, and the notes 'One.' and 'Two.'."""
    estimates = {("log_likelihood", what): combine([mean(np.asarray(v))], seeds=False) for what, v in values.items()}
    return Report(name, estimates, ["One.", "Two."])


def test_indexing():
    report = report_of(ais=[1.0, 3.0])
    assert report["log_likelihood", "ais"].mean == 2.0
    assert ("log_likelihood", "ais") in report
    assert ("elbo", "density") not in report
    with pytest.raises(UserError) as error:
        report["elbo", "density"]
    assert str(error.value) == "('elbo', 'density'): vae has no such number; there are ('log_likelihood', 'ais')"


def test_json(tmp_path):
    """Names of quantity and estimator; null with a reason for what is not finite, in a file that others than Python read."""
    report = report_of(ais=INFINITE, importance=[1.0, 3.0])
    workdir.write_results(tmp_path, {"vae": report.to_json()})

    def refuse(constant):
        raise ValueError(constant)

    numbers = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["vae"]
    assert numbers == {
        "log_likelihood_ais": {"mean": None, "standard_error": None, "per_seed": [None], "examples": 4, "reason": REASON},
        "log_likelihood_importance": {
            "mean": 2.0,
            "standard_error": None,
            "per_seed": [2.0],
            "examples": 2,
            "examples_standard_error": pytest.approx(1.0),
        },
    }


def test_a_table():
    """A row per number with each error in its column; notes below."""
    number = Estimate(-1.25, 0.5, [-1.25, -1.25], 1234, 0.25, 0.125, "", None)
    units = Estimate(2.0, None, [2.0], None, None, None, "", None)
    lines = Report("avb", {("elbo", "adversary"): number, ("active_units", "moments"): units}, ["A note."]).to_markdown()
    assert lines.splitlines() == [
        "| quantity | estimator | mean | seeds | examples | estimator's own | of |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| elbo | adversary | -1.25 | ± 0.5 | ± 0.25 | ± 0.125 | 1,234 |",
        "| active_units | moments | 2 |  |  |  |  |",
        "",
        "A note.",
    ]
    (row,) = report_of(ais=INFINITE).to_markdown().splitlines()[2:3]
    assert row == "| log_likelihood | ais | -inf |  |  |  | 4 |"


@pytest.mark.parametrize(
    ("value", "seeds_error", "examples_error", "text"),
    [
        (-1234.56, 0.26, 2.0, "-1,234.6 ± 0.3"),  # over seeds rather than over examples
        (-123.456, None, 0.126, "-123.46 ± 0.13"),
        (5.0, None, 0.5, "5.000 ± 0.500"),
        (9.8765, None, None, "9.877"),
        (np.nan, None, None, "not finite"),
        (-np.inf, None, None, "not finite"),
    ],
)
def test_cells(value, seeds_error, examples_error, text):
    """Digits by size."""
    number = Estimate(value, seeds_error, [value], None, examples_error, None, "", None)
    assert cell(number) == text
    if np.isfinite(value) and value > 0:
        assert cell(number, signed=True) == f"+{text}"


def rows(table):
    """Cells of a table in Markdown, without the line below the header."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return [lines[0], *lines[2:]]


def test_a_comparison():
    """A row per report, a dash where one has no such number."""
    reports = {"a": report_of(ais=[-90.0, -92.0]), "b": report_of(ais=[-95.0, -96.0], importance=[-97.0, -99.0])}
    assert rows(Report.compare(reports)) == [
        ["", "log_likelihood, ais", "log_likelihood, importance"],
        ["a", "-91.00 ± 1.00", "-"],
        ["b", "-95.50 ± 0.50", "-98.00 ± 1.00"],
    ]
    assert rows(Report.compare(reports, columns=[("log_likelihood", "importance")])) == [
        ["", "log_likelihood, importance"],
        ["a", "-"],
        ["b", "-98.00 ± 1.00"],
    ]


def test_a_comparison_with_a_reference():
    """The last column is the mean of differences, example by example, to the reference."""
    reports = {
        "vae": report_of(ais=[-90.0, -92.0]),
        "avb": report_of(ais=[-89.0, -90.5]),
        "fewer": report_of(ais=[-89.0]),
        "other": report_of(importance=[-89.0, -91.0]),
        "gan": Report("gan", {("sliced_wasserstein", "pixels"): combine([Number(3.0)])}),
    }
    header, *lines = rows(Report.compare(reports, reference="vae", columns=[("log_likelihood", "ais")]))
    assert header[-1] == "log_likelihood above vae's, paired"
    assert [line[0] for line in lines] == list(reports)
    assert [line[-1] for line in lines] == ["", "+1.250 ± 0.250", "-", "-", "-"]
    header, *lines = rows(Report.compare(reports, reference="other"))  # whose only one is by importance sampling
    assert [line[-1] for line in lines] == ["-", "-", "-", "", "-"]
    header, *lines = rows(Report.compare(reports, reference="other", paired=("log_likelihood", "ais")))
    assert [line[-1] for line in lines] == ["-", "-", "-", "", "-"]
    header, *_ = rows(Report.compare(reports, reference="gan"))  # which has nothing that could be paired
    assert "paired" not in header[-1]
    with pytest.raises(UserError, match="reference='vea': must be one of vae, avb, fewer, other, gan"):
        Report.compare(reports, reference="vea")


def test_one_seed_is_paired_with_none():
    """A State of one seed has an axis of it, and one without has not."""
    numbers = [mean(np.array([1.0, 2.0, 4.0])), mean(np.array([1.0, 1.0, 1.0]))]
    one, other = (
        Report(name, {("log_likelihood", "ais"): combine([number], seeds)})
        for name, number, seeds in zip(("a", "b"), numbers, (True, False), strict=True)
    )
    assert "| +1.333 ± 0.882 |" in Report.compare({"a": one, "b": other}, reference="b")


def test_several_seeds_are_paired_over_seeds():
    values, reference = np.array([[1.0, 2.0], [3.0, 6.0]]), np.zeros((2, 2))
    difference = paired_difference(values, reference)
    assert (difference.mean, difference.seeds_error, difference.examples_error) == (3.0, pytest.approx(1.5), None)
    assert difference.per_seed == [1.5, 4.5]
    one = paired_difference(values[:1], reference[:1])
    assert (one.mean, one.seeds_error, one.examples_error) == (1.5, None, pytest.approx(0.5))
    assert paired_difference(reference, values).mean == -3.0
    assert paired_difference(values[:1, :1], reference[:1, :1]).standard_error is None
    both = {
        name: Report(name, {("log_likelihood", "ais"): combine([mean(v) for v in seeds])})
        for name, seeds in (("a", values), ("b", reference))
    }
    assert rows(Report.compare(both, reference="b"))[1][-1] == "+3.000 ± 1.500"


def test_differences_that_are_not_finite():
    values, reference = np.stack([INFINITE, INFINITE]), np.full((2, 4), -2.0)
    difference = paired_difference(values, reference)
    assert difference.mean == -np.inf
    assert difference.standard_error is None
    assert difference.reason == "2 of 8 examples have no finite value; the mean over the other 6, 0.000, is biased upwards"
    assert np.isnan(paired_difference(values, values).mean)
    reports = {"a": report_of(ais=INFINITE), "b": report_of(ais=np.full(4, -2.0))}
    assert rows(Report.compare(reports, reference="b"))[1] == ["a", "not finite", "not finite"]
