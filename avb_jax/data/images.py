"""Image files of a folder or zip as one memory-mapped array, decoded once.

The cache is `pixels.bin`, uint8 images one after the other, and `index.json`, which says what they are of and holds a
checksum for every block. Blocks are appended, and the index is replaced after each, so that a build that was cut short
continues where it was; an index that does not fit the source or the settings any more, or a block that does not fit its
checksum, is noticed.
"""

import concurrent.futures
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import tqdm

from avb_jax.data.limits import UNPACKED, unpacked
from avb_jax.locks import locked
from avb_jax.types import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
BLOCK = 1024  # images between two looks at the index
_DEPTHS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")  # PIL's modes of 8 bits


class Source(NamedTuple):
    """Images to decode, in order."""

    name: str
    images: Sequence[str]  # what they are called in messages
    read: Callable[[str], PIL.Image.Image]  # from a name; called from several threads
    fingerprint: str  # changes with the images


def from_folder(folder: pathlib.Path) -> Source:
    """All images in a folder and the folders below it, by name.

    Raises:
      UserError: there are none.
    """
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if _is_image(name))
    paths = (path for path in paths if os.path.isfile(path))  # a link may lead nowhere
    names = sorted(os.path.relpath(path, folder).replace(os.sep, "/") for path in paths)
    if not names:
        raise UserError(f"data.dir={str(folder)!r}: no images in it ({', '.join(EXTENSIONS)})")
    stats = (os.stat(os.path.join(folder, name)) for name in names)
    described = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, stats, strict=True))
    return Source(str(folder), names, lambda name: PIL.Image.open(folder / name), _digest(described))


def from_zip(path: pathlib.Path) -> Source:
    """All images in a zip file, by name; nothing is unpacked to disk.

    Raises:
      UserError: not a zip file, encrypted, or without images.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"data.dir={str(path)!r}: not a zip file that can be read ({error}); download it again") from None
    with archive:
        entries = [entry for entry in archive.infolist() if _is_image(entry.filename)]
    entries = sorted((e for e in entries if not e.filename.startswith("__MACOSX/")), key=lambda entry: entry.filename)
    if not entries:
        raise UserError(f"data.dir={str(path)!r}: no images in it ({', '.join(EXTENSIONS)})")
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"data.dir={str(path)!r}: encrypted; give it unpacked or without a password")
    names = [entry.filename for entry in entries]
    unsafe = [n for n in names if n.startswith(("/", "\\")) or ".." in n.replace("\\", "/").split("/")]
    if unsafe:
        raise UserError(f"data.dir={str(path)!r}: {unsafe[0]!r} points outside the archive; no image set does that")
    local = threading.local()

    def read(name: str) -> PIL.Image.Image:
        if not hasattr(local, "archive"):
            local.archive = zipfile.ZipFile(path)
        if (size := local.archive.getinfo(name).file_size) > (limit := unpacked()):
            raise ValueError(f"unpacks to {size:,} bytes, more than {limit:,} ({UNPACKED})")
        return PIL.Image.open(io.BytesIO(local.archive.read(name)))

    described = "\n".join(f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in entries)
    return Source(str(path), names, read, _digest(described))


def decode(image: PIL.Image.Image, size: int, crop: int) -> np.ndarray:
    """One image [size, size, 3] uint8: the central `crop` x `crop` pixels (the largest central square where it is 0), resized.

    Images that say which way is up are turned; grey, palette and CMYK images become RGB; transparency is dropped.

    Raises:
      ValueError: more than 8 bits per channel, smaller than the crop, or beyond the limit; the message says which.
    """
    if image.mode not in _DEPTHS:
        raise ValueError(f"pixels of PIL mode {image.mode!r}, not 8 bits per channel")
    if (needed := 4 * image.width * image.height) > (limit := unpacked()):
        raise ValueError(f"decodes to {needed:,} bytes, more than {limit:,} ({UNPACKED})")
    image = PIL.ImageOps.exif_transpose(image)  # cameras store which way is up
    width, height = image.size
    side = crop or min(width, height)
    if side > min(width, height):
        raise ValueError(f"{width}x{height} pixels, smaller than the crop of {side}; data.crop=0 takes the largest square")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # its palette may be transparent
    image = image.convert("RGB")
    left, top = (width - side) // 2, (height - side) // 2
    if (side, side) != (width, height) or side != size:
        image = image.resize((size, size), PIL.Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(image)


class Cached(NamedTuple):
    """A source, decoded."""

    pixels: np.ndarray  # [N, size, size, 3] uint8, memory-mapped
    rows: np.ndarray  # [N] which of the source's images each is; those that were skipped are missing
    skipped: list  # of (name, reason)


def cached(source: Source, folder: pathlib.Path, size: int, crop: int = 0, workers: int | None = None) -> Cached:
    """The images of a source from `folder`, where they are decoded first if they are not there.

    An image that cannot be decoded is skipped, and named in a summary.

    Args:
      source: what to decode.
      folder: of this cache; made where it is missing.
      size: of the images, pixels.
      crop: see `decode`.
      workers: threads that decode; as many as there are cores by default.

    Raises:
      UserError: not one image could be decoded, or there is too little disk space.
    """
    settings = {"source": source.fingerprint, "size": size, "crop": crop, "version": 2}
    index_path, pixels_path = folder / "index.json", folder / "pixels.bin"
    index = _read_index(index_path, pixels_path, settings, source)
    if index["next"] < len(source.images):
        with locked(folder, "data.cache", wait=True):
            index = _read_index(index_path, pixels_path, settings, source)  # as another process may have left it
            if index["next"] < len(source.images):
                needed, free = (len(source.images) - len(index["rows"])) * size * size * 3, shutil.disk_usage(folder).free
                if needed > free:
                    raise UserError(
                        f"data.cache={str(folder.parent)!r}: decoding {source.name} needs {needed / 2**20:,.0f} MiB, "
                        f"{free / 2**20:,.0f} are free; name a folder with more space, or a smaller data.size"
                    )
                _decode_all(source, index, index_path, pixels_path, size, crop, workers)
    if index["skipped"]:
        shown = "; ".join(f"{name}: {reason}" for name, reason in index["skipped"][:5])
        more = ", ..." if len(index["skipped"]) > 5 else ""
        print(f"{source.name}: skipped {len(index['skipped'])} of {len(source.images)} images: {shown}{more}", file=sys.stderr)
    if not index["rows"]:
        raise UserError(f"data.dir={source.name!r}: not one of its {len(source.images)} images could be decoded")
    pixels = np.memmap(pixels_path, np.uint8, "r", shape=(len(index["rows"]), size, size, 3))
    return Cached(pixels, np.asarray(index["rows"]), index["skipped"])


def _read_index(index_path, pixels_path, settings, source) -> dict:
    """What the cache holds; the index of an empty one where there is none, or it is stale or damaged."""
    empty = {"settings": settings, "next": 0, "rows": [], "blocks": [], "skipped": []}
    try:
        index = json.loads(index_path.read_text())
        if not (isinstance(index, dict) and index.keys() == empty.keys()):
            raise ValueError
    except FileNotFoundError:
        return empty
    except (OSError, ValueError):
        print(f"{source.name}: the index of its cache, {index_path}, is damaged; decoding it again", file=sys.stderr)
        return empty
    if index.get("settings") != settings:
        print(f"{source.name}: has changed since it was decoded; decoding it again", file=sys.stderr)
        return empty
    if index.get("blocks") and not _intact(index, pixels_path):
        print(f"{source.name}: its cache {pixels_path} is damaged; decoding it again", file=sys.stderr)
        return empty
    return index


def _intact(index: dict, path: pathlib.Path) -> bool:
    """Whether every block that the index promises has its checksum."""

    def check(block: dict) -> bool:
        with path.open("rb") as file:
            file.seek(block["offset"])
            return zlib.crc32(file.read(block["bytes"])) == block["crc"]

    try:
        if path.is_symlink() or path.stat().st_size < sum(block["bytes"] for block in index["blocks"]):
            return False
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return all(pool.map(check, index["blocks"]))
    except (OSError, KeyError, TypeError):
        return False


def _decode_all(source, index, index_path, pixels_path, size, crop, workers) -> None:
    """Appends what is missing, block by block."""

    def one(name: str) -> np.ndarray | str:
        try:
            with source.read(name) as image:
                return decode(image, size, crop)
        except Exception as error:  # whatever a decoder makes of a damaged file
            return " ".join(str(error).split()) or type(error).__name__

    if not index["blocks"]:
        pixels_path.unlink(missing_ok=True)  # a link in its place is not followed
    offset, begun, reported = sum(block["bytes"] for block in index["blocks"]), time.monotonic(), time.monotonic()
    total, first = len(source.images), index["next"]
    lines = not sys.stderr.isatty()
    bar = tqdm.tqdm(total=total, initial=first, desc="decoding", unit="image", disable=lines, dynamic_ncols=True)
    with (
        bar,
        pixels_path.open("r+b" if index["blocks"] else "wb") as file,
        concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool,
    ):
        file.truncate(offset)
        file.seek(offset)
        while index["next"] < total:
            numbers = range(index["next"], min(index["next"] + BLOCK, total))
            decoded = list(pool.map(one, [source.images[i] for i in numbers]))
            good = {i: pixels for i, pixels in zip(numbers, decoded, strict=True) if not isinstance(pixels, str)}
            index["skipped"] += [(source.images[i], decoded[i - numbers.start]) for i in numbers if i not in good]
            content = b"".join(pixels.tobytes() for pixels in good.values())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if content:
                index["blocks"].append({"offset": offset, "bytes": len(content), "crc": zlib.crc32(content)})
            offset += len(content)
            index["rows"] += good.keys()
            index["next"] = numbers.stop
            partial = index_path.with_suffix(".partial")
            partial.write_text(json.dumps(index))
            os.replace(partial, index_path)
            bar.update(len(numbers))
            if lines and (time.monotonic() - reported > 5 or index["next"] == total):
                reported = time.monotonic()
                left = (reported - begun) / (index["next"] - first) * (total - index["next"])
                print(f"decoding image {index['next']:,}/{total:,}  {left:.0f} s left", file=sys.stderr, flush=True)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
