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
    """Examples [N, *x_shape], uint8 in 0..255 or float32, kept small until the device scales them.

    Training examples in a memory-mapped file stay there, and batches are read from it ahead of the steps that need them;
    others are placed on the device as a whole.
    """

    train: np.ndarray
    test: np.ndarray
    binarize: str = "none"  # see `to_pixels`
    name: str = "arrays"
    flip: bool = False  # whether each training example is mirrored, left and right, half of the times
    # Classes [len(train)] and [len(test)], where they are known: for figures, no method sees them.
    train_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.train.shape[1:]

    def prepare(self, key: Array, stored: Array) -> Array:
        """Stored training examples [B, ...] as x [B, ...], on the device: scaled, binarised and mirrored anew as asked."""
        x = to_pixels(key, stored, self.binarize)
        if not self.flip:
            return x
        mirrored = jax.random.bernoulli(stream(key, "flip"), shape=(len(x),) + (1,) * (x.ndim - 1))
        return jnp.where(mirrored, x[:, :, ::-1], x)


def from_arrays(
    train: np.ndarray,
    test: np.ndarray | None = None,
    binarize: str = "none",
    name: str = "arrays",
    train_labels: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
) -> Dataset:
    """A data set of the user's own arrays.

    Args:
      train: [N, ...], uint8 in 0..255, which become numbers in [0, 1]; or any numbers (bool, integers, floats) as they are.
        Which values a model allows is up to its likelihood.
      test: held-out examples of the same shape; the training examples where there are none.
      binarize: how the device makes binary images of intensities in [0, 1], see `to_pixels`.
      name: what messages call it.
      train_labels: whole numbers [N] from 0, for colours and the linear probe; no method sees them.
      test_labels: of the held-out examples; those of the training examples where these are held out.

    Raises:
      UserError: an empty or ragged array, values that are not finite, unequal shapes, unknown `binarize`, values outside
        [0, 1] that are to be binarised, or labels that are not one whole number for each example.
    """
    if binarize not in BINARIZE:
        raise UserError(f"data.binarize={binarize!r}: must be one of {', '.join(BINARIZE)}")
    found = {"train": train} if test is None else {"train": train, "test": test}
    found = {split: _array(examples, f"{name}: {split}") for split, examples in found.items()}
    whole = all(x.dtype == np.uint8 for x in found.values()) and any(x.max() > 1 for x in found.values())
    if not whole:  # intensities of 0 and 1 as uint8 are numbers as they are, if there is nothing else on either side
        found = {split: _numbers(examples, f"{name}: {split}", binarize) for split, examples in found.items()}
    train, test = found["train"], found.get("test", found["train"])
    if test.shape[1:] != train.shape[1:]:
        raise UserError(f"{name}: test has examples of shape {test.shape[1:]}, train {train.shape[1:]}; they must agree")
    test_labels = train_labels if test is train and test_labels is None else test_labels
    labels = [
        _labels(given, len(x), f"{name}: {what}")
        for given, x, what in ((train_labels, train, "train_labels"), (test_labels, test, "test_labels"))
    ]
    return Dataset(train, test, binarize, name, False, *labels)


def _labels(labels: np.ndarray | None, count: int, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        found = f"{labels.dtype} of shape {labels.shape}"
        raise UserError(f"{what}: {found}; give whole numbers from 0, one for each of {count} examples")
    return labels


def _array(examples: np.ndarray, what: str) -> np.ndarray:
    try:
        examples = examples if isinstance(examples, np.memmap) else np.asarray(examples)  # which is then read batch by batch
    except ValueError:
        raise UserError(f"{what}: examples of unequal shapes; give one array [N, ...]") from None
    if examples.ndim < 2 or not examples.size:
        raise UserError(f"{what}: shape {examples.shape}; give a non-empty array [N, ...]")
    if examples.dtype.kind not in "buif":
        raise UserError(f"{what}: dtype {examples.dtype}; give uint8 in 0..255, or numbers")
    return examples


def _numbers(examples: np.ndarray, what: str, binarize: str) -> np.ndarray:
    if examples.dtype == np.uint8 and examples.max() > 1:
        return examples
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        examples = examples.astype(np.float32, copy=False)
    low, high = examples.min(), examples.max()
    if not np.isfinite([low, high]).all():
        raise UserError(f"{what}: values from {low:g} to {high:g}; all must be finite, in float32")
    if binarize != "none" and not (low >= 0 and high <= 1):
        raise UserError(f"{what}: values from {low:g} to {high:g}; to binarise them, scale them to [0, 1] or give uint8")
    return examples


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
