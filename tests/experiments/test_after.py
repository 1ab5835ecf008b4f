"""What comes after a training: samples and codes as files, figures, the report."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from absl import flags
from PIL import Image

from avb_jax import UserError
from experiments import launch, report
from experiments.configs import eight_schools
from tests.experiments.command import MNIST, TINY, run

FIELDS = [
    *MNIST,
    "network.family=mlp",
    "network.widths=(8,)",
    "data.name=digits",
    "latent_dim=2",
    "num_seeds=2",
    "method=avb,gan",
    "evaluation.chunk=50",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run on digits, of two methods and seeds, with two latents."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = run("mnist", folder, *FIELDS)
    assert done.returncode == 0, done.stderr
    return folder, done


def command(name, capsys, *others, **given):
    """A command with flags of its own, and arguments that are none; what it printed, and its status."""
    module = importlib.import_module(f"experiments.{name}")
    values = module.define(flags.FlagValues())
    values([name, *(f"--{flag}={value}" for flag, value in given.items())])
    try:
        module.main([name, *others], values)
        status = 0
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out.strip(), captured.err


def arrays(path):
    """What is in an .npz file."""
    with np.load(path) as found:
        return dict(found)


@pytest.mark.slow
def test_a_training_says_what_it_evaluates(trained):
    assert re.search(r"avb estimate +\d+/\d+ +seed 1, reconstruction", trained[1].stderr)


def test_a_training_of_two_latents_leaves_a_film(trained):
    figures = trained[0] / "figures"
    for figure in ("latent_plane", "codes"):
        with Image.open(figures / f"avb_{figure}.gif") as film:
            assert film.n_frames == len(list(figures.glob(f"avb_{figure}_*.png"))) == 2
    assert not list(figures.glob("gan_reconstructions*"))
    assert list(figures.glob("gan_latent_plane_*.png"))


@pytest.mark.parametrize("figure", ["spherical", "traversals", "codes", "neighbours"])
@pytest.mark.slow
def test_figures(trained, capsys, figure):
    status, out, _ = command("sample", capsys, workdir=trained[0], figure=figure)
    assert status == 0
    with Image.open(out) as picture:
        assert picture.width > 300


def test_samples_as_files(trained, tmp_path, capsys):
    status, out, _ = command("sample", capsys, workdir=trained[0], count=7, out=tmp_path / "png")
    assert (status, out) == (0, str(tmp_path / "png"))
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{i:06}.png" for i in range(7)]
    _, out, _ = command("sample", capsys, workdir=trained[0], count=7, out=tmp_path / "x.npz")
    x = arrays(out)["x"]
    assert x.shape == (7, 8, 8)
    with Image.open(tmp_path / "png" / "000003.png") as image:
        np.testing.assert_allclose(np.asarray(image) / 255, x[3], atol=1 / 255)
    status, _, err = command("sample", capsys, workdir=trained[0], count=-1)
    assert status == 2
    assert "--count=-1: must be at least 1" in err


def test_codes_as_a_file(trained, capsys):
    status, out, _ = command("encode", capsys, workdir=trained[0])
    found = arrays(out)
    assert status == 0
    assert found["z"].shape == (299, 2)
    assert found["labels"].shape == (299,)
    assert set(found["labels"]) == set(range(10))
    _, out, _ = command("encode", capsys, workdir=trained[0], split="train", draws=3)
    assert arrays(out)["z"].shape == (1498, 3, 2)
    status, _, err = command("encode", capsys, workdir=trained[0], method="gan")
    assert status == 2
    assert "--method=gan: has no encoder" in err


def test_a_report_is_one_page(trained, tmp_path, capsys):
    """Numbers, curves, pictures and the config in it, and nothing that it would have to fetch."""
    status, out, _ = command("report", capsys, workdir=trained[0])
    page = pathlib.Path(out).read_text()
    assert status == 0
    assert "<svg" in page
    assert page.count("data:image/png;base64,") >= 3
    assert "data:image/gif;base64," in page
    assert not re.search(r'(src|href)="?\'?http', page)
    for text in ("latent_dim", "log likelihood", "&plusmn;", "<th>gan</th>", "<!-- gan -->"):  # the last in the curves' legend
        assert text in page
    other = tmp_path / "other"
    shutil.copytree(trained[0], other)
    config = (other / "config.json").read_text().replace('"noise_dim": 32', '"noise_dim": 33')
    (other / "config.json").write_text(config)
    status, out, _ = command("report", capsys, other, workdir=trained[0], out=tmp_path / "both.html")
    both = pathlib.Path(out).read_text()
    assert re.search(r"<tr class='differs'><td><code>noise_dim</code></td><td>32</td><td>33</td>", both)
    assert "other: avb" in both
    status, _, err = command("report", capsys, workdir=tmp_path / "nothing")
    assert status == 2
    assert "no run there" in err


def test_a_run_without_a_data_set_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(eight_schools.get_config("smoke").to_json())
    for name, given in (("sample", {"figure": "samples"}), ("encode", {"split": "test"})):
        status, _, err = command(name, capsys, workdir=tmp_path, **given)
        assert status == 2
        assert f"workdir={tmp_path}: a run of eight_schools, which has no data set; name one of" in err


def test_the_last_comparison_and_the_runs_in_it(tmp_path, monkeypatch):
    """A comparison is a directory of runs: it is found by its own command, and the latest of its runs by those that read."""
    monkeypatch.chdir(tmp_path)
    found = pathlib.Path("runs") / "compare-digits-20260101-000000"
    for i, run_in_it in enumerate(
        (found / "vae", found / "avb", pathlib.Path("runs") / "compare-mnist-20260102-000000" / "vae")
    ):
        (tmp_path / run_in_it).mkdir(parents=True)
        (tmp_path / run_in_it / "config.json").write_text("{}")
        os.utime(tmp_path / run_in_it / "config.json", (i, 10 - i))
    assert launch.folder_of("compare", "digits", "last") == found
    assert launch.folder_of("sample", "", "last") == found / "vae"
    new = launch.folder_of("compare", "digits", None)
    assert re.fullmatch(r"runs/compare-digits-\d{8}-\d{6}", str(new))
    with pytest.raises(UserError, match="--workdir=last: no run of compare-faces in"):
        launch.folder_of("compare", "faces", "last")


@pytest.mark.slow
def test_run_directories(trained, tmp_path, monkeypatch, capsys):
    """A new one each time by default; the last one by its name."""
    monkeypatch.chdir(tmp_path)
    fields = [
        *TINY,
        "num_seeds=1",
        "network.widths=(4,)",
        "network.adversary_features=4",
        "evaluation.samples=200",
        "method=vae",
    ]
    first, second = (run("synthetic", None, *fields) for _ in range(2))
    assert first.returncode == second.returncode == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"synthetic-\d{8}-\d{6}(-1)?", folder.name) for folder in folders)
    latest = max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)  # a run that goes on writes it anew
    again = run("synthetic", "last", *fields)
    assert "vae: finished at step 6 of 6" in again.stderr
    assert f"--workdir={latest.relative_to(tmp_path)}\n" in again.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 2
    status, out, _ = command("sample", capsys, workdir="last", figure="samples")
    assert status == 0
    assert out.startswith("runs/synthetic-")
    other = run("mnist", "last", *FIELDS)
    assert (other.returncode, "no run of mnist in" in other.stderr) == (2, True)
    assert "--workdir: give the run's directory, or last" in run("evaluate", None).stderr


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chromium here")
def test_a_report_in_a_browser(trained, tmp_path):
    """Headless Chromium draws it, with text and pictures."""
    page = tmp_path / "report.html"
    page.write_text(report.page([trained[0]]))
    browser, shot = shutil.which("chromium") or shutil.which("google-chrome"), tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--window-size=1100,2400", f"--screenshot={shot}"]
    subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture:
        assert len(np.unique(np.asarray(picture.convert("L").resize((110, 240))))) > 50
