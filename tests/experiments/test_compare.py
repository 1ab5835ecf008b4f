"""Comparisons at tiny size: several methods into one table and figure."""

import json

import numpy as np
import pytest

from avb_jax import UserError, build
from avb_jax.evaluation.estimator import mean
from avb_jax.evaluation.report import Report, combine
from avb_jax.training import workdir
from experiments import compare, suites
from tests.conftest import small_method

TINY = {
    "steps": 4,
    "log_every": 2,
    "checkpoint_every": 2,
    "batch_size": 8,
    "num_seeds": 1,
    "noise_dim": 2,
    "noise_draws": 2,
    "contrast.bases": 2,
    "contrast.widths": (4,),
    "posterior.widths": (4,),
}
ESTIMATION = {
    "ais.images": 6,
    "ais.chains": 2,
    "ais.temperatures": 4,
    "ais.leapfrog_steps": 2,
    "ais.chunk": 6,
    "bdmc.images": 3,
    "elbo.images": 8,
    "importance.images": 6,
    "importance.samples": 4,
}


def tiny(suite, **fields):
    """A suite of `suites.SUITES` as it is, at tiny size."""
    suite = suites.SUITES[suite]
    entries = {name: entry._replace(fields={**entry.fields, **fields}) for name, entry in suite.entries.items()}
    return suite._replace(fields={**suite.fields, **TINY}, evaluation=ESTIMATION, entries=entries)


def synthetic(**fields):
    """The synthetic suite; any narrower, and some encoder begins with every unit dead."""
    return tiny("synthetic", **{"network.widths": (16,), "network.adversary_features": 4, "evaluation.samples": 200, **fields})


def digits():
    """The digits' suite, with two latents so that all panels are there."""
    fields = {
        "network.widths": (8,),
        "network.adversary_features": 4,
        "latent_dim": 2,
        "evaluation.importance_images": 7,
        "evaluation.importance_samples": 5,
    }
    return tiny("digits", **fields)


@pytest.mark.slow
def test_one_table_of_several_methods(tmp_path):
    suite, names = digits()._replace(estimators=("ais", "elbo")), ["avb_ac", "vae", "gan"]
    rows = compare.compare(suite, tmp_path, names)
    assert list(rows) == names
    values = {}
    for name, method in (("avb_ac", "avb"), ("vae", "vae")):
        (block,) = (tmp_path / name / "evaluation" / f"{method}-0" / "ais").glob("*.npz")
        values[name] = np.load(block)["log_likelihood"]
        np.testing.assert_allclose(rows[name]["log_likelihood_ais"]["mean"], values[name].mean(), rtol=1e-5)
    difference = values["avb_ac"] - values["vae"]
    np.testing.assert_allclose(rows["avb_ac"]["difference"]["mean"], difference.mean(), rtol=1e-4)
    np.testing.assert_allclose(rows["avb_ac"]["difference"]["standard_error"], difference.std(ddof=1) / np.sqrt(6), rtol=1e-4)
    assert "difference" not in rows["vae"]
    assert {"sliced_wasserstein_pixels"} == set(rows["gan"]) & set(suite.columns)  # no likelihood, no codes, no reconstructions
    assert json.loads((tmp_path / "results.json").read_text()).keys() == rows.keys()
    header, _, *lines = (tmp_path / "table.md").read_text().splitlines()
    assert {line.count("|") - line.count("\\|") for line in (header, *lines)} == {header.count("|") - header.count("\\|")}
    by_name = {line.split("|")[1].strip(): line for line in lines}
    assert by_name["avb_ac"].count("(under T)") == 2
    assert "under T" not in by_name["vae"]
    assert by_name["gan"].count("| - |") + by_name["gan"].count(" - |") > 5
    assert (tmp_path / "figure.png").exists()


def test_a_comparison_of_runs_that_are_there(tmp_path, monkeypatch):
    """Nothing trains: what is asked of each run, and that what the AIS column has is paired."""
    configs, asked, rng = {}, [], np.random.default_rng(0)
    found = {name: rng.standard_normal((3, 6)) for name in ("vae", "avb", "gan")}  # log p(x) of 6 images by 3 seeds

    def main(config, folder):
        configs[folder.name] = config.copy_and_resolve_references()
        workdir.write_json(folder / "config.json", {field: config[field] for field in ("batch_size", "num_seeds")})
        line = {"method": config.method, "examples_per_second": 100.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return {config.method: {"reconstruction_rmse_pixels": {"mean": 0.5}, "unknown": 1}}

    def evaluated(method, state, data, estimators, *, num_seeds, workdir, name):
        asked.append((name, [estimator.name for estimator in estimators]))
        if method.log_joint is None:
            return Report(name, {})
        (ais,) = (estimator for estimator in estimators if estimator.name == "ais")
        numbers = [mean(values[: ais.images]) for values in found[name]]
        return Report(name, {("log_likelihood", "ais"): combine(numbers)})

    def load(options, folder, name):
        run = build.Run(configs[folder.name], name, small_method(name), None, 3)
        state = small_method(name).init(compare.jax.random.key(0), np.zeros((2, 6, 6)))
        return run, state._replace(step=np.full(3, 60)), 3  # `patience` ended it

    monkeypatch.setattr(compare.avb_jax, "evaluate", evaluated)
    monkeypatch.setattr(compare.evaluate, "load", load)
    monkeypatch.setattr(compare, "panels", lambda *run: {"samples": np.zeros((4, 4))})
    monkeypatch.setattr(compare, "of_seed", lambda state, index: state)
    suite, estimators = digits()._replace(main=main, reference="gan"), ("ais", "optimality")
    suite.entries["avb"] = suite.entries["avb"]._replace(reference="vae")  # which goes before the suite's
    rows = compare.compare(
        suite, tmp_path, ["avb", "vae", "gan"], data_dir="data", steps=70, seeds=3, seed=7, images=4, estimators=estimators
    )
    for config in configs.values():
        assert (config.steps, config.num_seeds, config.seed, config.data.dir) == (70, 3, 7, "data")
    assert asked == [("avb", ["ais", "optimality"]), ("vae", ["ais"]), ("gan", [])]  # a GAN has no likelihood
    assert {name: row["under_t"] for name, row in rows.items()} == {"avb": True, "vae": False, "gan": False}
    for row in rows.values():
        assert (row["steps"], row["seeds"], row["reconstruction_rmse_pixels"]["mean"]) == (60, 3, 0.5)
        assert row["minutes"] == pytest.approx(60 * 8 * 3 / 100 / 60)
        assert "unknown" not in row
    assert "difference" not in rows["vae"]
    assert "difference" not in rows["gan"]
    difference = (found["avb"] - found["vae"])[:, :4].mean(axis=1)
    assert rows["avb"]["difference"]["mean"] == pytest.approx(difference.mean())
    assert rows["avb"]["difference"]["standard_error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(3))
    columns = [rows[name]["log_likelihood_ais"]["mean"] for name in ("avb", "vae")]
    assert rows["avb"]["difference"]["mean"] == pytest.approx(columns[0] - columns[1])


@pytest.mark.slow
def test_a_method_that_diverges_is_a_row_without_numbers(tmp_path):
    suite = synthetic(**{"optimizer.decoder_rate": 1e30})
    suite = suite._replace(entries={**suite.entries, "good": synthetic().entries["avb"]})
    rows = compare.compare(suite, tmp_path, ["vae", "good"])
    assert "is not finite by step" in rows["vae"]["diverged"]
    assert "elbo" in rows["good"]
    assert "| vae (diverged) | -" in (tmp_path / "table.md").read_text()


def test_steps_of_seconds(tmp_path, monkeypatch):
    """12 seconds at 70 examples a second, of all seeds together: 840 of 8 for each of 3 seeds; a block at least."""
    trained = []

    def train(config, run, method, data, name, built):
        trained.append((built, config.steps, config.check_images, config.patience))
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"method": name, "examples_per_second": 70.0}) + "\n")

    monkeypatch.setattr(compare.launch, "train", train)
    config = suites.SUITES["synthetic"].get_config("")
    config.update_from_flattened_dict({**TINY, "method": "vae", "num_seeds": 3, "check_images": 9, "patience": 2})
    assert compare.affordable(config, tmp_path / "some", 12) == 35
    assert compare.affordable(config, tmp_path / "few", 0) == config.log_every
    assert trained == [(True, 4 * config.log_every, 0, None)] * 2
    assert (config.steps, config.check_images, config.patience) == (TINY["steps"], 9, 2)


@pytest.mark.slow
def test_seconds_become_steps_once(tmp_path):
    """By the speed of a short training; the run then keeps its number of steps."""
    suite = synthetic()
    (row,) = compare.compare(suite, tmp_path, ["vae"], seconds=1).values()
    pilot = json.loads((tmp_path / "vae" / "pilot.json").read_text())
    assert row["steps"] == pilot["steps"] == max(2, round(pilot["examples_per_second"] / 8))
    assert compare.affordable(None, tmp_path / "vae", 1) == row["steps"]
    with pytest.raises(UserError, match=r"--seconds=2: .* holds a run of 1 seconds"):
        compare.compare(suite, tmp_path, ["vae"], seconds=2)


def test_minutes_are_those_of_unequal_rates(tmp_path):
    """Two blocks of 10 and of 40 examples a second, 100 examples each, take 12.5 seconds; compiling ones have no rate."""
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 10, "num_seeds": 1}))
    lines = [{"method": "vae", "examples_per_second": rate} for rate in (10.0, None, 40.0)]
    lines.append({"method": "avb", "examples_per_second": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.minutes(tmp_path, "vae", 20) == pytest.approx(12.5 / 60)


def test_the_table():
    """Errors over seeds rather than over examples, digits by size, what is T's, signs of differences, the published column."""
    row = {"steps": 12_000, "seeds": 1, "published": None, "minutes": 3.14159}
    rows = {
        "avb": {**row, "under_t": True, "published": -80.25, "kl": {"mean": 5.0, "examples_standard_error": 0.5}},
        "vae": {**row, "under_t": False, "minutes": float("nan")},
    }
    rows["avb"]["elbo"] = {"mean": -1234.56, "standard_error": 0.26, "examples_standard_error": 2.0}
    rows["avb"] |= {"difference": {"mean": 0.1234, "standard_error": 0.0126}, "reference": "vae"}
    rows["vae"]["elbo"] = {"mean": -123.456, "standard_error": None, "examples_standard_error": 0.126}
    rows["vae"]["reconstruction_rmse_pixels"] = {"mean": 9.8765, "standard_error": None}
    lines = compare.table(rows, suites.SUITES["mnist"]).splitlines()
    header, _, avb, vae = ([cell.strip() for cell in line.replace("\\|", "").split("|")[1:-1]] for line in lines)
    assert header == [
        "",
        "ELBO",
        "KL(q(zx), p(z))",
        "pixel error (RMS)",
        "log p(x) above vae's, paired",
        "published",
        "steps",
        "minutes",
    ]
    assert avb == [
        "avb",
        "-1,234.6 ± 0.3 (under T)",
        "5.000 ± 0.500 (under T)",
        "-",
        "+0.123 ± 0.013",
        "-80.2",
        "12,000",
        "3.1",
    ]
    assert vae == ["vae", "-123.46 ± 0.13", "-", "9.877", "-", "", "12,000", ""]
    rows["vae"] |= {"difference": {"mean": -1.0, "standard_error": 0.5}, "reference": "vae8"}
    text = compare.table(rows, suites.SUITES["mnist"])
    for part in ("log p(x) above vae or vae8's, paired", "| vae: +0.123 ± 0.013 |", "| vae8: -1.000 ± 0.500 |"):
        assert part in text


def test_slips(tmp_path):
    with pytest.raises(UserError, match="--methods=avb9: must be among avb, avb_ac, vae"):
        compare.compare(digits(), tmp_path, ["avb9"])
    with pytest.raises(UserError, match="--steps=1, --seconds=2: give one budget"):
        compare.compare(digits(), tmp_path, ["vae"], steps=1, seconds=2)
    with pytest.raises(UserError, match="--estimators=exakt: must be among exact, elbo"):
        compare.compare(digits(), tmp_path, ["vae"], estimators=("exakt",))


def test_every_method_is_in_the_suites():
    used = {fields["method"] for fields in (*suites.METHODS.values(), *suites.MODELS.values())}
    assert used == set(build.METHODS)
    for suite in suites.SUITES.values():
        assert set(suite.methods) <= set(suite.entries)
        assert suite.reference in suite.methods
        for entry in suite.entries.values():  # locked: a misspelt field fails
            suite.get_config(entry.variant).update_from_flattened_dict({**suite.fields, **entry.fields})


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["synthetic", "digits", "faces"])
def test_every_entry_runs_end_to_end(tmp_path, suite):
    small = {
        "synthetic": synthetic,
        "digits": digits,
        "faces": lambda: tiny(
            "faces",
            **{
                "data.name": "drawn_faces",
                "data.size": 16,
                "latent_dim": 3,
                "network.channels": 2,
                "network.adversary_channels": 2,
                "network.adversary_widths": (8,),
                "evaluation.images": 20,
                "check_images": 0,
            },
        ),
    }[suite]()
    small = small._replace(columns={**small.columns, "sliced_wasserstein_16": "16"})
    rows = compare.compare(small, tmp_path, list(small.entries))
    distance = "sliced_wasserstein_16" if suite == "faces" else "sliced_wasserstein_pixels"
    assert all(np.isfinite(row[distance]["mean"]) for row in rows.values())
    assert "elbo" not in rows["bigan"]
    assert "reconstruction_rmse_pixels" in rows["bigan"]
