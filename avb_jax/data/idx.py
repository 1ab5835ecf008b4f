"""The IDX files that MNIST and its descendants are distributed as (LeCun et al. 1998), gzipped or not."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from avb_jax.data.limits import UNPACKED, unpacked
from avb_jax.types import UserError

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read(path: pathlib.Path) -> np.ndarray:
    """The array in one IDX file.

    Raises:
      UserError: not an IDX file, cut short, or with bytes left over.
    """
    try:
        with path.open("rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(file) if zipped else file as stream:
                start = stream.read(4)
                if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _DTYPES:
                    raise UserError(f"{path}: not an IDX file; download the file again")
                dtype, rank = np.dtype(_DTYPES[start[2]]), start[3]
                sizes = stream.read(4 * rank)
                if len(sizes) < 4 * rank:
                    raise UserError(f"{path}: cut short within its header; download the file again")
                shape = struct.unpack(f">{rank}I", sizes)
                expected = math.prod(shape) * dtype.itemsize
                if expected > (limit := unpacked()):
                    raise UserError(
                        f"{path}: its header promises {expected:,} bytes, more than {limit:,}; download the file again, or set "
                        f"{UNPACKED} to more"
                    )
                content = stream.read(expected + 1)  # and no more, whatever the file unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None
    if len(content) != expected:
        found = f"{len(content):,}" if len(content) < expected else "more"
        raise UserError(f"{path}: {found} bytes of data, its header promises {expected:,}; download the file again")
    return np.frombuffer(content, dtype).reshape(shape)


def read_labels(directory: pathlib.Path, split: str) -> np.ndarray | None:
    """The classes [N] uint8 of a split, from `<split>-labels-idx1-ubyte[.gz]`; None where there is no such file.

    Raises:
      UserError: the file does not hold labels.
    """
    found = _find(directory, f"{split}-labels-idx1-ubyte")
    if found is None:
        return None
    labels = read(found)
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise UserError(f"{found}: {labels.dtype} of shape {labels.shape}, expected uint8 labels [N]")
    return labels


def read_images(directory: pathlib.Path, split: str) -> np.ndarray:
    """The images [N, H, W] uint8 of a split, 'train' or 't10k', from `<split>-images-idx3-ubyte[.gz]`.

    Raises:
      UserError: no such file, or it does not hold images.
    """
    stem = f"{split}-images-idx3-ubyte"
    found = _find(directory, stem)
    if found is None:
        raise UserError(f"data.dir={str(directory)!r}: holds no {stem}[.gz]; give the folder with the four MNIST IDX files")
    images = read(found)
    if images.ndim != 3 or images.dtype != np.uint8:
        raise UserError(f"{found}: {images.dtype} of shape {images.shape}, expected uint8 images [N, H, W]")
    return images


def _find(directory: pathlib.Path, stem: str) -> pathlib.Path | None:
    paths = [directory / name for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx"))]
    return next((path for path in paths if path.is_file()), None)
