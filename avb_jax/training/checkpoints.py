"""States on disk: each whole or not at all, and read back only as it was written.

The only place that knows Orbax, and imports it where a State is written or read: that takes half a second. A run's folder has
a folder per step, with Orbax's checkpoint in `state/` and next to it `about.json`: the format's number, the shape, type and
SHA-256 of every array, and the SHA-256 of every file. Reading never writes, so that a run can be looked at while it trains.
"""

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import processes
from avb_jax.types import Array, PyTree, State, UserError

FORMAT = 1
KEPT = 2
_UNFINISHED, _REMOVED, _DAMAGED = ".unfinished", ".removed", ".damaged"


class Damaged(Exception):
    """What is on disk is not what was written."""


def steps(folder: pathlib.Path) -> list[int]:
    """The steps whose States are there, in order; what else lies in the folder does not count."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdecimal() and path.is_dir())


def save(folder: pathlib.Path, step: int, state: State, kept: int = KEPT, before: Callable[[], None] = lambda: None) -> None:
    """Writes the State of `step`, and then removes all but the latest `kept`; one that is there already stays.

    What belongs to the step and is written elsewhere comes `before` the State counts: a run that is killed in between begins
    again from an earlier one, and writes both anew.

    Raises:
      UserError: it cannot be written; what was there before stays.
    """
    if step not in steps(folder):
        from orbax.checkpoint import v1 as ocp

        path, state = folder.absolute() / f"{step}{_UNFINISHED}", key_data(state)
        try:
            ocp.save(path / "state", state)  # by all processes
        except (OSError, ValueError, RuntimeError) as error:
            full = "No space left on device" in str(error)
            reason = "no space is left on the device" if full else (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{folder}: the state of step {step} could not be written ({reason}); make room, and the same command "
                "continues from the state before"
            ) from error
        if processes.first():
            (path / "about.json").write_text(json.dumps(_about(state, path / "state"), indent=1) + "\n")
            try:
                before()
            finally:
                path.rename(folder / str(step))
    elif processes.first():
        before()
    if processes.first():
        remove(folder, steps(folder)[:-kept])
    processes.wait(f"{folder} {step}")


def keep(folder: pathlib.Path, step: int, to: pathlib.Path, found: dict[str, Any]) -> None:
    """Keeps the State of `step` in another folder as well, in the place of what is there, with what was found of it.

    The two share their files, where the file system can, so that this takes no room while both are there.

    Raises:
      UserError: it cannot be written; what was there before stays.
    """

    def shared(path: str, copy: str) -> None:
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)

    path = to / f"{step}{_UNFINISHED}"
    try:
        sweep(to)
        written = folder / f"{step}{_UNFINISHED}"  # where `save` is about to let it count
        shutil.copytree(written if written.exists() else folder / str(step), path, copy_function=shared)
        (path / "found.json").write_text(json.dumps(found) + "\n")
        path.rename(to / str(step))
    except OSError as error:  # shutil.Error is one
        raise UserError(f"{to}: the state of step {step} could not be kept there ({error}); make room") from error
    remove(to, [old for old in steps(to) if old != step])


def found(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """What was found of a State that was kept."""
    return json.loads((folder / str(step) / "found.json").read_text())


def remove(folder: pathlib.Path, which: list[int]) -> None:
    """Removes the States of these steps."""
    for step in which:
        # Moved first, so that no half of it is ever taken for a State.
        shutil.rmtree((folder / str(step)).rename(folder / f"{step}{_REMOVED}"), ignore_errors=True)


def restore(folder: pathlib.Path, like: State, step: int | None = None) -> State | None:
    """A State, shaped and placed like `like`: of `step`, or the latest that is not damaged; None where the folder holds none.

    Warns (RuntimeWarning) of each that is damaged, and that an earlier one is taken.

    Raises:
      UserError: what is there is of another model, or of another version, or all of it is damaged, or there is none of `step`.
    """
    there, damaged = steps(folder), []
    if step is not None and step not in there:
        raise UserError(f"{folder}: has no state of step {step}; it has {', '.join(map(str, there)) or 'none'}")
    for at in reversed(there) if step is None else [step]:
        try:
            state = _load(folder.absolute() / str(at), like)
        except Damaged as error:
            if not (folder / str(at)).exists():  # whoever trains here has removed it meanwhile, and there are later ones
                return restore(folder, like, step)
            damaged.append(f"the state of step {at} is damaged ({error})")
            continue
        if damaged:
            warnings.warn(f"{folder}: {'; '.join(damaged)}: that of step {at} is taken", RuntimeWarning, stacklevel=2)
        return state
    if damaged:
        raise UserError(f"{folder}: {'; '.join(damaged)}, and there is no other; restore a copy, or use another workdir")
    return None


def tidy(folder: pathlib.Path, step: int) -> None:
    """For whoever trains here, from `step`: clears away what a killed process left, and sets damaged later States aside."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / f"{later}{_DAMAGED}", ignore_errors=True)
            (folder / str(later)).rename(folder / f"{later}{_DAMAGED}")
    sweep(folder)


def sweep(folder: pathlib.Path) -> None:
    """Clears away what a killed process left half written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in (_UNFINISHED, _REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def _load(path: pathlib.Path, like: State) -> State:
    """The State at `path`, compared with what was written about it.

    Raises:
      Damaged: it is not what was written.
      UserError: it is of another model, or of another version.
    """
    where = f"{path.parent}: the state of step {path.name}"
    if (path / "_CHECKPOINT_METADATA").exists():
        raise UserError(
            f"{where} is of an avb_jax before 0.3, whose checkpoints this version does not read; use another workdir"
        )
    try:
        about = json.loads((path / "about.json").read_text())
        whole = about.pop("digest") == _digest_of(about)
    except (OSError, ValueError, KeyError, AttributeError):
        raise Damaged("about.json cannot be read") from None
    if not whole:
        raise Damaged("about.json has changed")
    if about["format"] != FORMAT:
        version = about["avb_jax"]
        raise UserError(f"{where} is of avb_jax {version}, whose checkpoints this version does not read; use another workdir")
    try:
        found = _files(path / "state")
    except OSError as error:
        raise Damaged(str(error)) from None
    for name, digest in about["files"].items():
        if found.get(name) != digest:
            raise Damaged(f"state/{name} {'has changed' if name in found else 'is missing'}")
    placed, arrays = jax.tree.map(jnp.asarray, like), about["arrays"]
    like = key_data(placed)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    expected = {jax.tree_util.keystr(at): [list(leaf.shape), str(leaf.dtype)] for at, leaf in leaves}
    for name in sorted({*expected, *arrays}):
        there, here = arrays.get(name, ["no such array"])[:2], expected.get(name, ["no such array"])
        if there != here:
            raise UserError(
                f"{where} is of another model or another optimiser: State{name} is {' '.join(map(str, there))} there, "
                f"{' '.join(map(str, here))} here; use the settings that it was trained with, or another workdir"
            )
    from orbax.checkpoint import v1 as ocp

    of_numpy = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), like)  # which any process reads
    try:
        state = ocp.load(path / "state", of_numpy)
    except (OSError, ValueError) as error:  # removed while it was read, say
        raise Damaged(f"state cannot be read ({type(error).__name__})") from None
    for at, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(at)
        if _digest(np.ascontiguousarray(leaf)) != arrays[name][2]:
            raise Damaged(f"State{name} is not what was written")

    def place(leaf: np.ndarray, a: Array) -> Array:
        return jax.device_put(jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(a)) if _keys(a) else leaf, a.sharding)

    return jax.tree.map(place, state, placed)


def key_data(tree: PyTree) -> PyTree:
    """The tree with numbers in the place of keys of random numbers, which networks may have among their collections."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if _keys(a) else a, tree)


def _keys(a: Any) -> bool:
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _about(state: State, folder: pathlib.Path) -> dict[str, Any]:
    arrays = {
        jax.tree_util.keystr(at): [list(leaf.shape), str(leaf.dtype), _digest(np.ascontiguousarray(leaf))]
        for at, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    about = {"format": FORMAT, "avb_jax": metadata.version("avb_jax"), "arrays": arrays, "files": _files(folder)}
    return {**about, "digest": _digest_of(about)}


def _files(folder: pathlib.Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path.read_bytes()) for path in paths}


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(content: Any) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())
