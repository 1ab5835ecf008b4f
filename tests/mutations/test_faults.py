"""Puts every fault of `faults.toml` into a copy of the code, one at a time, and expects its tests to fail.

    pytest -m slow tests/mutations                       # all, and a line for each that went unnoticed
    pytest -m slow tests/mutations -k 'AVB and floor'    # those whose names have these words

A fault is a name, a file, the code as it is (which must occur there once) and as it is with the slip; and the tests that have
to notice, as pytest takes them. To add one, add it to the file: it should be a slip that a careful person could make, and
alter what is computed.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = tomllib.loads((pathlib.Path(__file__).parent / "faults.toml").read_text())["fault"]


def with_fault(fault: dict) -> str:
    """The file's text with the slip."""
    text = (ROOT / fault["file"]).read_text()
    old, new = fault["old"].strip("\n"), fault["new"].strip("\n")
    assert text.count(old) == 1, f"{fault['name']}: {fault['file']} has this code {text.count(old)} times: {old}"
    return text.replace(old, new)


def test_faults_are_of_the_code_as_it_is():
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        compile(with_fault(fault), fault["file"], "exec")
        for word in shlex.split(fault["tests"]):
            assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists(), fault["name"]


def run(tests: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs the tests on the code in a folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *shlex.split(tests)]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_COMPILATION_CACHE_DIR": cache}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted({fault["tests"] for fault in FAULTS}))
def test_without_a_fault_nothing_is_noticed(tests):
    """Or else the fault would be no reason for a test to fail."""
    done = run(tests, ROOT)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=[fault["name"] for fault in FAULTS])
def test_a_fault_is_noticed(fault, tmp_path):
    for folder in ("avb_jax", "experiments", "examples", "benchmarks", "tests", "notebooks", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / fault["file"]).write_text(with_fault(fault))
    done = run(fault["tests"], tmp_path)
    last = "\n".join(done.stdout.splitlines()[-15:])
    assert done.returncode == 1, f"{fault['name']} went unnoticed by {fault['tests']} (status {done.returncode}):\n{last}"
