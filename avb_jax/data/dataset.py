"""What a data set is: checked arrays on the host, the order of its examples, and what the device makes of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.streams import stream
from avb_jax.types import Array, UserError

BINARIZE = ("none", "dynamic", "threshold")


class Dataset(NamedTuple):
    """Images [N, *x_shape], uint8 in 0..255 or float32 in [0, 1], kept small until the device scales them.

    Training examples in a memory-mapped file stay there, and batches are read from it ahead of the steps that need them;
    others are placed on the device as a whole.
    """

    train: np.ndarray
    test: np.ndarray
    binarize: str = "none"  # see `to_pixels`
    name: str = "arrays"
    flip: bool = False  # whether each training example is mirrored, left and right, half of the times

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.train.shape[1:]


def from_arrays(train: np.ndarray, test: np.ndarray | None = None, binarize: str = "none", name: str = "arrays") -> Dataset:
    """A data set of the user's own arrays.

    Args:
      train: [N, ...], uint8 in 0..255, or anything that is in [0, 1] (bool, integers 0 and 1, floats).
      test: held-out examples of the same shape; the training examples where there are none.
      binarize: how the device makes binary images of intensities, see `to_pixels`.
      name: what messages call it.

    Raises:
      UserError: an empty or ragged array, values outside [0, 1] or not finite, unequal shapes, unknown `binarize`.
    """
    if binarize not in BINARIZE:
        raise UserError(f"data.binarize={binarize!r}: must be one of {', '.join(BINARIZE)}")
    train = _check_images(train, f"{name}: train")
    test = train if test is None else _check_images(test, f"{name}: test")
    if test.shape[1:] != train.shape[1:]:
        raise UserError(f"{name}: test has examples of shape {test.shape[1:]}, train {train.shape[1:]}; they must agree")
    return Dataset(train, test, binarize, name)


def _check_images(images: np.ndarray, what: str) -> np.ndarray:
    try:
        images = np.asarray(images)
    except ValueError:
        raise UserError(f"{what}: examples of unequal shapes; give one array [N, ...]") from None
    if images.ndim < 2 or not images.size:
        raise UserError(f"{what}: shape {images.shape}; give a non-empty array [N, ...]")
    if images.dtype == np.uint8 and images.max() > 1:
        return images
    if images.dtype.kind not in "buif":
        raise UserError(f"{what}: dtype {images.dtype}; give uint8 in 0..255 or numbers in [0, 1]")
    images = images.astype(np.float32)
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):
        raise UserError(f"{what}: values from {low:g} to {high:g}; scale them to [0, 1], or give uint8 in 0..255")
    return images


def to_pixels(key: Array, images: Array, binarize: str) -> Array:
    """On the device: stored images to float32 pixels in [0, 1], binarised as asked.

    Args:
      key: randomness of the dynamic binarisation.
      images: as a `Dataset` stores them.
      binarize: 'none' leaves the intensities; 'dynamic' draws each pixel from its intensity anew every time (Salakhutdinov
        & Murray 2008, as Burda et al. 2016 use it); 'threshold' cuts at one half.
    """
    pixels = images.astype(jnp.float32) / (255.0 if images.dtype == jnp.uint8 else 1.0)
    if binarize == "dynamic":
        return jax.random.bernoulli(key, pixels).astype(jnp.float32)
    return (pixels >= 0.5).astype(jnp.float32) if binarize == "threshold" else pixels


def training_pixels(key: Array, images: Array, binarize: str, flip: bool) -> Array:
    """`to_pixels` of a training batch [B, H, W, ...], each example mirrored half of the times if `flip`."""
    x = to_pixels(key, images, binarize)
    if not flip:
        return x
    mirrored = jax.random.bernoulli(stream(key, "flip"), shape=(len(x),) + (1,) * (x.ndim - 1))
    return jnp.where(mirrored, x[:, :, ::-1], x)


_EXAMPLES_PER_SHUFFLE = 2**16


@functools.lru_cache(maxsize=64)
def _shuffled(size: int, seed: int, number: int) -> np.ndarray:
    epochs = max(1, _EXAMPLES_PER_SHUFFLE // size)
    order = np.tile(np.arange(size, dtype=np.int32), (epochs, 1))
    return np.random.default_rng([seed, number]).permuted(order, axis=1).ravel()


def batch_indices(size: int, batch_size: int, seed: int, start: int, steps: int) -> np.ndarray:
    """Which examples the steps start .. start + steps - 1 train on: [steps, batch_size] int32.

    Every epoch visits every example once, in an order of its own; batches run on across epochs, so that none is short.
    A pure function of its arguments, which is what lets a resumed run see the batches that it would have seen.
    """
    first, last = start * batch_size, (start + steps) * batch_size
    length = size * max(1, _EXAMPLES_PER_SHUFFLE // size)
    chunks = [_shuffled(size, seed, n) for n in range(first // length, -(-last // length))]
    offset = first // length * length
    return np.concatenate(chunks)[first - offset : last - offset].reshape(steps, batch_size)
