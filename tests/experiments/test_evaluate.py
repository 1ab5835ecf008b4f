"""`experiments.evaluate` on finished runs."""

import ast
import json
import re
import shutil

import pytest

from avb_jax import UserError
from experiments import evaluate
from experiments.configs import evaluate as evaluate_config
from tests.experiments.command import MNIST, run
from tests.experiments.test_configs import another, flat

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
    "quadrature.images=4",
    "quadrature.points=20",
    "moments.draws=4",
    "knn.images=3",
    "knn.draws=60",
    "knn.codes=240",
]


SOME = "importance,ais,quadrature"


@pytest.mark.parametrize("estimators", [SOME, pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_mnist_and_its_evaluation(tmp_path, idx_folder, estimators):
    """Two seeds, two latents: some estimators, or every one; then again, from what was kept; and slips."""
    folder = tmp_path / "run"
    nothing = run("evaluate", folder)
    assert nothing.returncode == 2
    assert f"error: workdir={folder}: no run there" in nothing.stderr
    small = ["network.family=mlp", "network.widths=(8,)", "latent_dim=2", "num_seeds=2"]
    trained = run("mnist", folder, *MNIST, *small, f"data.dir={idx_folder}")
    assert trained.returncode == 0, trained.stderr
    before = json.loads((folder / "results.json").read_text())
    assert set(before["avb"]) >= {"log_likelihood", "elbo", "reconstruction_error", "kl_aggregated_posterior", "kl"}
    assert {"avb_samples_000004.png", "avb_reconstructions_000006.png"} <= {p.name for p in (folder / "figures").iterdir()}

    done = run("evaluate", folder, *QUICK, f"estimators={estimators}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((folder / "results.json").read_text())
    found, number = results["avb"], results["avb"]["log_likelihood_ais"]
    assert found.keys() > before["avb"].keys() | {f"log_likelihood_{name}" for name in SOME.split(",")}
    assert found["log_likelihood"] == before["avb"]["log_likelihood"]
    assert len(number["per_seed"]) == 2
    assert number["examples"] == 5
    assert number["estimator_standard_error"] > 0
    assert len(found["log_likelihood_importance"]["per_seed"]) == 2
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {"avb_ais_weights.png", "avb_ais_annealing.png"} <= figures
    if estimators == "auto":
        assert {"log_likelihood_lower_bdmc", "log_likelihood_upper_bdmc", "width_bdmc"} < found.keys()
        assert {"mutual_information_knn", "active_units_moments", "optimality_gap_fresh_adversary"} < found.keys()
        assert found["elbo_adversary"]["examples"] == 60
        assert "estimates that bound nothing" in done.stdout
        assert {"avb_adversary_calibration.png", "avb_latents.png"} <= figures

    again = run("evaluate", folder, *QUICK, "method=avb", "seeds=1", "estimators=ais")
    assert again.returncode == 0, again.stderr
    assert "ais example" not in again.stderr
    mean = json.loads((folder / "results.json").read_text())["avb"]["log_likelihood_ais"]
    assert mean["per_seed"] == results["avb"]["log_likelihood_ais"]["per_seed"][:1]
    assert "annealed importance sampling" in again.stdout
    assert "quadrature" not in again.stdout

    slip = run("evaluate", folder, "estimators=quadratur")
    assert slip.returncode == 2
    assert "error: estimators='quadratur': must be 'auto', or among exact, elbo, " in slip.stderr
    assert "Traceback" not in slip.stderr
    for changes, message in (
        ({"method": "gan"}, "method='gan': the run in "),
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


# Which numbers there are, or what they cost.
ELSEWHERE = ("method", "seeds", "estimators", "data_dir", "chunk")
# log p(x) of its own, conditional moments of q, labels: what these estimators need; their fields are set as all others are.
NOT_OF_THIS_RUN = ("exact", "semi_implicit", "linear_probe")


@pytest.mark.slow
def test_every_field_of_the_evaluation_changes_something(tmp_path, idx_folder):
    folder = tmp_path / "run"
    assert run("mnist", folder, *MNIST, "latent_dim=2", f"data.dir={idx_folder}", "checkpoint_every=1").returncode == 0
    earlier = min((path.name for path in (folder / "checkpoints" / "avb").iterdir()), key=int)
    base, settings = {}, {field: ast.literal_eval(value) for field, value in (part.split("=") for part in QUICK)}
    settings |= {f"{group}.images": 20 for group in ("elbo", "optimality", "importance", "moments")}

    def outcome(estimator, **changes):
        options = evaluate_config.get_config()
        options.update_from_flattened_dict({**settings, "estimators": estimator, **changes})
        (folder / "results.json").unlink(missing_ok=True)
        evaluate.main(options, folder)
        return (folder / "results.json").read_text()

    small = evaluate_config.get_config()
    small.update_from_flattened_dict(dict(settings))
    for field, value in flat(small):
        if field.rpartition(".")[2] in ELSEWHERE or field.partition(".")[0] in NOT_OF_THIS_RUN:
            continue
        estimator = field.partition(".")[0] if "." in field else "elbo"
        base[estimator] = base.get(estimator) or outcome(estimator)
        other = earlier if field == "step" else another(field, value)
        assert outcome(estimator, **{field: other}) != base[estimator], field
    assert outcome("ais", **{"ais.chunk": 5}) == base["ais"]
