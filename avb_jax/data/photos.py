"""Sets of photographs: CelebA as it is distributed or as TFDS prepares it, and any folder or zip of images."""

import hashlib
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import PIL.Image

from avb_jax.data import faces, images, tfds
from avb_jax.data.dataset import Dataset, from_arrays
from avb_jax.data.images import Source
from avb_jax.types import UserError

CELEBA_SIZE, CELEBA_CROP = (178, 218), 140
DRAWN = {"train": 4096, "test": 512}


class Photos(NamedTuple):
    """How photographs become examples."""

    size: int = 64  # pixels, height and width
    # Central pixels to keep before resizing: 140 or 108 by convention of CelebA's; 0: the largest square; None: see `_crop`.
    crop: int | None = None
    held_out: float = 0.05  # share of a folder or zip that is for testing
    split_seed: int = 0  # of which images these are
    flip: bool = False  # see `Dataset`
    cache: str = ""  # where decoded images are kept; ~/.cache/avb_jax by default


def celeba(directory: str, photos: Photos) -> Dataset:
    """CelebA (Liu et al. 2015): 162,770 training and 19,962 test images; its validation split is left alone.

    `directory` holds the folder `img_align_celeba` or `img_align_celeba.zip`, and `list_eval_partition.txt`.

    Raises:
      UserError: any of it is missing or damaged.
    """
    folder = _folder("celeba", directory)
    found = [path for path in (folder / "img_align_celeba", folder / "img_align_celeba.zip") if path.exists()]
    if not found:
        raise UserError(f"data.dir={directory!r}: holds neither img_align_celeba nor img_align_celeba.zip")
    source = images.from_folder(found[0]) if found[0].is_dir() else images.from_zip(found[0])
    partition = _read_partition(folder / "list_eval_partition.txt")
    number = {name: partition.get(name.rpartition("/")[2]) for name in source.images}
    unknown = [name for name, split in number.items() if split is None]
    if unknown:
        raise UserError(f"{folder / 'list_eval_partition.txt'}: says nothing about {unknown[0]} ({len(unknown)} such images)")
    train, test = ([name for name in source.images if number[name] == split] for split in (0, 2))
    return _decoded("celeba", source, train, test, photos)


def folder_or_zip(directory: str, photos: Photos) -> Dataset:
    """Any folder (with those below it) or zip file of images, a seeded share of which is held out.

    Raises:
      UserError: no images there, or a share that leaves none for training or for testing.
    """
    path = pathlib.Path(directory).expanduser()
    if not directory or not path.exists():
        raise UserError(f"data.dir={directory!r}: no such folder or zip file; give the one with the images")
    source = images.from_folder(path) if path.is_dir() else images.from_zip(path)
    count = round(photos.held_out * len(source.images))
    if not 0 < count < len(source.images):
        raise UserError(
            f"data.held_out={photos.held_out}: would hold out {count} of {len(source.images)} images; both parts need some"
        )
    order = np.random.default_rng(photos.split_seed).permutation(len(source.images))
    test, train = ([source.images[i] for i in np.sort(part)] for part in (order[:count], order[count:]))
    return _decoded("images", source, train, test, photos)


def tfds_celeba(directory: str, photos: Photos) -> Dataset:
    """CelebA as TFDS prepares it (`celeb_a`)."""
    splits = {split: tfds.open_split("celeb_a", directory, split) for split in ("train", "test")}
    names = {split: [f"{split}/{i:06}" for i in range(len(examples))] for split, examples in splits.items()}

    def read(name: str) -> PIL.Image.Image:
        split, number = name.split("/")
        return PIL.Image.fromarray(np.asarray(splits[split][int(number)]["image"]))

    where = f"tfds:celeb_a in {directory or 'the default TFDS folder'}"
    source = Source(where, names["train"] + names["test"], read, str({s: len(n) for s, n in names.items()}))
    return _decoded("celeb_a", source, names["train"], names["test"], photos)


def drawn_faces(directory: str, photos: Photos) -> Dataset:
    """Faces-like images drawn by the code, without any files."""
    del directory
    _check(photos)
    train, test = (faces.draw(count, photos.size, seed) for seed, count in enumerate(DRAWN.values()))
    return from_arrays(train, test, name="drawn_faces")._replace(flip=photos.flip)


def _decoded(name: str, source: Source, train: list[str], test: list[str], photos: Photos) -> Dataset:
    """The data set of a source's images, training before test, in a cache of its own."""
    _check(photos)
    photos = photos._replace(crop=_crop(source) if photos.crop is None else photos.crop)
    order = hashlib.sha256("\n".join([source.fingerprint, *train, "", *test]).encode()).hexdigest()
    where = hashlib.sha256(f"{os.path.abspath(source.name)} {photos._replace(cache='', flip=False)}".encode()).hexdigest()
    root = pathlib.Path(photos.cache or pathlib.Path.home() / ".cache" / "avb_jax").expanduser()
    ordered = source._replace(images=[*train, *test], fingerprint=order)
    result = images.cached(ordered, root / f"{name}-{photos.size}-{where[:12]}", photos.size, photos.crop)
    cut = int(np.searchsorted(result.rows, len(train)))
    if not 0 < cut < len(result.rows):
        raise UserError(f"data.dir={source.name!r}: {cut} training and {len(result.rows) - cut} test images; both need some")
    return Dataset(result.pixels[:cut], result.pixels[cut:], "none", name, photos.flip)


def _crop(source: Source) -> int:
    """140 where the first image that can be read has the size of CelebA's, 178x218; else the largest square."""
    for name in source.images[:100]:
        try:
            with source.read(name) as image:
                width, height = image.size
        except Exception:  # whatever a decoder makes of a damaged file; it is named later
            continue
        usual = (width, height) == CELEBA_SIZE
        crop, why = (CELEBA_CROP, "as is usual for CelebA's") if usual else (0, "the largest square of")
        print(f"data.crop={crop}: {why} {width}x{height} images", file=sys.stderr)
        return crop
    return 0


def _check(photos: Photos) -> None:
    if photos.size < 4 or (photos.crop or 0) < 0:
        raise UserError(f"data.size={photos.size}, data.crop={photos.crop}: need at least 4 pixels, and a crop of at least 0")


def _folder(name: str, directory: str) -> pathlib.Path:
    path = pathlib.Path(directory).expanduser()
    if not directory or not path.is_dir():
        raise UserError(f"data.dir={directory!r}: no such folder; give the one that holds {name}'s files")
    return path


def _read_partition(path: pathlib.Path) -> dict[str, int]:
    """Which split each image belongs to: 0 training, 1 validation, 2 test."""
    if not path.is_file():
        raise UserError(f"{path}: missing; download it with the images, or use data.name='images' for a random split")
    try:
        pairs = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {name: int(split) for name, split in pairs}
    except ValueError:
        raise UserError(f"{path}: not lines of an image's name and 0, 1 or 2; download it again") from None
