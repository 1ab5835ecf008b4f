"""Codes of many examples."""

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.method import Method
from avb_jax.streams import stream
from avb_jax.training.callbacks import Progress
from avb_jax.types import Array, State, UserError

BATCH = 500


def codes(
    method: Method, state: State, stored: np.ndarray, key: Array, binarize: str = "none", draws: int = 1, quiet: bool = True
) -> dict[str, np.ndarray]:
    """Codes z ~ q(z|x) [N, draws, Z] of examples [N, ...], and mean and std [N, Z] where the encoder knows them.

    Args:
      method: one that encodes.
      state: of one seed.
      stored: examples as a `data.Dataset` has them; they may be memory-mapped.
      key: of z, and of pixels that are drawn.
      binarize: as the data set's.
      draws: of z for each.
      quiet: no progress on the terminal.

    Raises:
      UserError: a method without an encoder, no examples, or fewer than one draw.
    """
    if method.encode is None:
        raise UserError(f"{method.name}: has no encoder; give a method that has one")
    if draws < 1 or not len(stored):
        raise UserError(f"draws={draws}, stored of {len(stored)} examples: give at least one of each")

    @jax.jit
    def of(number: Array, images: Array):
        x = to_pixels(jax.random.fold_in(stream(key, "pixels"), number), images, binarize)
        posterior = method.encode(jax.random.fold_in(key, number), state, x, draws)
        found = {"z": jnp.moveaxis(posterior.z, 0, 1), "mean": posterior.mean, "std": posterior.std}
        return {name: array for name, array in found.items() if array is not None}

    parts, progress = [], Progress("encoding", len(stored), 0, quiet, "example")
    for number, first in enumerate(range(0, len(stored), BATCH)):
        images = np.asarray(stored[first : first + BATCH])
        padded = np.concatenate([images, np.repeat(images[-1:], BATCH - len(images), axis=0)])  # one program for all
        parts.append({name: np.asarray(array)[: len(images)] for name, array in of(number, jnp.asarray(padded)).items()})
        progress.update(first + len(images), "")
    progress.close()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
