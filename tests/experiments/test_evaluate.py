"""`experiments.evaluate` on finished runs."""

import ast
import json
import re
import shutil

import numpy as np
import pytest

from avb_jax import UserError
from experiments import evaluate
from experiments.configs import evaluate as evaluate_config
from tests.experiments.test_commands import MNIST, SYNTHETIC, run
from tests.experiments.test_configs import flat_fields

QUICK = [
    "elbo.draws=2",
    "elbo.chunk=16",
    "optimality.steps=4",
    "optimality.batch_size=8",
    "importance.samples=5",
    "ais.images=5",
    "ais.chains=3",
    "ais.temperatures=5",
    "ais.leapfrog_steps=2",
    "ais.chunk=3",
    "bdmc.images=4",
    "quadrature.points=100",
    "moments.draws=4",
    "knn.images=3",
    "knn.draws=60",
    "knn.codes=200",
]
LOG_LIKELIHOODS = {
    "log_likelihood_ais",
    "log_likelihood_importance",
    "log_likelihood_lower_bdmc",
    "log_likelihood_upper_bdmc",
    "width_bdmc",
}


def test_evaluate_end_to_end_and_again(tmp_path):
    """Two methods, two seeds, two latents: every estimator; then the same again, from what was kept."""
    assert run("synthetic", tmp_path, *SYNTHETIC).returncode == 0
    before = json.loads((tmp_path / "results.json").read_text())
    done = run("evaluate", tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for method in ("avb", "vae"):
        assert before[method].items() <= {**results[method], **before[method]}.items()
        assert LOG_LIKELIHOODS | {"log_likelihood_quadrature", "mutual_information_knn", "active_units_moments"} <= set(
            results[method]
        )
        number = results[method]["log_likelihood_ais"]
        assert len(number["per_seed"]) == 2
        assert number["examples"] == 4
        assert number["estimator_standard_error"] > 0
        on_grid = results[method]["log_likelihood_quadrature"]["mean"]
        np.testing.assert_allclose(on_grid, before[method]["log_likelihood"]["mean"], atol=0.02)
    assert "optimality_gap_fresh_adversary" in results["avb"]
    assert "optimality_gap_fresh_adversary" not in results["vae"]
    assert "estimates that bound nothing" in done.stdout
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"avb_ais_weights.png", "vae_ais_annealing.png", "avb_adversary_calibration.png", "vae_latents.png"} <= figures
    assert "calibration" not in " ".join(name for name in figures if name.startswith("vae"))

    again = run("evaluate", tmp_path, *QUICK, "method=avb", "seeds=1", "estimators=ais")
    assert again.returncode == 0, again.stderr
    assert "ais example" not in again.stderr
    mean = json.loads((tmp_path / "results.json").read_text())["avb"]["log_likelihood_ais"]
    assert mean["per_seed"] == results["avb"]["log_likelihood_ais"]["per_seed"][:1]
    assert "annealed importance sampling" in again.stdout
    assert "quadrature" not in again.stdout


def test_evaluate_many_latents_and_slips(tmp_path, idx_folder):
    folder = tmp_path / "run"
    nothing = run("evaluate", folder)
    assert nothing.returncode == 2
    assert f"error: workdir={folder}: no run there" in nothing.stderr
    assert run("mnist", folder, *MNIST, "network.family=mlp", "network.widths=(8,)", f"data.dir={idx_folder}").returncode == 0
    done = run("evaluate", folder, *QUICK)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())["avb"]
    assert set(results) >= LOG_LIKELIHOODS
    assert "log_likelihood_quadrature" not in results
    assert results["elbo_adversary"]["examples"] == 60
    slip = run("evaluate", folder, "estimators=quadrature")
    assert slip.returncode == 2
    assert "error: estimators='quadrature': avb quadrature serves 1 to 3 latents" in slip.stderr
    assert "Traceback" not in slip.stderr
    for changes, message in (
        ({"estimators": "aiss"}, "estimators='aiss': must be 'auto', or among elbo, "),
        ({"method": "vae"}, "method='vae': the run in "),
        ({"seeds": 3}, "seeds=3: the run in "),
        ({"estimators": "ais", "ais.chains": 0}, "ais.chains=0: must be at least 1"),
        ({"estimators": "ais", "ais.images": -1}, "ais.images=-1: must be at least 1"),
        ({"optimality.rate": 0.0}, "optimality.rate=0.0: must be positive"),
        ({"estimators": "bdmc", "bdmc.images": 0}, "bdmc.images=0: must be at least 1"),
        (
            {"estimators": "importance", "importance.initial": "posterior"},
            "importance.initial='posterior': must be one of encoder",
        ),
        ({"data_dir": "/nowhere"}, "data.dir='/nowhere': no such folder"),
    ):
        options = evaluate_config.get_config()
        options.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate.main(options, folder)
    shutil.rmtree(folder / "checkpoints" / "avb")
    with pytest.raises(UserError, match=re.escape(f"workdir={folder}: no checkpoint of avb in ")):
        evaluate.main(evaluate_config.get_config(), folder)


# What each field of the evaluation's config is changed to; the quantities of its estimator must then change.
EVALUATION_CHANGES = {
    "seed": 1,
    "elbo.images": 30,
    "elbo.draws": 3,
    "optimality.images": 30,
    "optimality.draws": 3,
    "optimality.steps": 5,
    "optimality.batch_size": 4,
    "optimality.rate": 2e-3,
    "importance.images": 30,
    "importance.samples": 6,
    "importance.initial": "prior",
    "importance.fit_draws": 5,
    "importance.inflation": 1.3,
    "ais.images": 6,
    "ais.chains": 4,
    "ais.temperatures": 6,
    "ais.leapfrog_steps": 3,
    "ais.initial": "prior",
    "ais.fit_draws": 5,
    "ais.inflation": 1.3,
    "bdmc.images": 5,
    "quadrature.images": 4,
    "quadrature.points": 10,
    "moments.images": 30,
    "moments.draws": 5,
    "knn.images": 4,
    "knn.draws": 70,
    "knn.codes": 300,
    "knn.neighbours": 8,
}
# Fields that change which numbers there are, or what they cost.
EVALUATION_ELSEWHERE = {
    "method": "above",
    "seeds": "above",
    "estimators": "above",
    "data_dir": "above",
    "chunk": "tests/evaluation/test_run.py",
}


@pytest.mark.slow
def test_every_field_of_the_evaluation_changes_something(tmp_path, idx_folder):
    folder = tmp_path / "run"
    assert run("mnist", folder, *MNIST, "latent_dim=2", f"data.dir={idx_folder}").returncode == 0
    base = {}

    def outcome(estimator, **changes):
        options = evaluate_config.get_config()
        flat = {field: ast.literal_eval(value) for field, value in (part.split("=") for part in QUICK)}
        options.update_from_flattened_dict({**flat, "estimators": estimator, **changes})
        (folder / "results.json").unlink(missing_ok=True)
        evaluate.main(options, folder)
        return (folder / "results.json").read_text()

    fields = list(flat_fields(evaluate_config.get_config()))
    for field in fields:
        if field in EVALUATION_ELSEWHERE or field.rpartition(".")[2] in EVALUATION_ELSEWHERE:
            continue
        estimator = field.partition(".")[0] if "." in field else "elbo"
        base[estimator] = base.get(estimator) or outcome(estimator)
        assert outcome(estimator, **{field: EVALUATION_CHANGES[field]}) != base[estimator], field
    assert outcome("ais", **{"ais.chunk": 5}) == base["ais"]
