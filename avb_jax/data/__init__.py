"""Data sets as arrays with named splits, by name through `load`; never imports methods."""

from avb_jax.data.dataset import Dataset, from_arrays, to_pixels
from avb_jax.data.iterator import Batches
from avb_jax.data.sources import SOURCES, load

__all__ = ["SOURCES", "Batches", "Dataset", "from_arrays", "load", "to_pixels"]
