"""The commands as a user runs them, at tiny size, and what they do with slips."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from avb_jax import UserError
from avb_jax.data import faces
from experiments import celeba, launch, sample
from experiments.configs import celeba as celeba_config

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["steps=6", "log_every=2", "checkpoint_every=4", "batch_size=8"]
SYNTHETIC = [*TINY, "num_seeds=2", "network.widths=(8,)", "network.adversary_features=4", "evaluation.samples=400"]
MNIST = [
    *TINY,
    "evaluation.importance_images=7",
    "evaluation.importance_samples=5",
    "network.channels=2",
    "network.kernel_size=3",
    "network.z_widths=(8,)",
    "network.adversary_features=4",
]


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
def test_slips_are_reported_in_one_line(tmp_path, fields, config, message):
    done = run("synthetic", tmp_path, *SYNTHETIC, *fields, config=config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


CELEBA = [
    *TINY,
    "network.channels=2",
    "network.units=1",
    "network.adversary_channels=2",
    "network.adversary_widths=(8,)",
    "evaluation.images=20",
    "data.size=16",
    "latent_dim=3",
    "noise_dim=3",
]


def test_celeba_end_to_end(tmp_path):
    """A folder of photographs, read from its cache, with the user's own features; then figures of the finished run."""
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(faces.draw(60, 20, 0)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    data_fields = [
        "data.name=images",
        f"data.dir={tmp_path / 'photos'}",
        "data.crop=18",
        "data.held_out=0.4",
        f"data.cache={tmp_path / 'cache'}",
    ]
    fields = [*CELEBA, *data_fields, f"evaluation.features={__name__}:mean_colour"]
    done = run("celeba", tmp_path / "run", *fields)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    quantities = {"elbo", "reconstruction_rmse_pixels", "ms_ssim_samples", "frechet_distance_features"}
    assert {*quantities, "sliced_wasserstein_16"} <= set(results["avb"])
    assert f"20 samples against 20 test images of 16x16x3, 3 features of {__name__}.mean_colour" in done.stdout
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


def test_flags_in_any_order():
    """A field before the config that it changes; the config's own file and variant stay together."""
    given = ["program", "--config.steps=3", "--workdir=here", "--config", "mnist.py:vae", "--config.seed=1"]
    expected = ["program", "--config", "mnist.py:vae", "--config.steps=3", "--workdir=here", "--config.seed=1"]
    assert launch.config_first(given) == expected
    assert launch.config_first(["program", "--config.seed=1", "--config=a.py"]) == [
        "program",
        "--config=a.py",
        "--config.seed=1",
    ]
    assert launch.config_first(["program", "--config.seed=1"]) == ["program", "--config.seed=1"]
