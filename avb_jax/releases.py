"""Releases of jaxlib that are known to be bad at what this library does. Imports nothing of ours.

The compiler is jaxlib's, and one jax allows several releases of it, so that jaxlib's version is what counts. `setup.cfg`
excludes `BAD` by name, of jax too, so that pip finds a pair that fits; a test holds the lists together. For environments made
otherwise, importing `avb_jax` warns.

It takes a fault on CPUs to be excluded: pip does not know the device, and Python 3.11 has no release after 0.10.2. On GPUs take
a later Python and jaxlib 0.11.2 or later. 0.10.0 and 0.10.1 have a report of a vmapped scan with wrong results on a GPU
(https://github.com/jax-ml/jax/issues/36958), and may well have the fault in a product and its bias that is listed below. On
CPUs all releases up to 0.12.0.1 copy an array onto its own shifted slice wrongly, which nothing here does
(https://github.com/openxla/xla/issues/49176).
"""

import warnings
from importlib import metadata
from typing import NamedTuple

import jax
import jaxlib

THREADS = "https://github.com/jax-ml/jax/issues/"


class Fault(NamedTuple):
    """What a release gets wrong."""

    platform: str  # "cpu" or "gpu"
    what: str
    thread: str  # where it was reported


_BIAS = Fault("gpu", "a constant times (x @ w + b) is not applied to b", THREADS + "39336")
_OPERATORS = Fault("gpu", "operators outside jit return wrong values or NaNs on some cards", THREADS + "40633")

BAD = {
    "0.10.2": (
        Fault("cpu", "a matrix times each of many vectors, summed over, is wrong for the last ones", THREADS + "39103"),
        Fault("cpu", "arctan of 50 numbers or more is wrong on some processors", THREADS + "39352"),
        Fault("cpu", "sums over arrays of rank 7 crash", THREADS + "40412"),
        _BIAS,
    ),
    "0.11.0": (Fault("cpu", "sums over arrays of rank 8 crash or hang", THREADS + "39257"), _BIAS, _OPERATORS),
    "0.11.1": (Fault("cpu", "a scan with small outputs takes time quadratic in its length", THREADS + "40101"), _OPERATORS),
}


def warn() -> None:
    """Warns (RuntimeWarning) where the jaxlib that is installed is one of `BAD` and what is wrong may run.

    To ask JAX for its platform would start the backend, and `jax.distributed.initialize()` has to come before that. So a
    platform may run unless `jax_platforms` (JAX_PLATFORMS) names others only. Where it names none, the CPU may, which JAX
    starts next to any other and falls back to, and a GPU may where a plugin for devices is installed. With JAX_PLATFORMS=cuda
    nothing is said of CPUs.
    """
    faults = [fault for fault in BAD.get(jaxlib.__version__, ()) if _may_run(fault.platform)]
    if faults:
        reasons = "; ".join(f"on {fault.platform.upper()}s {fault.what} ({fault.thread})" for fault in faults)
        others = ",".join(f"!={version}" for version in BAD)
        remedy = f"install another: pip install -U 'jax{others}' 'jaxlib{others}'"
        warnings.warn(f"jaxlib {jaxlib.__version__} is known to be bad: {reasons}; {remedy}", RuntimeWarning, stacklevel=3)


def _may_run(platform: str) -> bool:
    if named := jax.config.jax_platforms:
        return bool(set(named.split(",")) & {"cpu": {"cpu"}, "gpu": {"gpu", "cuda", "rocm"}}[platform])
    return platform == "cpu" or bool(metadata.entry_points(group="jax_plugins"))
