"""Several processes that are one run, on JAX's own runtime: who writes, what each of them holds, what they agree on.

All run the same program and come to the same numbers: each reads its devices' share of a batch, evaluates its share of the
examples, and the first alone writes, but for checkpoints, which all write together. `jax.distributed.initialize` comes before
anything else (the experiments' `--distributed`). With one process nothing here does anything.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from avb_jax.types import PyTree


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def index() -> int:
    """Which one this is."""
    return jax.process_index()


def first() -> bool:
    """Whether this is the one that writes."""
    return index() == 0


def wait(what: str) -> None:
    """Until all have come to the same place."""
    if several():
        multihost_utils.sync_global_devices(what)


def gathered(tree: PyTree) -> list[PyTree]:
    """What each process has of NumPy arrays of the same shapes, in the processes' order."""
    if not several():
        return [tree]
    everyone = multihost_utils.process_allgather(tree)
    return [jax.tree.map(lambda a, of=number: a[of], everyone) for number in range(jax.process_count())]


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """Arrays that every process has, placed, and JAX's own copied; a process keeps what its devices hold of them."""

    def one(a):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(a)), impl=jax.random.key_impl(a))
        if not several():
            return jax.device_put(copied(a) if isinstance(a, jax.Array) else a, sharding)
        whole = np.asarray(a)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def copied(tree: PyTree) -> PyTree:
    """Arrays of their own with the same values, where they are; unlike `jnp.copy`, without a program for each shape."""
    return jax.device_put(tree, may_alias=False)


def own(tree: PyTree) -> PyTree:
    """This process's own copy of arrays of which all devices hold the whole."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree) if several() else tree
