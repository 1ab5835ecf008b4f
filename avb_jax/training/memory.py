"""Whether steps fit into memory, before anything is compiled: bounded from below, so that nothing is refused that could."""

import math
import os
import pathlib
from collections.abc import Sequence

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# What writes its result to memory, or comes to a loop that does. Everything else can become part of what reads it.
_WRITTEN = {"dot_general", "conv_general_dilated", "ffi_call", "scan", "while", "sort"}
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def needed(program: Jaxpr) -> int:
    """Bytes that a program needs at once, at least: its arguments, and products that are read again later.

    Counted from a product to the last operation that reads it directly, which leaves out activations made of it.
    """
    last = {var: i for i, equation in enumerate(program.eqns) for var in _variables(equation.invars)}
    last |= dict.fromkeys(_variables(program.outvars), len(program.eqns))
    written: dict = {}
    now = peak = _arguments(program)
    for i, equation in enumerate(program.eqns):
        peak = max(peak, now + _devices(equation) * max((needed(one) - _arguments(one) for one in _inner(equation)), default=0))
        if _writes(equation):
            new = {var: _bytes(var) for var in equation.outvars if var in last}
            written |= new
            now += sum(new.values())
        peak = max(peak, now)
        now -= sum(written.pop(var, 0) for var in set(_variables(equation.invars)) if last[var] == i)
    return peak


def available(devices: list) -> int | None:
    """Bytes that the devices have together; of CPUs, what their machines have; None where that is unknown."""
    if devices[0].platform != "cpu":
        stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
        if not all(of and "bytes_limit" in of for of in stats):
            return None
        return sum(of["bytes_limit"] for of in stats) * jax.process_count()
    try:
        here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    except (OSError, ValueError):
        return None
    return min(here, int(limit) if limit.isdecimal() else here) * jax.process_count()


def _writes(equation: JaxprEqn) -> bool:
    return equation.primitive.name in _WRITTEN or any(_writes(one) for inner in _inner(equation) for one in inner.eqns)


def _arguments(program: Jaxpr) -> int:
    """Bytes of what a program is given; of an inner one, these are counted where they come from."""
    return sum(_bytes(var) for var in (*program.invars, *program.constvars))


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    values = [value for given in equation.params.values() for value in (given if isinstance(given, tuple | list) else [given])]
    found = (value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in values)
    return [value for value in found if isinstance(value, Jaxpr)]


def _variables(atoms: Sequence) -> list:
    """Without literals, which are part of the program."""
    return [atom for atom in atoms if not hasattr(atom, "val")]


def _devices(equation: JaxprEqn) -> int:
    """How many devices run the equation's inner program, each with arrays of its own."""
    if equation.primitive.name == "shard_map":
        return equation.params["mesh"].size
    return equation.params["global_axis_size"] if equation.primitive.name == "xla_pmap" else 1


def _bytes(var) -> int:
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)
