"""What every method is compared by, likelihood or not: its samples, and its reconstructions where it has an encoder."""

import jax
import numpy as np

from avb_jax import data
from avb_jax.data import Dataset
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import Array, State

AT_ONCE = 100


def samples(key: Array, method, model: Model, state: State, count: int) -> np.ndarray:
    """Images [count, *x] of the model, clipped to [0, 1]: the means of p(x|z) at z ~ p(z)."""
    generate = jax.jit(lambda key, state: method.sample(key, state, model, AT_ONCE))
    keys = jax.random.split(stream(key, "samples"), -(-count // AT_ONCE))
    return np.clip(np.concatenate([np.asarray(generate(k, state)) for k in keys])[:count], 0.0, 1.0)


def reconstruction_rmse(
    key: Array, method, model: Model, state: State, dataset: Dataset, images: np.ndarray, chunk: int = AT_ONCE
) -> float:
    """Root mean squared error of a pixel, of mean images decoded from one draw of z per image."""

    @jax.jit
    def squares(key: Array, state: State, images: Array) -> Array:
        data_key, z_key = jax.random.split(key)
        x = data.to_pixels(data_key, images, dataset.binarize)
        return (method.reconstruct(z_key, state, model, x) - x) ** 2

    total, key = 0.0, stream(key, "reconstructions")
    for i, start in enumerate(range(0, len(images), chunk)):
        total += float(np.sum(squares(jax.random.fold_in(key, i), state, np.asarray(images[start : start + chunk]))))
    return float(np.sqrt(total / np.prod(images.shape)))


def pixels(images: np.ndarray) -> np.ndarray:
    """Stored images as pixels in [0, 1], not binarised."""
    return np.asarray(data.to_pixels(stream(jax.random.key(0), "pixels"), np.asarray(images), "none"))
