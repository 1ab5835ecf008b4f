"""What `experiments.evaluate` makes of reports: which runs, the table, figures, and numbers that are not finite."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Report, State, UserError
from avb_jax.data import from_arrays
from avb_jax.evaluation.ais import AnnealedEstimate
from avb_jax.evaluation.report import Estimate, paired_difference
from avb_jax.training import workdir
from experiments import compare, evaluate, suites
from experiments.configs import evaluate as evaluate_config
from tests.evaluation import game


def test_the_runs_that_are_evaluated(tmp_path, monkeypatch, capsys):
    """As many seeds as are named; a run that is not finished is said to be so."""
    states, asked = State(jnp.full(3, 40), jnp.arange(3), None, None, None), []

    def build_run(folder, name, data_dir):
        asked.append((folder, name))
        config = types.SimpleNamespace(steps=50, seed=0)
        return types.SimpleNamespace(name=name, method=None, data=None, config=config, num_seeds=3)

    monkeypatch.setattr(evaluate.build, "run", build_run)
    monkeypatch.setattr(evaluate, "initial_state", lambda method, data, seed, seeds: (seed, seeds))
    monkeypatch.setattr(evaluate, "restore", lambda *given: asked.append(given) or states)
    options = evaluate_config.get_config()
    run, state, seeds = evaluate.load(options, tmp_path, "vae")
    assert asked == [(tmp_path, "vae"), (tmp_path, "vae", (0, 3), None)]
    assert (run.name, seeds, state.params.tolist()) == ("vae", 3, [0, 1, 2])
    assert "vae: 3 of 3 seeds at step 40, not finished: its config has 50" in capsys.readouterr().out
    options.seeds = 2
    _, state, seeds = evaluate.load(options, tmp_path, "vae")
    assert (seeds, state.params.tolist()) == (2, [0, 1])
    assert asked[-1][2] == (0, 3)  # the checkpoint has all seeds
    options.step = "best"
    evaluate.load(options, tmp_path, "vae")
    assert asked[-1][3] == "best"
    options.seeds = 4
    with pytest.raises(UserError, match=r"seeds=4: the run in .* has 3"):
        evaluate.load(options, tmp_path, "vae")


def test_the_table():
    """Each error in its column, and T's name where there is a T."""
    number = Estimate(-1.25, 0.5, [-1.25, -1.25], 1234, 0.25, 0.125, "", None)
    kl = Estimate(2.0, None, [2.0], None, None, None, "", None)
    for kind, label in (("adversary", "ELBO under T: an estimate, no bound"), ("density", "ELBO")):
        report = Report("avb", {("kl", kind): kl, ("elbo", kind): number, ("own", "thing"): kl})
        header, line, below, _ = evaluate.table(report)[1:].splitlines()
        assert header.split()[-5:] == ["mean", "seeds", "examples", "estimator", "of"]
        assert " ".join(line.split()) == f"{label} -1.250 +-0.5 +-0.25 +-0.125 1,234"
        for title, cell in zip(header.split()[-5:], ("-1.250", "0.5", "0.25", "0.125", "1,234"), strict=True):
            assert header.rindex(title) + len(title) == line.rindex(cell) + len(cell)
        assert below.split()[-1] == "2.000"


def test_figures_of_what_is_finite(tmp_path):
    """Chains of weight zero, and a T of infinity, do not end an evaluation."""
    rng, ones = np.random.default_rng(0), np.ones((3, 6))
    weight = rng.standard_normal((3, 2))
    weight[1, 0] = -np.inf
    likelihood = np.logaddexp.reduce(weight, axis=1) - np.log(2)
    results = {
        "ais": AnnealedEstimate(likelihood, np.ones(3), np.ones(3), likelihood, weight, np.zeros((3, 2)), ones, ones, ones),
        "kl_by_both": (np.ones(3), np.array([1.0, np.inf, 2.0])),
    }
    report, options = Report("avb", {}, results=[results]), evaluate_config.get_config()
    options.ais.temperatures = 6
    evaluate.draw(report, tmp_path, options)
    assert report.notes == ["avb: ais: the figures leave out 1 of 3 examples, with chains of no finite weight"]
    figures = {path.name for path in tmp_path.iterdir()}
    assert figures == {"avb_ais_weights.png", "avb_ais_annealing.png", "avb_adversary_calibration.png"}


def no_constants(text):
    """JSON as others than Python read it."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_an_infinite_example_is_reported(tmp_path, monkeypatch, capsys):
    """Through the command: in the table and a note, and null with a reason in JSON."""
    test = np.ones((8, 2), np.float32)
    test[5] = 1e20  # whose square is infinite
    config = types.SimpleNamespace(optimizer=types.SimpleNamespace(b1=0.5), parallel="auto")
    run = types.SimpleNamespace(method=game.method(), data=from_arrays(test), config=config)
    state = jax.tree.map(lambda a: jnp.asarray(a)[None], game.state())
    monkeypatch.setattr(evaluate, "names_of", lambda options, folder: ["avb"])
    monkeypatch.setattr(evaluate, "load", lambda options, folder, name: (run, state, 1))
    options = evaluate_config.get_config()
    options.update_from_flattened_dict(
        {"estimators": "importance,elbo", "importance.samples": 20, "importance.images": 8, "elbo.draws": 2, "elbo.images": 8}
    )
    evaluate.main(options, tmp_path)
    out = capsys.readouterr().out
    numbers = no_constants((tmp_path / "results.json").read_text())["avb"]
    for quantity in ("log_likelihood_importance", "elbo_adversary", "reconstruction_error_adversary"):
        assert numbers[quantity].keys() == {"mean", "standard_error", "per_seed", "examples", "reason"}, quantity
        assert (numbers[quantity]["mean"], numbers[quantity]["per_seed"], numbers[quantity]["examples"]) == (None, [None], 8)
    reason = numbers["log_likelihood_importance"]["reason"]
    assert reason.startswith("1 of 8 examples have no finite value; the mean over the ")
    assert reason.endswith("is biased upwards")
    assert numbers["reconstruction_error_adversary"]["reason"].endswith("is biased downwards")
    assert f"avb: log_likelihood, importance: {reason}" in out.splitlines()
    (line,) = (line for line in out.splitlines() if line.startswith("log p(x), importance sampling"))
    assert line.split()[-2:] == ["-inf", "8"]


def test_infinite_numbers_in_a_comparison(tmp_path):
    """In the table with a reason, and the same from JSON."""
    infinite = np.array([-1.0, -np.inf, -3.0, -2.0])
    reason = "1 of 4 examples have no finite value; the mean over the other 3, -2.000, is biased upwards"
    difference = compare.difference_json(paired_difference(infinite[None], np.full((1, 4), -2.0)))
    elbo = Estimate(-np.inf, None, [-np.inf], 4, None, None, reason, None).to_json()
    row = {"published": None, "steps": 7, "difference": difference, "reference": "vae", "elbo": elbo}
    workdir.write_json(tmp_path / "rows.json", {"avb": row})
    for rows in ({"avb": row}, no_constants((tmp_path / "rows.json").read_text())):
        _, _, line, _, *reasons = compare.table(rows, suites.SUITES["digits"]).splitlines()
        assert [cell.strip() for cell in line.split("|")[2:4]] == ["not finite"] * 2
        assert reasons == [f"- avb, ELBO: {reason}", f"- avb, log p(x) above vae's, paired: {difference['reason']}"]
