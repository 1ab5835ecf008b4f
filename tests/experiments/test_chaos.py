"""Runs that are killed again and again at moments of chance end as those that were left alone: bit for bit.

    pytest -m slow tests/experiments/test_chaos.py      # 50 kills, a quarter of an hour

SIGKILL, SIGTERM and SIGINT in turn; the moments are of a generator with a fixed seed, and what a process is doing then is up to
the machine.
"""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from avb_jax.data import faces
from tests.experiments.command import MNIST, ONE_DEVICE, ROOT, SYNTHETIC, process

KILLS, SIGNALS = 10, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
FACES = ["data.name=drawn_faces", "data.size=16", "network.channels=2", "network.units=1", "network.adversary_channels=2"]
FACES += [
    "network.adversary_widths=(8,)",
    "evaluation.images=20",
    "latent_dim=3",
    "noise_dim=3",
    "parallel=jit",
    "batch_size=8",
]
LONG = ["steps=4000", "log_every=20", "checkpoint_every=100"]
TRAININGS = {
    "synthetic": ("synthetic", [*SYNTHETIC, *LONG, "method=avb,vae", "steps=20000", "checkpoint_every=200"]),
    "digits": ("mnist", [*MNIST, *LONG, "data.name=digits", "method=avb"]),
    "faces": ("celeba", [*FACES, *LONG, "method=avb", "steps=1000"]),
}


@pytest.fixture(autouse=True)
def heard():
    """SIGINT, as in a terminal: what a shell starts in the background ignores it, and so would what is started here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(line):
    return subprocess.Popen(line, cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed(line, kills, within, seed=0):
    """Starts a command again whenever it has been killed, and then lets it end; returns how many kills it lived through."""
    moments, landed = random.Random(seed), 0
    for number in range(kills):
        running = start(line)
        try:
            running.communicate(timeout=moments.uniform(0.0, within))
            break  # it was faster
        except subprocess.TimeoutExpired:
            running.send_signal(SIGNALS[number % len(SIGNALS)])
            _, errors = running.communicate(timeout=120)
            # While Python still imports, SIGINT ends it as any program of Python's.
            assert "Traceback" not in errors or running.returncode in (130, -signal.SIGINT), errors
            landed += 1
    running = start(line)
    _, errors = running.communicate(timeout=900)
    assert running.returncode == 0, errors
    assert "Traceback" not in errors, errors
    return landed


def left(folder):
    """What a run has left that has to be the same: digests of every array, lines, results.

    Of the checkpoints the newest: the one before may be of a step at which the run was stopped.
    """
    kept = [max(steps.iterdir(), key=lambda path: int(path.name)) for steps in (folder / "checkpoints").iterdir()]
    kept += folder.glob("best/*/*")
    states = {path.relative_to(folder).as_posix(): json.loads((path / "about.json").read_text())["arrays"] for path in kept}
    looked = "held_out" in (folder / "metrics.jsonl").read_text()
    assert any(name.startswith("best/") for name in states) == looked
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("examples_per_second")
    return states, lines, json.loads((folder / "results.json").read_text())


def compare(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_trainings(name, tmp_path):
    experiment, fields = TRAININGS[name]
    begun = time.monotonic()
    alone = start(process(experiment, tmp_path / "alone", *fields))
    _, errors = alone.communicate(timeout=900)
    assert alone.returncode == 0, errors
    seconds = time.monotonic() - begun
    landed = killed(process(experiment, tmp_path / "killed", *fields), KILLS, min(0.6 * seconds, 20.0))
    assert landed >= KILLS // 2, f"only {landed} kills landed: {seconds:.0f} seconds are too few"
    compare(left(tmp_path / "killed"), left(tmp_path / "alone"))
    print(f"{name}: {landed} kills")


@pytest.mark.slow
def test_killed_evaluations(tmp_path):
    """Each estimator's results are kept by blocks; what is in `results.json` in the end is the same."""
    training = start(process("mnist", tmp_path, *MNIST, "data.name=digits", "method=avb", "num_seeds=1"))
    _, errors = training.communicate(timeout=900)
    assert training.returncode == 0, errors
    before = (tmp_path / "results.json").read_text()
    fields = ["estimators=elbo,importance,ais,moments", "ais.images=200", "ais.chains=4", "ais.temperatures=100", "ais.chunk=1"]
    fields += ["importance.images=1000", "importance.samples=2000", "importance.chunk=2"]
    alone = start(process("evaluate", tmp_path, *fields))
    _, errors = alone.communicate(timeout=900)
    assert alone.returncode == 0, errors
    expected = (tmp_path / "results.json").read_text()
    for path in (tmp_path / "evaluation").rglob("*.npz"):
        path.unlink()
    (tmp_path / "results.json").write_text(before)
    print(f"evaluate: {killed(process('evaluate', tmp_path, *fields), KILLS, 15.0)} kills")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(expected)


@pytest.mark.slow
def test_killed_builds_of_a_cache(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(faces.draw(600, 24, 0)):
        for copy in range(10):
            Image.fromarray(image).resize((300, 300)).save(tmp_path / "photos" / f"{i}-{copy}.jpg")
    line = "import sys, pathlib; from avb_jax.data import images; images.BLOCK = 64; "
    line += "images.cached(images.from_folder(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), 32)"
    build = [sys.executable, "-c", line, str(tmp_path / "photos")]
    subprocess.run([*build, str(tmp_path / "alone")], check=True, cwd=ROOT, env=ONE_DEVICE, capture_output=True)
    print(f"cache: {killed([*build, str(tmp_path / 'killed')], KILLS, 8.0)} kills")
    found, expected = (np.fromfile(tmp_path / side / "pixels.bin", np.uint8) for side in ("killed", "alone"))
    np.testing.assert_array_equal(found, expected)
