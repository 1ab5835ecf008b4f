"""Traced programs on disk, for a next start that need not trace them.

JAX's own cache keeps what was compiled, by the program's text, and to have that text takes seconds of tracing and lowering by
itself. Here the text is kept too (`jax.export`), under a digest of all that it follows from: the source of this library,
versions, settings, the device, the shapes of the arguments, and a text of the caller's that settles the method and the data.
Where one of these differs, or a file cannot be read, the function is traced as usual.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from numpyro import distributions as dist

from avb_jax.networks import onednn
from avb_jax.training import memory

KEPT = 200  # programs in a folder, some 0.2 MB each; beyond that, those unused for longest are deleted
_SUFFIX = ".traced"
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpyro", "blackjax", "chex", "numpy")
_THREADS = ThreadPoolExecutor(2, "programs")  # that load them
_VARIABLES = ("FLAX_", "LIBTPU_", "NUMPYRO_", "XLA_")  # of the environment, by how their names begin


class Kept:
    """A jitted function whose programs are kept; made by `Programs.keep`.

    The program that was used last begins to load at once, in a thread, since most starts are the last one again.
    """

    def __init__(self, function: Callable, options: dict, device: jax.Device, folder: pathlib.Path | None, digest: str):
        self._jitted, self._options, self._folder, self._digest = jax.jit(function, **options), options, folder, digest
        self._device = device
        self._functions: dict[str, Callable] = {}  # by the structure and shapes of their arguments
        self._needed: dict[str, int] = {}
        files = sorted(folder.glob(f"{digest}-*{_SUFFIX}"), key=_used) if folder else []
        self._last = files[-1] if files else None
        self._loading = _THREADS.submit(_load, self._last, options) if files else None

    def __call__(self, *args: Any) -> Any:
        if self._folder is None or _elsewhere(args, self._device):
            return self._jitted(*args)
        key = _key(args)
        if key not in self._functions:
            self._functions[key] = self._read(key) or self._export(args, key)
        return self._functions[key](*args)

    def needed(self, *args: Any) -> int:
        """Bytes that the program for such arguments (arrays, or `jax.ShapeDtypeStruct`) needs at least: `memory.needed`.

        Nothing is compiled; a call with such arguments need not trace again.
        """
        key = _key(args)
        if key not in self._needed:
            kept = None if self._folder is None or _elsewhere(args, self._device) else _content(self._path(key))
            traced = kept is None or kept.needed is None
            self._needed[key] = memory.needed(self._jitted.trace(*args).jaxpr.jaxpr) if traced else kept.needed
        return self._needed[key]

    def _path(self, key: str) -> pathlib.Path:
        return (self._folder / f"{self._digest}-{key}").with_suffix(_SUFFIX)

    def _read(self, key: str) -> Callable | None:
        """The program on disk, if there is one."""
        path = self._path(key)
        # Threads do not see what a context manager has set of JAX's configuration, without which it may be loaded here.
        function = (self._loading.result() if path == self._last else None) or _load(path, self._options)
        if function is not None:
            with contextlib.suppress(OSError):  # a folder that may only be read
                path.touch()
        return function

    def _export(self, args: tuple, key: str) -> Callable:
        """The function for such arguments, after its program was written."""
        ours = [export.DisabledSafetyCheck.custom_call(onednn.TARGET)]  # what handles it is part of the digest
        try:
            exported = export.export(self._jitted, disabled_checks=ours)(*args)
            # A serialized program can hold tuples of arrays, but no tree with the classes of a State.
            flat = dataclasses.replace(
                exported,
                in_tree=jax.tree.structure((tuple(exported.in_avals), {})),
                out_tree=jax.tree.structure(tuple(exported.out_avals)),
            )
            content = _Content(bytes(flat.serialize()), jax.tree.structure(args), exported.out_tree, self._needed.get(key))
            self._write(self._path(key), pickle.dumps(tuple(content)))
            return _compiled(flat, content, self._options)
        except Exception:  # a callback to Python, a full disk, or an error that the call raises itself
            return self._jitted

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        """The file, whole or not at all; and none too many of them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            part = pathlib.Path(scratch) / path.name
            part.write_bytes(content)
            part.replace(path)
        with contextlib.suppress(OSError):  # another process deletes them as well
            for old in sorted(self._folder.glob(f"*{_SUFFIX}"), key=_used)[:-KEPT]:
                old.unlink(missing_ok=True)


class Programs:
    """Where programs are kept, of one method on one data set; `Programs()` keeps none."""

    def __init__(self, folder: str | os.PathLike | None = None, made_of: str = ""):
        """Programs in a folder.

        Args:
          folder: like a cache: it may be emptied at any time, and whoever can write to it can run anything.
          made_of: a text that settles the method and how the data are prepared. Of two with the same text, the second would
            be trained by the first one's programs.
        """
        self._folder, self._made_of = None if folder is None else pathlib.Path(folder), made_of

    def also(self, *made_of: Any) -> "Programs":
        """The same, of which all depend on these as well; their `repr` counts."""
        return Programs(self._folder, repr((self._made_of, made_of)))

    def keep(self, name: str, function: Callable, devices: list, *made_of: Any, **options: Any) -> Kept:
        """The function, jitted, with its programs kept where it runs on one device.

        Nothing is kept either where JAX's compilation cache, or `jax.jit` itself, is turned off, or NaNs are looked for.

        Args:
          name: of the function, a different one for each.
          function: of arrays.
          devices: on which it runs.
          made_of: what else this function depends on; its `repr` counts.
          options: of `jax.jit`.
        """
        config = jax.config
        plain = config.jax_disable_jit or config.jax_debug_nans or not config.jax_enable_compilation_cache
        elsewhere = config.jax_default_device is not None or devices[0].platform != jax.default_backend()
        if self._folder is None or plain or elsewhere or len(devices) > 1 or jax.process_count() > 1:
            return Kept(function, options, devices[0], None, "")
        return Kept(
            function, options, devices[0], self._folder, _short((name, self._made_of, made_of, _surroundings(devices[0])))
        )


class _Content(NamedTuple):
    """Of a file."""

    text: bytes  # the program, serialized, of leaves
    arguments: jax.tree_util.PyTreeDef
    results: jax.tree_util.PyTreeDef
    needed: int | None


def _content(path: pathlib.Path) -> _Content | None:
    with contextlib.suppress(Exception):  # whatever is the matter with a file, tracing does without it
        return _Content(*pickle.loads(path.read_bytes()))


def _load(path: pathlib.Path, options: dict) -> Callable | None:
    """The program in a file, compiled."""
    with contextlib.suppress(Exception):
        content = _content(path)
        return _compiled(export.deserialize(bytearray(content.text)), content, options)


def _compiled(exported: export.Exported, content: _Content, options: dict) -> Callable:
    """The program, of arguments and results that are trees; its own are their leaves."""

    def call(*args: Any) -> Any:
        return jax.tree.unflatten(content.results, exported.call(*jax.tree.leaves(args)))

    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals]
    return jax.jit(call, **options).lower(*jax.tree.unflatten(content.arguments, shapes)).compile()


def _key(args: tuple) -> str:
    """The structure, shapes and types of a function's arguments."""
    leaves, structure = jax.tree.flatten(args)
    return _short((str(structure), [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]))


def _short(thing: Any) -> str:
    """A digest of what a thing's `repr` says."""
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:32]


def _used(path: pathlib.Path) -> float:
    """When a file was last of use; a file that another process has just deleted, never."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _elsewhere(args: tuple, device: jax.Device) -> bool:
    """Whether any array is bound to other devices than this one."""
    leaves = (leaf for leaf in jax.tree.leaves(args) if getattr(leaf, "committed", True))
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    return any(place is not None and place.device_set != {device} for place in places)


def _surroundings(device: jax.Device) -> tuple:
    """What tracing and lowering read besides a function and its arguments."""
    return (
        _SOURCE,
        sys.version,
        *map(importlib.metadata.version, _LIBRARIES),
        sorted((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES)),
        sorted((name, str(value)) for name, value in jax.config.values.items()),
        dist.Distribution._validate_args,
        (device.device_kind, device.client.platform_version, jax.device_count()),
        # Asking registers oneDNN's calls with XLA, which a program that was read needs.
        device.platform == "cpu" and onednn.dtypes(),
    )


def _digest(folder: pathlib.Path) -> str:
    """A digest of all files of source code in a folder, and of their names."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cc"))
    return hashlib.sha256(repr([(str(path.relative_to(folder)), path.read_bytes()) for path in files]).encode()).hexdigest()


_SOURCE = _digest(pathlib.Path(__file__).parents[1])  # when it was imported: files may change under a process
