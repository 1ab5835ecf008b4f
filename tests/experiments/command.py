"""The experiments' command lines, run here or as a process of their own."""

import contextlib
import importlib
import io
import os
import pathlib
import sys
import warnings
from typing import NamedTuple

from absl import flags

from experiments import launch
from tests.conftest import COMPILE_FAST

ROOT = pathlib.Path(__file__).parents[2]
TINY = ["steps=6", "log_every=2", "checkpoint_every=4", "batch_size=8", "parallel=jit"]
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
ONE_DEVICE = {**os.environ, "XLA_FLAGS": COMPILE_FAST}  # as most users have it


class Finished(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


def arguments(workdir, *fields, config=None) -> list[str]:
    flags_of = [f"--config={config}"] if config else []
    where = [] if workdir is None else [f"--workdir={workdir}"]
    return [*flags_of, *(f"--config.{field}" for field in fields), *where]


def process(experiment, *given, **options) -> list[str]:
    """The command line of a process, which warnings end."""
    options_of_python = ["-W", "error", "-W", "ignore:the load_module"]
    return [sys.executable, *options_of_python, "-m", f"experiments.{experiment}", *arguments(*given, **options)]


def run(experiment, *given, **options) -> Finished:
    """The same in this process, whose imports and compiled programs it shares."""
    out, err, values = io.StringIO(), io.StringIO(), flags.FlagValues()
    main = importlib.import_module(f"experiments.{experiment}").main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the load_module")  # ml_collections' own
        try:
            argv = launch.parse(experiment, [experiment, *arguments(*given, **options)], values)
            launch.start(experiment, main, argv, values)
            status = 0
        except SystemExit as ended:
            status = ended.code
    return Finished(status, out.getvalue(), err.getvalue())
