"""The paper's figures of images: samples (Figures 4 and 5), reconstructions, interpolations (Figure 6), neighbours."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy.special import ndtri

from avb_jax.data.dataset import Dataset, to_pixels
from avb_jax.evaluation.samples import as_pixels
from avb_jax.method import Method
from avb_jax.models import images_of
from avb_jax.streams import stream
from avb_jax.types import Array, State

COLUMNS = 10
SAMPLES = 100
PAIRS = 50  # reconstructions
INTERPOLATIONS = 10
NEIGHBOURS = 5
BLOCK = 2048  # training images compared at once
PLANE = 15  # images along each side of the latent plane
SMALLEST = 640  # pixels across that small grids are enlarged to


class Grid(NamedTuple):
    """Images [N, H, W] or [N, H, W, C], pixels in [0, 1], to be shown in rows of so many columns."""

    images: np.ndarray
    columns: int


def samples(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Mean images of p(x|z) at z ~ p(z)."""
    del data
    return Grid(np.asarray(_sample(method, key, state, SAMPLES)), COLUMNS)


def reconstructions(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Test images, and in the row below each row of them their reconstructions."""
    x, _, decoded = _encode(method, key, state, data.test[:PAIRS], data.binarize)
    whole = len(x) // COLUMNS * COLUMNS or len(x)
    columns = min(COLUMNS, whole)
    return Grid(interleave(np.asarray(x)[:whole], np.asarray(decoded)[:whole], columns), columns)


def interpolation(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Rows from one test image's code to another's on a straight line, between the two images themselves.

    The second and the last but one picture of a row are the images' reconstructions.
    """
    count = min(INTERPOLATIONS, len(data.test) // 2)
    x, z, _ = _encode(method, key, state, data.test[: 2 * count], data.binarize)
    x, z = np.asarray(x), np.asarray(z)
    share = np.linspace(0.0, 1.0, COLUMNS - 2)[:, None]
    line = (1.0 - share) * z[:count, None] + share * z[count:, None]  # [count, COLUMNS - 2, Z]
    line = line.reshape(-1, z.shape[1]).astype(np.float32)
    decoded = np.asarray(_decode(method, state, line))
    rows = decoded.reshape(count, COLUMNS - 2, *x.shape[1:])
    rows = np.concatenate([x[:count, None], rows, x[count:, None]], axis=1)
    return Grid(rows.reshape(-1, *x.shape[1:]), COLUMNS)


def neighbours(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Samples, each next to the training images nearest to it (Euclidean, in pixels), the nearest first."""
    drawn = np.asarray(_sample(method, key, state, COLUMNS))
    flat = drawn.reshape(len(drawn), -1)
    best, where = np.empty((len(drawn), 0), np.float32), np.empty((len(drawn), 0), int)
    for first in range(0, len(data.train), BLOCK):
        block = as_pixels(data.train[first : first + BLOCK]).reshape(-1, flat.shape[1])
        distance = np.sum(block**2, axis=1) - 2.0 * flat @ block.T  # |a - b|^2 but for |a|^2
        best = np.concatenate([best, distance], axis=1)
        where = np.concatenate([where, np.broadcast_to(first + np.arange(len(block)), distance.shape)], axis=1)
        order = np.argsort(best, axis=1)[:, :NEIGHBOURS]
        best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
    near = as_pixels(data.train[np.sort(where.ravel())])
    near = near[np.argsort(np.argsort(where.ravel()))].reshape(*where.shape, *drawn.shape[1:])
    rows = np.concatenate([drawn[:, None], near], axis=1)
    return Grid(rows.reshape(-1, *drawn.shape[1:]), 1 + where.shape[1])


def latent_plane(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Mean images of p(x|z) over the plane of two latents, z_1 to the right and z_2 upwards, at quantiles of N(0, 1)."""
    del key, data
    levels = ndtri(np.linspace(0.02, 0.98, PLANE))
    z = np.stack(np.meshgrid(levels, levels[::-1]), axis=-1).reshape(-1, 2).astype(np.float32)
    return Grid(np.asarray(_decode(method, state, z)), PLANE)


def tile(images: np.ndarray, columns: int, gap: int = 1, background: float = 0.5) -> np.ndarray:
    """Images [N, H, W] or [N, H, W, C] side by side in rows of `columns`, as one; pixels in [0, 1], clipped."""
    images = np.clip(np.asarray(images, np.float32), 0.0, 1.0)
    rows, (height, width) = -(-len(images) // columns), images.shape[1:3]
    size = rows * (height + gap) + gap, columns * (width + gap) + gap
    canvas = np.full((*size, *images.shape[3:]), background, np.float32)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def to_image(images: np.ndarray, columns: int, smallest: int = SMALLEST) -> Image.Image:
    """`tile(images)` as a picture, enlarged in whole steps to about `smallest` pixels across."""
    canvas = np.round(tile(images, columns) * 255.0).astype(np.uint8)
    canvas = canvas[..., 0] if canvas.ndim == 3 and canvas.shape[2] == 1 else canvas
    factor = max(1, round(smallest / canvas.shape[1]))
    return Image.fromarray(canvas.repeat(factor, axis=0).repeat(factor, axis=1))


def interleave(originals: np.ndarray, reconstructions: np.ndarray, columns: int) -> np.ndarray:
    """Rows of originals, each above the row of its reconstructions."""
    rows = [part.reshape(-1, columns, *part.shape[1:]) for part in (np.asarray(originals), np.asarray(reconstructions))]
    return np.stack(rows, axis=1).reshape(-1, *originals.shape[1:])


@functools.partial(jax.jit, static_argnames=("method", "count"))
def _sample(method: Method, key: Array, state: State, count: int) -> Array:
    return method.sample(key, state, count)


@functools.partial(jax.jit, static_argnames="method")
def _decode(method: Method, state: State, z: Array) -> Array:
    return images_of(stream(jax.random.key(0), "images"), method.decode(state, z))


@functools.partial(jax.jit, static_argnames=("method", "binarize"))
def _encode(method: Method, key: Array, state: State, images: np.ndarray, binarize: str) -> tuple[Array, Array, Array]:
    """Stored images as x, a code of each, and its mean image."""
    x = to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(images), binarize)
    z = method.encode(key, state, x).z
    return x, z, images_of(stream(key, "images"), method.decode(state, z))
