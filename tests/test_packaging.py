"""The package as it is handed out: its numbers agree, its types can be used, its documentation builds, its wheel runs."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import urllib.request
import venv
import zipfile

import numpy as np
import pytest

import avb_jax
from tests import typed_client

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = "jax.*,jaxlib.*,flax.*,optax.*,numpyro.*,numpy.*,orbax.*,matplotlib.*,blackjax.*,scipy.*,sklearn.*,etils.*,PIL.*"


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


def test_the_version_is_said_once_and_the_same_everywhere():
    version = avb_jax.__version__
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_a_typed_client_runs():
    x = np.random.default_rng(0).integers(0, 2, (8, 4)).astype(np.float32)
    assert np.isfinite(typed_client.evaluate(*typed_client.train(x), x))
    assert typed_client.density() is not None


@pytest.mark.skipif(not installed("mypy"), reason="mypy is not installed")
@pytest.mark.parametrize("others", [pytest.param("silent", marks=pytest.mark.slow), "skip"])
def test_what_a_type_checker_sees(others, tmp_path):
    """A caller's code is checked strictly, and a wrong argument is found; other packages' types are `Any`, or their own."""
    settings = [
        "[mypy]",
        "strict = True",
        "follow_imports = silent",
        "ignore_missing_imports = True",
        f"cache_dir = {tmp_path}",
    ]
    (tmp_path / "mypy.ini").write_text("\n".join([*settings, f"[mypy-{OTHERS}]", f"follow_imports = {others}"]))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", str(tmp_path / "mypy.ini")]
    done = subprocess.run([*command, "tests/typed_client.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = "import avb_jax\nstate: int = avb_jax.fit(3, None, steps='x')\n"
    done = subprocess.run([*command, "-c", wrong], cwd=ROOT, capture_output=True, text=True)
    assert all(code in done.stdout for code in ("arg-type", "assignment")), done.stdout
    assert (ROOT / "avb_jax" / "py.typed").exists()


@pytest.mark.slow
@pytest.mark.skipif(not installed("sphinx", "myst_nb", "furo", "sphinx_copybutton"), reason="the extra docs is not installed")
def test_the_documentation_builds_without_warnings(tmp_path):
    fields = ROOT / "docs" / "guides" / "fields.md"
    before = fields.read_text()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert fields.read_text() == before, "docs/guides/fields.md was not up to date with experiments/configs/fields.py"
    for page in ("index", "api/methods", "results/two_latents", "guides/fields", "notebooks/quickstart", "changelog"):
        assert (tmp_path / f"{page}.html").stat().st_size > 5000
    assert "negative_elbo_adversarial" in (tmp_path / "api" / "methods.html").read_text()


def test_links_inside_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for path in re.findall(r"\]\((?!http)([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / path).exists(), (page, path)


@pytest.mark.slow
@pytest.mark.skipif(not installed("sphinx", "myst_nb", "furo", "sphinx_copybutton"), reason="the extra docs is not installed")
def test_links_out_of_the_documentation_lead_somewhere(tmp_path):
    try:
        urllib.request.urlopen("https://arxiv.org/abs/1701.04722", timeout=10).close()
    except OSError as error:
        pytest.skip(f"no network: {error}")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "linkcheck", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (tmp_path / "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not installed("build"), reason="build is not installed")
def test_wheel_and_sdist_run_in_an_empty_environment(tmp_path):
    """Wheel and sdist have what they should; the README's own model trains with nothing else installed."""
    subprocess.run([sys.executable, "-m", "build", "-q", "--outdir", tmp_path, ROOT], check=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"avb_jax/py.typed", "avb_jax/networks/onednn.cc", "avb_jax/inference/fitting.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "experiments", "benchmarks"))]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    (tmp_path / "example.py").write_text(example + "\nprint(images.shape, avb_jax.__version__)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for package, options in ((wheel, ()), (sdist, ("--force-reinstall", "--no-deps"))):
        subprocess.run([python, "-m", "pip", "install", "-q", *options, package], check=True, env=environment)
        done = subprocess.run([python, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.endswith(f"(16, 16) {avb_jax.__version__}\n"), done.stderr
    found = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], check=True, env=environment, capture_output=True, text=True
    ).stdout
    there = {package["name"].lower() for package in json.loads(found)}
    assert not there & {"scikit-learn", "tensorboardx", "array-record", "tensorflow", "torch"}
