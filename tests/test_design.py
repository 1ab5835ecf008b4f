"""The architecture: which module imports which, and what only one of them knows."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
# A module imports only from those before it.
ORDER = [
    "releases",
    "version",
    "types",
    "settings",
    "locks",
    "processes",
    "streams",
    "network",
    "distributions",
    "models",
    "priors",
    "importance",
    "semi_implicit",
    "divergences",
    "players",
    "contrast",
    "method",
    "methods",
    "networks",
    "transforms",
    "data",
    "training",
    "evaluation",
    "conditional",
    "figures",
    "fitting",
    "inference",
    "families",
    "build",
]
# `load` rebuilds a method from a run's config, and imports what does it when it is called.
LATE = {("fitting", "build")}


def imported(path):
    """The modules of avb_jax that a file imports, by the first name below the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("avb_jax", "experiments"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            assert parts[0] == "avb_jax" or "experiments" in str(path), path


def test_imports_go_up_the_list():
    for path in (ROOT / "avb_jax").rglob("*.py"):
        module = path.relative_to(ROOT / "avb_jax").parts[0].removesuffix(".py")
        if module in ("__init__", "build"):  # which puts together what the package exports
            continue
        for other in imported(path):
            if other != module and (module, other) not in LATE:
                assert ORDER.index(other) < ORDER.index(module), (path, other)
    for path in (ROOT / "avb_jax" / "networks").glob("*.py"):
        assert set(imported(path)) <= {"types", "network", "networks"}, "networks know only flax"
    for path in (ROOT / "avb_jax" / "data").glob("*.py"):
        assert set(imported(path)) <= {"types", "locks", "streams", "data"}, "data knows no methods"


def test_one_place_each_for_orbax_and_devices():
    for path in [*(ROOT / "avb_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        text, name = path.read_text(), path.name
        assert name == "checkpoints.py" or not re.search(r"^\s*(import|from) orbax", text, re.M), path
        devices = re.search(r"jax\.(pmap|device_put|make_mesh)\(|NamedSharding\(|lax\.pmean", text)
        assert not devices or name in ("blocks.py", "devices.py", "run.py", "processes.py", "checkpoints.py"), path
        assert not re.search(r"^\s*(import|from) tensorflow\b", text, re.M), path
