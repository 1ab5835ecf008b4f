"""The commands as a user runs them, at tiny size, and what they do with slips."""

import json
import platform
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import avb_jax
from avb_jax import UserError
from avb_jax.data import faces
from experiments import celeba, launch, sample
from experiments.configs import celeba as celeba_config
from experiments.configs import mnist as mnist_config
from tests.experiments.command import MNIST, ONE_DEVICE, ROOT, SYNTHETIC, TINY, process, run


def test_synthetic_interrupted_and_not(tmp_path):
    """SIGINT in the middle of a process; the same command finishes; all it writes equals what a run without a stop writes."""
    fields = [*SYNTHETIC, "steps=600", "checkpoint_every=600"]
    line = process("synthetic", tmp_path / "a", *fields)
    running = subprocess.Popen(line, cwd=ROOT, env=ONE_DEVICE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "a" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 130, errors
    assert "from which it continues" in errors
    assert "Traceback" not in errors
    stopped = len(metrics.read_text().splitlines())
    assert stopped < 300
    with metrics.open("a") as file:
        file.write('{"method": "avb", "st')  # as a power cut would leave it
    resumed, whole = run("synthetic", tmp_path / "a", *fields), run("synthetic", tmp_path / "b", *fields)
    assert f"avb: continues at step {2 * stopped} of 600" in resumed.stderr
    assert whole.returncode == 0, whole.stderr
    results, of_whole = (json.loads((tmp_path / side / "results.json").read_text()) for side in "ab")
    assert results == of_whole
    lines, of_whole = (
        [{k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in path.read_text().splitlines()]
        for path in (metrics, tmp_path / "b" / "metrics.jsonl")
    )
    assert lines == of_whole

    assert "avb: 600 steps of 8, 2 seeds, 4 examples of 2x2, on " in whole.stderr
    assert "log-likelihood" in whole.stdout
    assert "-1.462" in whole.stdout
    for method in ("avb", "vae"):
        for quantity in ("log_likelihood", "elbo", "reconstruction_error", "kl_aggregated_posterior"):
            number = results[method][quantity]
            assert len(number["per_seed"]) == 2
            assert np.isclose(number["mean"], np.mean(number["per_seed"]))
            assert np.isclose(number["standard_error"], np.std(number["per_seed"], ddof=1) / np.sqrt(2))
    assert results["vae"]["kl_aggregated_posterior_quadrature"]["mean"] > 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["steps"] == 600
    with Image.open(tmp_path / "a" / "figures" / "figure_3.png") as figure:
        assert figure.size > (900, 500)
    steps = [(line["method"], line["step"]) for line in lines if "elbo" in line]
    assert steps == [(method, step) for method in ("avb", "vae") for step in range(2, 602, 2)]
    assert len(lines[0]["per_seed"]["elbo"]) == 2
    assert list((tmp_path / "a" / "tensorboard" / "avb").iterdir())

    other = run("synthetic", tmp_path / "a", *fields, "seed=1", "optimizer.b1=0.9")
    assert other.returncode == 2
    assert "holds a run of another config" in other.stderr
    assert "seed: 0 there, 1 now" in other.stderr
    assert "optimizer.b1: 0.5 there, 0.9 now" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_mnist_with_convolutions(tmp_path, idx_folder):
    done = run("mnist", tmp_path, *MNIST, f"data.dir={idx_folder}", "likelihood=gaussian")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"log_likelihood", "elbo", "reconstruction_error", "kl_aggregated_posterior", "kl"} <= set(results["avb"])
    assert results["avb"]["elbo"]["standard_error"] is None
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"avb_samples_000004.png", "avb_reconstructions_000006.png"} <= names


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        (["stepz=1"], None, "stepz"),
        (["steps=ten"], None, "steps"),
        ([], "experiments/configs/synthetic.py:huge", "no such variant; there are full, semi_implicit, paper"),
        ([], "experiments/configs/nowhere.py", "nowhere.py"),
        (["method=avb,flow"], None, "method='flow': must be one of avb, vae"),
        (["optimizer.decoder_rate=1e30"], None, "is not finite by step"),
        (["data.name=mnist", "data.dir=/nowhere"], None, "data.dir='/nowhere': no such folder"),
        (["restore_from=/nowhere:3"], None, "workdir=/nowhere: no checkpoint of avb"),
        (["start_from=/nowhere"], None, "start_from=/nowhere: workdir=/nowhere: no run there"),
        (["restore_from=/a", "start_from=/b"], None, "start_from=/b: restore_from is given as well; leave one of them out"),
        (["seed=4294967297"], None, "seed=4294967297: must be below 2**32"),
    ],
)
def test_slips_are_reported_in_one_line(tmp_path, fields, config, message):
    done = run("synthetic", tmp_path, *SYNTHETIC, *fields, config=config)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert ("not finite" in message) == (tmp_path / "config.json").exists()  # a slip does not claim the workdir


@pytest.mark.slow
def test_a_run_begins_where_another_was(tmp_path):
    """At the step that is named, with the other's State; and it continues by itself, without the other."""
    fields = [*SYNTHETIC, "method=vae", "optimizer.schedule=constant"]
    assert run("synthetic", tmp_path / "a", *fields).returncode == 0
    for step, expected in ((None, 6), (4, 4)):
        loaded = avb_jax.load(tmp_path / "a", step=step)
        assert (loaded.state.step.tolist(), loaded.num_seeds, loaded.method.name) == ([expected] * 2, 2, "vae")
    other = [*fields, f"restore_from={tmp_path / 'a'}:4", "optimizer.encoder_rate=1e-4"]
    done = run("synthetic", tmp_path / "b", *other)
    assert done.returncode == 0, done.stderr
    assert "vae: continues at step 4 of 6" in done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [6]
    shutil.rmtree(tmp_path / "a")
    again = run("synthetic", tmp_path / "b", *other)
    assert again.returncode == 0, again.stderr
    assert "vae: finished at step 6 of 6" in again.stderr
    missing = run("synthetic", tmp_path / "c", *fields, f"restore_from={tmp_path / 'b'}:5")
    assert "has no state of step 5; it has 6" in missing.stderr


@pytest.mark.slow
def test_a_run_begins_with_the_players_of_another_method_s(tmp_path):
    """At step 0, with the VAE's posterior and decoder, their averages, and a T of its own; another size is a slip."""
    fields = [*SYNTHETIC, "steps=2", "ema_decay=0.5", "contrast.kind=gaussian", "contrast.gaussian_share=1"]
    assert run("synthetic", tmp_path / "a", *fields, "method=vae").returncode == 0
    done = run(
        "synthetic", tmp_path / "b", *fields, "method=avb", f"start_from={tmp_path / 'a'}", "optimizer.decoder_rate=1e-9"
    )
    assert done.returncode == 0, done.stderr
    assert f"avb: begins with encoder and decoder of vae, step 2, in {tmp_path / 'a'}" in done.stderr
    vae, avb = (avb_jax.load(tmp_path / name).state for name in "ab")
    assert avb.step.tolist() == [2, 2]
    chex.assert_trees_all_close(avb.params.decoder, vae.ema.params.decoder, rtol=1e-4, atol=1e-7)
    again = run("synthetic", tmp_path / "b", *fields, "method=avb", "start_from=nowhere", "optimizer.decoder_rate=1e-9")
    assert "avb: finished at step 2 of 2" in again.stderr  # it needs the other run no longer
    other = run("synthetic", tmp_path / "c", *fields, "method=avb", f"start_from={tmp_path / 'a'}", "network.widths=(9,)")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 2), other.stderr
    assert "decoder['Dense_0']['kernel'] is (2, 8, 4) there, (2, 9, 4) here" in other.stderr


def test_what_is_the_matter_with_files_is_a_line(tmp_path):
    """And whatever is wrong with a checkpoint a warning, in one line too."""
    fields, folder = [*SYNTHETIC, "method=vae"], tmp_path / "run"
    (tmp_path / "file").write_text("")
    done = run("synthetic", tmp_path / "file", *fields)
    assert (done.returncode, done.stderr.splitlines()[-1][:14]) == (2, "error: workdir"), done.stderr
    assert run("synthetic", folder, *fields).returncode == 0
    (folder / "checkpoints" / "vae" / "6" / "about.json").unlink()
    done = run("synthetic", folder, *fields)
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert "the state of step 6 is damaged (about.json cannot be read): that of step 4 is taken" in said
    assert done.returncode == 0, done.stderr
    (folder / "config.json").write_text("{")
    done = run("evaluate", folder)
    assert done.returncode == 2
    assert f"error: {folder / 'config.json'}: is not what was written there" in done.stderr


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


@pytest.mark.slow
def test_celeba_end_to_end(tmp_path, capsys):
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
    assert "steps show that everything runs; pictures are colour noise until some 1000: --config.steps" in done.stdout
    assert f"20 samples against 20 test images of 16x16x3, 3 features of {__name__}.mean_colour" in done.stdout
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"avb_samples_000004.png", "avb_interpolation_000006.png", "avb_neighbours_000006.png"} <= names
    options = [f"--workdir={tmp_path / 'run'}", "--figure=interpolation", "--method=avb", f"--out={tmp_path / 'here.png'}"]
    values = sample.define(flags.FlagValues())
    values(["sample", *options])
    sample.main([], values)
    assert capsys.readouterr().out.strip() == str(tmp_path / "here.png")
    assert (tmp_path / "here.png").exists()
    assert sample.draw(tmp_path / "run", "neighbours") == tmp_path / "run" / "figures" / "avb_neighbours.png"
    config = celeba_config.get_config("smoke")
    config.evaluation.features = "nowhere:nothing"
    with pytest.raises(UserError, match=r"evaluation\.features='nowhere:nothing': not MODULE:FUNCTION"):
        celeba.main(config, tmp_path / "other")


def mean_colour(images):
    """Features for a Frechet distance [B, 3]."""
    return images.mean(axis=(1, 2))


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own
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

    values = flags.FlagValues()
    launch.parse("mnist", ["mnist", "--config.steps=3", f"--config={launch.CONFIGS / 'mnist.py'}:vae"], values)
    assert (values.config.steps, values.config.method) == (3, "vae")


PROGRAMS_OF = launch.programs_of  # the fixture `trace_what_is_patched` has another in its place


def test_a_program_is_another_for_every_field_that_it_depends_on(monkeypatch, tmp_path):
    def traced(*changes, where=str(tmp_path)):
        config, times = mnist_config.get_config(), []
        config.update_from_flattened_dict(dict(changes))
        with monkeypatch.context() as patch:
            patch.setattr(launch, "jax", SimpleNamespace(config=SimpleNamespace(jax_compilation_cache_dir=where)))
            programs = PROGRAMS_OF(config)
        programs.keep("f", lambda x: times.append(1) or x, jax.devices()[:1])(1.0)
        return bool(times)

    assert traced()
    assert not traced()
    assert not traced(
        ("seed", 3), ("data.dir", "elsewhere"), ("restore_from", "a"), ("start_from", "b"), ("evaluation.draws", 2)
    )
    assert traced(("optimizer.encoder_rate", 0.5))
    assert traced(("method", "vae"))
    assert all(traced(where=where) for where in (None, None, "gs://bucket/programs", "gs://bucket/programs"))


def test_compiled_programs_are_kept_by_host_unless_jax_is_told_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given, expected in (("there", None), (None, str(tmp_path / "avb_jax" / "programs" / platform.node()))):
        changed = {}
        config = SimpleNamespace(jax_compilation_cache_dir=given, update=changed.__setitem__)
        monkeypatch.setattr(launch, "jax", SimpleNamespace(config=config))
        launch.keep_programs()
        assert changed.get("jax_compilation_cache_dir") == expected
