"""Random streams: every use of randomness has a name of its own, so that no two uses draw the same numbers.

JAX's keys alone do not keep uses apart: `split(key, n)[i]` is `fold_in(key, i)`, so that a key which is split in one place and
folded with a count in another gives the same keys twice. A name becomes a number that no count reaches.
"""

import zlib

import jax
import numpy as np

from avb_jax.types import Array

_ABOVE_ALL_COUNTS = 2**31  # of steps, seeds, examples, devices: they are int32


def stream(key: Array, name: str) -> Array:
    """The key of the stream `name` under `key`: neither one of its splits nor `fold_in` of a count, nor another name's."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode()) | _ABOVE_ALL_COUNTS))
