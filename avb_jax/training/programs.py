"""Programs on disk, for a next start that need not trace them.

JAX's own cache keeps what was compiled, by the program's text, and to have that text takes seconds of tracing and lowering by
itself. Here the text is kept too (`jax.export`), by what it is made of: the source of this library, what it runs by and on, a
text of the caller's that settles all that the traced function depends on, and the shapes of the arguments. What is made of
anything else is traced anew, and so is what cannot be read.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export

from avb_jax.networks import onednn

KEPT = 200  # programs in a folder, some 0.2 MB each; of more, those that were not used for the longest time go
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpyro", "blackjax", "chex", "numpy")


class Kept:
    """A jitted function, on one device, whose programs are kept; made by `Programs.keep`."""

    def __init__(self, function: Callable, options: dict, folder: pathlib.Path | None, made_of: str):
        self._jitted, self._options, self._folder, self._made_of = jax.jit(function, **options), options, folder, made_of
        self._functions: dict[pathlib.Path, Callable] = {}  # jitted

    def __call__(self, *args: Any) -> Any:
        if self._folder is None:
            return self._jitted(*args)
        path = self._path(args)
        if not self._read(path):
            self._functions[path] = self._export(args, path)
        return self._functions[path](*args)

    def found(self, *args: Any) -> bool:
        """Whether there is a program for such arguments (arrays, or `jax.ShapeDtypeStruct`), which need not be traced."""
        return self._folder is not None and self._read(self._path(args))

    def trace(self, *args: Any) -> jax.stages.Traced:
        """As the jitted function's own; a call with such arguments need not trace again."""
        return self._jitted.trace(*args)

    def _path(self, args: tuple) -> pathlib.Path:
        leaves, structure = jax.tree.flatten(args)
        shapes = [(np.shape(leaf), str(getattr(leaf, "dtype", type(leaf)))) for leaf in leaves]
        return self._folder / hashlib.sha256(repr((self._made_of, str(structure), shapes)).encode()).hexdigest()[:40]

    def _read(self, path: pathlib.Path) -> bool:
        if path not in self._functions:
            try:
                text, out_tree = pickle.loads(path.read_bytes())
                self._functions[path] = self._calling(export.deserialize(bytearray(text)), out_tree)
                path.touch()
            except Exception:  # whatever is the matter with a file, tracing does without it
                return False
        return True

    def _calling(self, exported: export.Exported, out_tree: Any) -> Callable:
        """The program jitted, of arguments and results that are trees; its own are their leaves."""
        return jax.jit(lambda *args: jax.tree.unflatten(out_tree, exported.call(*jax.tree.leaves(args))), **self._options)

    def _export(self, args: tuple, path: pathlib.Path) -> Callable:
        """The function for such arguments, after its program was written."""
        ours = [export.DisabledSafetyCheck.custom_call(onednn.TARGET)]  # a call of another release is another source
        try:
            exported = export.export(self._jitted, disabled_checks=ours)(*args)
            flat = dataclasses.replace(  # since a file has no named tuples, but by name
                exported,
                in_tree=jax.tree.structure((tuple(exported.in_avals), {})),
                out_tree=jax.tree.structure(tuple(exported.out_avals)),
            )
            kept = pickle.dumps((bytes(flat.serialize()), exported.out_tree))
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                file.write(kept)
            pathlib.Path(file.name).replace(path)  # whole or not at all
            for old in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)
        except Exception:  # a callback to Python, a full disk, or an error that the call will raise itself
            return self._jitted
        return self._calling(flat, exported.out_tree)


class Programs:
    """Where programs are kept and what all of them are made of; `Programs()` keeps none."""

    def __init__(self, folder: str | os.PathLike | None = None, made_of: str = ""):
        """Programs in a folder.

        Args:
          folder: as of a cache: it may be emptied at any time, and whoever can write to it can run anything.
          made_of: a text that settles all that the traced functions depend on, other than this library and their arguments.
        """
        self._folder, self._made_of = None if folder is None else pathlib.Path(folder), made_of

    def keep(self, name: str, function: Callable, devices: list, *made_of: Any, **options: Any) -> Kept:
        """The function, jitted, with its programs kept where it runs on one device.

        Args:
          name: apart from all others'.
          function: of arrays.
          devices: on which it runs.
          made_of: what this function depends on besides.
          options: of `jax.jit`.
        """
        if self._folder is None or len(devices) > 1 or jax.process_count() > 1:
            return Kept(function, options, None, "")
        return Kept(function, options, self._folder, repr((name, self._made_of, made_of, _ground(devices[0]))))


def _ground(device: jax.Device) -> str:
    """What every program is made of: source, versions, settings of JAX and XLA, device."""
    versions = [sys.version, *map(importlib.metadata.version, _LIBRARIES)]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    settings = sorted((name, str(value)) for name, value in jax.config.values.items())
    on = (device.device_kind, device.client.platform_version, device.platform == "cpu" and onednn.dtypes())
    return repr((_source(), versions, flags, settings, on))


@functools.cache
def _source() -> str:
    """A digest of this library's source."""
    folder = pathlib.Path(__file__).parents[1]
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".cc")]
    return _digest({str(path.relative_to(folder)): path.read_bytes() for path in files})


def _digest(files: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
