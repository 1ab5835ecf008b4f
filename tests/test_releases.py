"""Bad releases of jaxlib: what pip is kept from, and the warning where one is there all the same."""

import configparser
import os
import pathlib
import subprocess
import sys
import warnings
from importlib import metadata

import jax
import jaxlib
import pytest
from packaging.requirements import Requirement

from avb_jax import releases

ROOT = pathlib.Path(__file__).parents[1]


def test_setup_excludes_the_bad_releases_and_no_others():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [Requirement(line) for line in setup["options"]["install_requires"].split("\n") if line]
    for package in ("jax", "jaxlib"):
        (requirement,) = (line for line in lines if line.name == package)
        assert {rule.version for rule in requirement.specifier if rule.operator == "!="} == set(releases.BAD)
    assert all(any(fault.platform == "cpu" for fault in faults) for faults in releases.BAD.values())


@pytest.mark.parametrize(
    ("version", "platforms", "plugins", "reported"),
    [
        ("0.10.2", None, [], {"CPUs"}),
        ("0.10.2", None, ["a GPU's"], {"CPUs", "GPUs"}),
        ("0.10.2", "cpu", ["a GPU's"], {"CPUs"}),
        ("0.10.2", "cuda,cpu", [], {"CPUs", "GPUs"}),
        ("0.11.1", "cuda", [], {"GPUs"}),
        ("0.11.1", "tpu", [], set()),
        ("0.10.1", None, [], set()),
        ("0.11.2", None, ["a GPU's"], set()),
    ],
)
def test_a_bad_release_is_reported_where_it_may_run(monkeypatch, version, platforms, plugins, reported):
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.setattr(metadata, "entry_points", lambda group: plugins if group == "jax_plugins" else [])
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            releases.warn()
    finally:
        jax.config.update("jax_platforms", before)
    text = "".join(str(warning.message) for warning in caught)
    assert {platform for platform in ("CPUs", "GPUs") if f"on {platform} " in text} == reported
    assert len(caught) == bool(reported)
    if reported:
        assert text.startswith(f"jaxlib {version} is known to be bad: ")
        assert releases.BAD[version][-1 if "GPUs" in reported else 0].thread in text
        assert "pip install -U 'jax!=0.10.2," in text


def test_importing_warns_at_the_importing_line_and_starts_no_backend():
    code = (
        "import jaxlib; jaxlib.__version__ = '0.10.2'\n"
        "import avb_jax, jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)  # refused once a backend has started\n"
        "import experiments.mnist, experiments.synthetic, sys\n"
        "later = {'matplotlib', 'orbax', 'scipy.ndimage', 'scipy.spatial', 'tensorboardX'}\n"
        "print(jax.device_count(), later & set(sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<string>:2: RuntimeWarning: jaxlib 0.10.2 is known to be bad: on CPUs" in done.stderr
    assert done.stdout == "3 set()\n"
