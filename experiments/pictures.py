"""The paper's figures of images: samples (Figures 4 and 5), reconstructions and interpolations (Figure 6), nearest neighbours.

All show the first seed's run. Each function takes the state of one run and gives an array of images, to be tiled in rows.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import UserError, data, plotting
from avb_jax.data import Dataset
from avb_jax.players import Model, mean_images
from avb_jax.streams import stream
from avb_jax.types import Array, State
from experiments import quality

COLUMNS = 10
SAMPLES = 100
PAIRS = 50  # reconstructions
INTERPOLATIONS = 10
NEIGHBOURS = 5
_BLOCK = 2048  # training images compared at once


def save(folder: pathlib.Path, name: str, method, model: Model, dataset: Dataset, step: int, states: State) -> None:
    """Writes samples and, with an encoder, reconstructions and interpolations; `loop.fit`'s `on_checkpoint`."""
    state = jax.tree.map(lambda a: a[0], states)
    for figure in ("samples", "reconstructions", "interpolation") if method.PLAYERS.encoder else ("samples",):
        draw(folder / f"{name}_{figure}_{step:06}.png", figure, method, model, dataset, state)


def draw(path: pathlib.Path, figure: str, method, model: Model, dataset: Dataset, state: State, seed: int = 0) -> None:
    """Writes one of `FIGURES` as a PNG.

    Raises:
      UserError: a figure of codes, of a method without an encoder.
    """
    if figure in ("reconstructions", "interpolation") and model.networks.encoder is None:
        raise UserError(f"--figure={figure}: this method has no encoder; take samples or neighbours")
    images, columns = FIGURES[figure](stream(jax.random.key(seed), figure), state, method, model, dataset)
    plotting.save_images(path, np.asarray(images), columns)


def samples(key: Array, state: State, method, model: Model, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Mean images of p(x|z) at z ~ p(z)."""
    del dataset
    return _sample(key, state, method, model, SAMPLES), COLUMNS


def reconstructions(key: Array, state: State, method, model: Model, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Test images, and in the row below each row of them their reconstructions."""
    x, _, decoded = _encode(key, state, dataset.test[:PAIRS], method, model, dataset.binarize)
    whole = len(x) // COLUMNS * COLUMNS or len(x)
    columns = min(COLUMNS, whole)
    return plotting.interleave(np.asarray(x)[:whole], np.asarray(decoded)[:whole], columns), columns


def interpolation(key: Array, state: State, method, model: Model, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Rows from one test image's code to another's on a straight line, between the two images themselves.

    The second and the last but one picture of a row are the images' reconstructions.
    """
    count = min(INTERPOLATIONS, len(dataset.test) // 2)
    x, z, _ = _encode(key, state, dataset.test[: 2 * count], method, model, dataset.binarize)
    x, z = np.asarray(x), np.asarray(z)
    share = np.linspace(0.0, 1.0, COLUMNS - 2)[:, None]
    line = (1.0 - share) * z[:count, None] + share * z[count:, None]  # [count, COLUMNS - 2, Z]
    decoded = np.asarray(_decode(state, model, line.reshape(-1, z.shape[1]).astype(np.float32)))
    rows = decoded.reshape(count, COLUMNS - 2, *x.shape[1:])
    rows = np.concatenate([x[:count, None], rows, x[count:, None]], axis=1)
    return rows.reshape(-1, *x.shape[1:]), COLUMNS


def neighbours(key: Array, state: State, method, model: Model, dataset: Dataset) -> tuple[np.ndarray, int]:
    """Samples, each beside the training images nearest to it (Euclidean, in pixels), the nearest first."""
    drawn = np.asarray(_sample(key, state, method, model, COLUMNS))
    flat = drawn.reshape(len(drawn), -1)
    best, where = np.empty((len(drawn), 0), np.float32), np.empty((len(drawn), 0), int)
    for first in range(0, len(dataset.train), _BLOCK):
        block = quality.pixels(dataset.train[first : first + _BLOCK]).reshape(-1, flat.shape[1])
        distance = np.sum(block**2, axis=1) - 2.0 * flat @ block.T  # |a - b|^2 but for |a|^2
        best = np.concatenate([best, distance], axis=1)
        where = np.concatenate([where, np.broadcast_to(first + np.arange(len(block)), distance.shape)], axis=1)
        order = np.argsort(best, axis=1)[:, :NEIGHBOURS]
        best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
    near = quality.pixels(dataset.train[np.sort(where.ravel())])
    near = near[np.argsort(np.argsort(where.ravel()))].reshape(*where.shape, *drawn.shape[1:])
    rows = np.concatenate([drawn[:, None], near], axis=1)
    return rows.reshape(-1, *drawn.shape[1:]), 1 + where.shape[1]


FIGURES = {
    "samples": samples, "reconstructions": reconstructions, "interpolation": interpolation, "neighbours": neighbours,
}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("method", "model", "count"))
def _sample(key: Array, state: State, method, model: Model, count: int) -> Array:
    return method.sample(key, state, model, count)


@functools.partial(jax.jit, static_argnames="model")
def _decode(state: State, model: Model, z: Array) -> Array:
    return mean_images(state, model, z)


@functools.partial(jax.jit, static_argnames=("method", "model", "binarize"))
def _encode(key: Array, state: State, images: Array, method, model: Model, binarize: str) -> tuple[Array, Array, Array]:
    """Pixels of images, a code of each, and its mean image."""
    x = data.to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(images), binarize)
    z = method.sample_posterior(key, state, model, x)
    return x, z, mean_images(state, model, z)
