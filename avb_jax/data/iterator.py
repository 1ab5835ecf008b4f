"""Batches from an iterator of the user's, with a position that a run saves and restores."""

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np

from avb_jax.types import Array, UserError


class Batches:
    """An iterator of batches x [B, ...], all of one size, as `fit` reads it.

    Grain's iterators have `get_state` and `set_state`, and so may any other: with these a run that was interrupted continues
    where it was. Without, only a run without a workdir takes it.
    """

    def __init__(self, batches: Iterable):
        """Reads the first batch, for its shape; it is given out again."""
        self._iterator = iter(batches)
        self._resumable = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")
        start = self._iterator.get_state() if self._resumable else None
        self.first = self._next()  # [B, ...]
        self.shape = self.first.shape
        self._ahead = [self.first]
        if self._resumable:
            self._iterator.set_state(start)
            self._ahead = []

    def take(self, count: int) -> np.ndarray:
        """The next `count` batches [count, B, ...].

        Raises:
          UserError: there are no more, or one has another shape.
        """
        batches = [self._ahead.pop() if self._ahead else self._next() for _ in range(count)]
        for batch in batches:
            if batch.shape != self.shape:
                raise UserError(f"data: a batch of shape {batch.shape} after one of {self.shape}; drop what is left over")
        return np.stack(batches)

    def position(self) -> dict:
        """Where the iterator is, as JSON has it.

        Raises:
          UserError: it cannot tell.
        """
        if not self._resumable:
            raise UserError(
                "data: the iterator has no get_state and set_state, so that a run with a workdir could not be resumed; use one "
                "of grain's, an array, or no workdir"
            )
        state = self._iterator.get_state()
        return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"state": state}

    def restore(self, position: dict) -> None:
        """Goes where `position` said that it was."""
        state = base64.b64decode(position["base64"]) if "base64" in position else position["state"]
        self._iterator.set_state(state)
        self._ahead = []

    def prepare(self, key: Array, x: Array) -> Array:
        """Batches are trained on as they come."""
        del key
        return x

    def _next(self) -> np.ndarray:
        try:
            batch: Any = next(self._iterator)
        except StopIteration:
            raise UserError("data: the iterator has no more batches; repeat it, or lower steps") from None
        batch = np.array(batch)  # a copy: an iterator may fill one buffer again and again
        if batch.ndim < 2:
            raise UserError(f"data: a batch of shape {batch.shape}; an iterator must give arrays x [B, ...]")
        return batch
