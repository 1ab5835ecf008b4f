"""Data sets by name."""

import pathlib

import numpy as np

from avb_jax.data import idx, photos, tfds
from avb_jax.data.dataset import Dataset, from_arrays
from avb_jax.data.photos import Photos
from avb_jax.types import UserError


def four_points(directory: str, binarize: str) -> Dataset:
    """The synthetic set of section 4: the four 2x2 images with one pixel on. Optimal log-likelihood -log 4."""
    del directory
    return from_arrays(np.eye(4, dtype=np.float32).reshape(4, 2, 2), binarize=binarize, name="four_points")


def digits(directory: str, binarize: str) -> Dataset:
    """scikit-learn's 1,797 8x8 digits, which come with the package; every sixth one is held out."""
    del directory
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError("data.name='digits': come with scikit-learn; pip install 'avb_jax[digits]'") from None
    loaded = sklearn.datasets.load_digits()
    images = (loaded.images / 16.0).astype(np.float32)
    held_out = np.arange(len(images)) % 6 == 5
    dataset = from_arrays(images[~held_out], images[held_out], binarize, "digits")
    return dataset._replace(train_labels=loaded.target[~held_out], test_labels=loaded.target[held_out])


def mnist(directory: str, binarize: str) -> Dataset:
    """60,000 and 10,000 28x28 digits (or Fashion-MNIST, or whatever else is in MNIST's file names) from IDX files."""
    if not directory:
        raise UserError("data.dir='': give the folder with the four MNIST IDX files, or use data.name='tfds:mnist'")
    path = pathlib.Path(directory).expanduser()
    if not path.is_dir():
        raise UserError(f"data.dir={directory!r}: no such folder; give the one with the four MNIST IDX files")
    dataset = from_arrays(idx.read_images(path, "train"), idx.read_images(path, "t10k"), binarize, "mnist")
    labels = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        found, count = idx.read_labels(path, stem), len(getattr(dataset, split))
        if found is not None and len(found) != count:
            raise UserError(f"data.dir={directory!r}: {len(found):,} {split} labels for {count:,} images; download them again")
        labels[f"{split}_labels"] = found
    return dataset._replace(**labels)


def _from_tfds(name: str):
    def load_from_tfds(directory: str, binarize: str) -> Dataset:
        train, test = (tfds.read_images(name, directory, split) for split in ("train", "test"))
        return from_arrays(train, test, binarize, f"tfds:{name}")

    return load_from_tfds


SOURCES = {
    "four_points": four_points,
    "digits": digits,
    "mnist": mnist,
    "tfds:mnist": _from_tfds("mnist"),
    "tfds:binarized_mnist": _from_tfds("binarized_mnist"),
    "tfds:fashion_mnist": _from_tfds("fashion_mnist"),
}


PHOTOS = {
    "celeba": photos.celeba,
    "tfds:celeb_a": photos.tfds_celeba,
    "images": photos.folder_or_zip,
    "drawn_faces": photos.drawn_faces,
}


def load(name: str, directory: str = "", binarize: str = "none", options: Photos | None = None) -> Dataset:
    """The data set called `name`, read from `directory` where it is not embedded.

    Args:
      name: in `SOURCES` or `PHOTOS`.
      directory: where its files are.
      binarize: see `to_pixels`; photographs are never binarised.
      options: of photographs.

    Raises:
      UserError: no such name, or its files are missing or damaged.
    """
    if name in PHOTOS:
        if binarize != "none":
            raise UserError(f"data.binarize={binarize!r}: {name} are photographs; use 'none'")
        return PHOTOS[name](directory, options or Photos())
    if name not in SOURCES:
        raise UserError(f"data.name={name!r}: must be one of {', '.join([*SOURCES, *PHOTOS])}")
    return SOURCES[name](directory, binarize)
