"""The commands as a user runs them, at tiny size, and what they do with slips."""

import ast
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from avb_jax import UserError
from avb_jax.data import faces
from experiments import celeba, evaluate, sample
from experiments.configs import celeba as celeba_config
from experiments.configs import evaluate as evaluate_config
from tests.test_configs import flat_fields
from tests.test_data import idx_bytes

ROOT = pathlib.Path(__file__).parents[1]
TINY = ["steps=6", "log_every=2", "checkpoint_every=4", "batch_size=8"]
SYNTHETIC = [*TINY, "num_seeds=2", "network.widths=(8,)", "network.adversary_features=4", "evaluation.samples=400"]
MNIST = [
    *TINY, "evaluation.importance_images=7", "evaluation.importance_samples=5", "network.channels=2",
    "network.kernel_size=3", "network.z_widths=(8,)", "network.adversary_features=4",
]  # fmt: skip


def command(experiment, workdir, *fields, config=None):
    """The command line; on one device, as most users have it."""
    flags = [f"--config={config}"] if config else []
    flags += [f"--config.{field}" for field in fields]
    warnings = ["-W", "error", "-W", "ignore:the load_module"]  # the latter is ml_collections' own
    return [sys.executable, *warnings, "-m", f"experiments.{experiment}", *flags, f"--workdir={workdir}"]


def run(*arguments, **options):
    """Runs a command line of `command`; returns the finished process."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(
        command(*arguments, **options), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    """IDX files of 40 and 60 random 10x10 images."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 60)):
        images = rng.integers(0, 256, (count, 10, 10), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    return folder


def test_synthetic_end_to_end_and_again(tmp_path):
    first = run("synthetic", tmp_path, *SYNTHETIC)
    assert first.returncode == 0, first.stderr
    assert "log-likelihood" in first.stdout
    assert "-1.462" in first.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    for method in ("avb", "vae"):
        for quantity in ("log_likelihood", "elbo", "reconstruction_error", "kl_aggregated_posterior"):
            number = results[method][quantity]
            assert len(number["per_seed"]) == 2
            assert np.isclose(number["mean"], np.mean(number["per_seed"]))
            assert np.isclose(number["standard_error"], np.std(number["per_seed"], ddof=1) / np.sqrt(2))
    assert results["vae"]["kl_aggregated_posterior_quadrature"]["mean"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6
    with Image.open(tmp_path / "figures" / "figure_3.png") as figure:
        assert figure.size > (900, 500)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["method"], line["step"]) for line in lines] == [(m, s) for m in ("avb", "vae") for s in (2, 4, 6)]
    assert len(lines[0]["per_seed"]["elbo"]) == 2
    assert list((tmp_path / "tensorboard" / "avb").iterdir())

    again = run("synthetic", tmp_path, *SYNTHETIC)
    assert "avb: finished at step 6 of 6" in again.stderr
    assert json.loads((tmp_path / "results.json").read_text()) == results

    other = run("synthetic", tmp_path, *SYNTHETIC, "seed=1", "optimizer.b1=0.9")
    assert other.returncode == 2
    assert "holds a run of another config" in other.stderr
    assert "seed: 0 there, 1 now" in other.stderr
    assert "optimizer.b1: 0.5 there, 0.9 now" in other.stderr
    assert "Traceback" not in other.stderr


def test_mnist_end_to_end(tmp_path, idx_folder):
    done = run("mnist", tmp_path, *MNIST, f"data.dir={idx_folder}", "likelihood=gaussian")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"log_likelihood", "elbo", "reconstruction_error", "kl_aggregated_posterior", "kl"} <= set(results["avb"])
    assert results["avb"]["elbo"]["standard_error"] is None
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"avb_samples_000004.png", "avb_reconstructions_000006.png"} <= names


def test_an_interrupted_run_continues_to_the_same_end(tmp_path):
    """SIGINT in the middle; the same command finishes; params and metrics equal an uninterrupted run's."""
    fields = [*SYNTHETIC, "method=vae"]
    fields[fields.index("steps=6")] = "steps=4000"
    fields[fields.index("checkpoint_every=4")] = "checkpoint_every=4000"
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(
        command("synthetic", tmp_path / "a", *fields), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "a" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "the same command continues it" in errors
    assert "Traceback" not in errors
    stopped = len(metrics.read_text().splitlines())
    assert stopped < 2000
    with metrics.open("a") as file:
        file.write('{"method": "vae", "st')  # as a power cut would leave it
    resumed = run("synthetic", tmp_path / "a", *fields)
    assert f"vae: continues at step {2 * stopped} of 4000" in resumed.stderr
    whole = run("synthetic", tmp_path / "b", *fields)
    assert whole.returncode == 0, whole.stderr
    one, two = (json.loads((tmp_path / side / "results.json").read_text()) for side in "ab")
    assert one == two
    lines = [
        [{k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in path.read_text().splitlines()]
        for path in (metrics, tmp_path / "b" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        (["stepz=1"], None, "stepz"),
        (["steps=ten"], None, "steps"),
        ([], "experiments/configs/synthetic.py:huge", "no such variant; there are full, paper"),
        ([], "experiments/configs/nowhere.py", "nowhere.py"),
        (["method=avb,flow"], None, "method='flow': must be one of avb, vae"),
        (["optimizer.decoder_rate=1e30"], None, "is not finite by step"),
        (["data.name=mnist", "data.dir=/nowhere"], None, "data.dir='/nowhere': no such folder"),
    ],
)
def test_slips_are_told_in_one_line(tmp_path, fields, config, message):
    done = run("synthetic", tmp_path, *SYNTHETIC, *fields, config=config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


CELEBA = [
    *TINY, "network.channels=2", "network.units=1", "network.adversary_channels=2", "network.adversary_widths=(8,)",
    "evaluation.images=20", "data.size=16", "latent_dim=3", "noise_dim=3",
]  # fmt: skip


def test_celeba_end_to_end(tmp_path):
    """A folder of photographs, read from its cache, with the user's own features; then figures of the finished run."""
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(faces.draw(60, 20, 0)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    data_fields = ["data.name=images", f"data.dir={tmp_path / 'photos'}", "data.crop=18", "data.held_out=0.4",
                   f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    fields = [*CELEBA, *data_fields, "evaluation.features=tests.test_experiments:mean_colour"]
    done = run("celeba", tmp_path / "run", *fields)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    quantities = {"elbo", "reconstruction_rmse", "ms_ssim", "frechet_distance", "sliced_wasserstein_16"}
    assert quantities <= set(results["avb"])
    assert "20 samples against 20 test images of 16x16x3, 3 features of tests.test_experiments.mean_colour" in done.stdout
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"avb_samples_000004.png", "avb_interpolation_000006.png", "avb_neighbours_000006.png"} <= names
    flags = [f"--workdir={tmp_path / 'run'}", "--figure=interpolation", "--method=avb", f"--out={tmp_path / 'here.png'}"]
    made = subprocess.run(
        [sys.executable, "-m", "experiments.sample", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "here.png").exists()
    assert sample.draw(tmp_path / "run", "neighbours") == tmp_path / "run" / "figures" / "avb_neighbours.png"
    config = celeba_config.get_config("smoke")
    config.evaluation.features = "nowhere:nothing"
    with pytest.raises(UserError, match=r"evaluation\.features='nowhere:nothing': not MODULE:FUNCTION"):
        celeba.main(config, tmp_path / "other")


def mean_colour(images):
    """Features for a Frechet distance [B, 3]."""
    return images.mean(axis=(1, 2))


QUICK = [
    "elbo.draws=2", "elbo.chunk=16", "optimality.steps=4", "optimality.batch_size=8", "importance.samples=5",
    "ais.images=5", "ais.chains=3", "ais.temperatures=5", "ais.leapfrog_steps=2", "ais.chunk=3", "bdmc.images=4",
    "quadrature.points=100", "moments.draws=4", "knn.images=3", "knn.draws=60", "knn.codes=200",
]  # fmt: skip
LOG_LIKELIHOODS = {"log_likelihood_ais", "log_likelihood_importance", "bdmc_lower", "bdmc_upper", "bdmc_width"}


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
        assert LOG_LIKELIHOODS | {"log_likelihood_quadrature", "mutual_information", "active_units"} <= set(results[method])
        number = results[method]["log_likelihood_ais"]
        assert len(number["per_seed"]) == 2
        assert number["examples"] == 4
        assert number["estimator_standard_error"] > 0
        on_grid = results[method]["log_likelihood_quadrature"]["mean"]
        np.testing.assert_allclose(on_grid, before[method]["log_likelihood"]["mean"], atol=0.02)
    assert "optimality_gap" in results["avb"]
    assert "optimality_gap" not in results["vae"]
    assert "T's word" in done.stdout
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
    assert f"error: --workdir={folder}: no run there" in nothing.stderr
    assert run("mnist", folder, *MNIST, "network.family=mlp", "network.widths=(8,)", f"data.dir={idx_folder}").returncode == 0
    done = run("evaluate", folder, *QUICK)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())["avb"]
    assert set(results) >= LOG_LIKELIHOODS
    assert "log_likelihood_quadrature" not in results
    assert results["elbo"]["examples"] == 60
    slip = run("evaluate", folder, "estimators=quadrature")
    assert slip.returncode == 2
    assert "error: latent_dim=8: quadrature serves 1 to 3 latents" in slip.stderr
    assert "Traceback" not in slip.stderr
    for changes, message in (
        ({"estimators": "aiss"}, "estimators='aiss': must be 'auto', or among elbo, "),
        ({"method": "vae"}, "method='vae': the run in "),
        ({"seeds": 3}, "seeds=3: the run in "),
        ({"estimators": "ais", "ais.chains": 0}, "ais.chains=0: must be at least 1"),
        ({"estimators": "ais", "ais.images": -1}, "ais.images=-1: must be at least 0"),
        ({"optimality.rate": 0.0}, "optimality.rate=0.0: must be positive"),
        ({"estimators": "bdmc", "bdmc.images": 0}, "bdmc.images=0: must be at least 1"),
        ({"estimators": "importance", "importance.initial": "posterior"}, "initial='posterior': must be one of encoder"),
        ({"data_dir": "/nowhere"}, "data.dir='/nowhere': no such folder"),
    ):
        options = evaluate_config.get_config()
        options.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate.main(options, folder)
    shutil.rmtree(folder / "checkpoints" / "avb")
    with pytest.raises(UserError, match=re.escape(f"--workdir={folder}: no checkpoint of avb in ")):
        evaluate.main(evaluate_config.get_config(), folder)


# What each field of the evaluation's config is changed to; the quantities of its estimator must then change.
EVALUATION_CHANGES = {
    "seed": 1, "elbo.images": 30, "elbo.draws": 3, "optimality.images": 30, "optimality.draws": 3, "optimality.steps": 5,
    "optimality.batch_size": 4, "optimality.rate": 2e-3, "importance.images": 30, "importance.samples": 6,
    "importance.initial": "prior", "importance.fit_draws": 5, "importance.inflation": 1.3, "ais.images": 6, "ais.chains": 4,
    "ais.temperatures": 6, "ais.leapfrog_steps": 3, "ais.initial": "prior", "ais.fit_draws": 5, "ais.inflation": 1.3,
    "bdmc.images": 5, "quadrature.images": 4, "quadrature.points": 10, "moments.images": 30, "moments.draws": 5,
    "knn.images": 4, "knn.draws": 70, "knn.codes": 300, "knn.neighbours": 8,
}  # fmt: skip
# Fields that change which numbers there are, or what they cost.
EVALUATION_ELSEWHERE = {
    "method": "above", "seeds": "above", "estimators": "above", "data_dir": "above", "chunk": "test_annealing, test_evaluation",
}  # fmt: skip


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
