"""oneDNN's convolutions for CPUs: the optional extra `avb_jax[onednn]`, which `networks.conv` then takes by itself.

Images [B, H, W, C], kernels [k, k, C, F] and outputs [B, H', W', F] are joined by three bilinear maps, each the transpose of
another in one of its arguments; one primitive stands for all three, so that derivatives of any order in either mode are of the
same kind. The handler, `onednn.cc`, is compiled once by the machine's C++ compiler (CXX, or the first of c++, g++ and clang++)
and kept in ~/.cache/avb_jax/onednn (XDG_CACHE_HOME).

A stride with a 1 x 1 kernel never reaches oneDNN: where the channels are few, its gradient of such a kernel writes past the
memory that it asked for (uxlfoundation/oneDNN issue 6035, open in November 2026). Pixels are left out, or put in, around it.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import warnings
from importlib import metadata

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from avb_jax.types import Array

PACKAGE, LIBRARY = "onednn-cpu-gomp", "libdnnl.so.3"
FORWARD, BACKWARD_DATA, BACKWARD_WEIGHTS = range(3)
TARGET = "avb_onednn_convolve"  # of XLA's custom calls
NO_PADS = [(0, 0)] * 2
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_convolve_p = Primitive(TARGET)


def forward(x: Array, kernel: Array, stride: int, pads: list[tuple[int, int]]) -> Array:
    """The convolution [B, H', W', F] of x [B, H, W, C], padded by `pads` (low, high), and kernel [k, k, C, F]."""
    if kernel.shape[:2] == (1, 1) and stride > 1:
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])[:, ::stride, ::stride]
        stride, pads = 1, NO_PADS
    sizes = [(n + sum(pad) - k) // stride + 1 for n, k, pad in zip(x.shape[1:3], kernel.shape[:2], pads, strict=True)]
    return _bind(x, kernel, FORWARD, stride, pads, (len(x), *sizes, kernel.shape[3]), x.dtype)


def transposed(y: Array, kernel: Array, stride: int, pads: list[tuple[int, int]], size: tuple[int, int]) -> Array:
    """The transpose of `forward` in x: images [B, *size, C] of y [B, H', W', F], kernel [k, k, C, F]."""
    if kernel.shape[:2] == (1, 1) and stride > 1:
        x = transposed(y, kernel, 1, NO_PADS, y.shape[1:3])
        ends = [(-low, n - stride * (m - 1) - 1 + low) for n, m, (low, _) in zip(size, y.shape[1:3], pads, strict=True)]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*end, stride - 1) for end in ends), (0, 0, 0)])
    return _bind(y, kernel, BACKWARD_DATA, stride, pads, (len(y), *size, kernel.shape[2]), y.dtype)


def available() -> bool:
    """Whether oneDNN is installed and its handler could be compiled; where it is and could not, a warning says why, once."""
    return bool(dtypes())


@functools.cache
def dtypes() -> tuple:
    """The types that it convolves: float32, on processors that have it (AVX-512, say) bfloat16; none where not `available`."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return ()
    try:
        (library,) = {
            path for file in package.files or () if file.name == LIBRARY and (path := file.locate().resolve()).is_file()
        }
        handler = ctypes.CDLL(str(_compiled()))
        handler.avb_onednn_open.restype = ctypes.c_char_p
        if wrong := handler.avb_onednn_open(os.fsencode(library)):
            raise OSError(f"{library}: {wrong.decode()}")
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{PACKAGE} is installed but cannot be used ({error}); convolutions run without it. "
            f"It takes a C++ compiler (CXX names one) and {LIBRARY} of the package",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(handler, TARGET)), platform="cpu")
    return (jnp.float32, jnp.bfloat16) if handler.avb_onednn_has_bfloat16() else (jnp.float32,)


def _compiled() -> pathlib.Path:
    """The handler's shared library, compiled where no earlier start has left it.

    Raises:
      OSError: no compiler, or it fails.
    """
    version = hashlib.sha256(_SOURCE.read_bytes() + jaxlib.__version__.encode()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "avb_jax" / "onednn"
    target = folder / f"{version}.so"
    if target.is_file():
        return target
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, ("c++", "g++", "clang++"))][:1]
    if not compiler:
        raise OSError("no C++ compiler found")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = pathlib.Path(scratch) / target.name
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{jax.ffi.include_dir()}"]
        command = [*compiler, *flags, str(_SOURCE), "-o", str(made), "-ldl", "-lpthread"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"{shlex.join(compiler)}: {(result.stderr.strip().splitlines() or ['it failed'])[-1]}")
        made.replace(target)  # whole or not at all, whoever else compiles it
    return target


def _bind(first: Array, second: Array, kind: int, stride: int, pads, shape: tuple[int, ...], dtype) -> Array:
    """Operands in the type of the first; kernels come out in float32, and all in `dtype` in the end."""
    if 0 in first.shape or 0 in second.shape:
        return jnp.zeros(shape, dtype)
    pads = tuple(tuple(pad) for pad in pads)
    return _convolve_p.bind(first, second.astype(first.dtype), kind=kind, stride=stride, pads=pads, shape=shape).astype(dtype)


def _abstract(first, second, *, kind, shape, **_):
    return jax.core.ShapedArray(shape, jnp.float32 if kind == BACKWARD_WEIGHTS else first.dtype)


def _call(first: Array, second: Array, *, kind: int, stride: int, pads, shape: tuple[int, ...]) -> Array:
    result = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(shape, jnp.float32 if kind == BACKWARD_WEIGHTS else first.dtype))
    return result(first, second, kind=np.int64(kind), stride=np.int64(stride), pads=np.array(pads, np.int64).ravel())


def _transpose_first(cotangent: Array, first, second: Array, *, kind: int, stride: int, pads, shape) -> Array:
    del shape
    given = {"stride": stride, "pads": pads, "shape": first.aval.shape, "dtype": first.aval.dtype}
    if kind == BACKWARD_WEIGHTS:
        return _bind(second, cotangent, BACKWARD_DATA, **given)
    return _bind(cotangent, second, FORWARD if kind == BACKWARD_DATA else BACKWARD_DATA, **given)


def _transpose_second(cotangent: Array, first: Array, second, *, kind: int, stride: int, pads, shape) -> Array:
    del shape
    given = {"stride": stride, "pads": pads, "shape": second.aval.shape, "dtype": second.aval.dtype}
    if kind == BACKWARD_WEIGHTS:
        return _bind(first, cotangent, FORWARD, **given)
    images, outputs = (first, cotangent) if kind == FORWARD else (cotangent, first)
    return _bind(images, outputs, BACKWARD_WEIGHTS, **given)


def _batch(arguments, dims, *, kind, shape, **given):
    """Many batches of images by one kernel are one batch; whatever else there is many of goes one by one."""
    first, second = (x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arguments, dims, strict=True))
    if dims[1] is None and kind != BACKWARD_WEIGHTS:
        merged = first.reshape(-1, *first.shape[2:])
        y = _convolve_p.bind(merged, second, kind=kind, shape=(len(merged), *shape[1:]), **given)
        return y.reshape(len(first), *shape), 0
    count = len(first if dims[1] is None else second)
    one = lambda i: (x if dim is None else x[i] for x, dim in zip((first, second), dims, strict=True))  # noqa: E731
    return lax.map(lambda i: _convolve_p.bind(*one(i), kind=kind, shape=shape, **given), jnp.arange(count)), 0


_convolve_p.def_impl(jax.jit(_call, static_argnames=("kind", "stride", "pads", "shape")))
_convolve_p.def_abstract_eval(_abstract)
mlir.register_lowering(_convolve_p, mlir.lower_fun(_call, multiple_results=False), platform="cpu")
ad.defbilinear(_convolve_p, _transpose_first, _transpose_second)
batching.primitive_batchers[_convolve_p] = _batch
