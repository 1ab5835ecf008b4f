"""Devices: the same step under jit, under pmap, and under jit with the batch sharded over a mesh.

What is compiled is a block of steps, one `lax.scan` over the batches' indices, with the data set on the device (or over the
batches themselves, where these come from a memory-mapped file or an iterator).

- jit: one device.
- pmap: one program per device, each with its share of the batch and randomness of its own; gradients, collections and what is
  observed are averaged over the devices (`transforms.over_devices`).
- sharded: one program over all devices of a mesh, with the batch split between them: the same numbers on any count.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from avb_jax import processes
from avb_jax.method import Method
from avb_jax.training import memory
from avb_jax.training.programs import Programs
from avb_jax.transforms import of_seed, over_devices
from avb_jax.types import Array, Players, PyTree, State, UserError

AXIS = "devices"
MODES = ("auto", "jit", "pmap", "sharded")


class Observed(NamedTuple):
    """What a block says of itself, on the device until it is read."""

    info: PyTree  # the Info's means over steps and examples
    finite: dict[str, Array]  # by player, whether all that belongs to it is finite after the last update
    wish: Array | bool = False  # whether any process wished to stop when the block began


class Blocks(NamedTuple):
    """A compiled block of steps and what places its arguments; made by `compile_blocks`.

    With seeds, keys, State, indices, batches and Info have a leading axis of them.
    """

    fetch: Callable  # indices, or batches, [steps, batch_size, ...] on the host -> as `run` wants them; any thread may call it
    run: Callable  # (key, state, batches, wish) -> (state, Observed); donates state
    place: Callable  # state on the host or one device -> as `run` wants it; a copy, which `run` may take
    gather: Callable  # as `run` returns it -> state, one copy
    # (key, state, what `fetch` is given, abstract) -> the bytes that the block needs at least; nothing is compiled
    needed: Callable
    mode: str
    devices: list


def resolve(mode: str, batch_size: int, devices: list | None = None) -> tuple[str, list]:
    """The mode that 'auto' stands for (sharded where there are several devices), and the devices it uses.

    Raises:
      UserError: no such mode, or a batch that the devices cannot share equally.
    """
    devices = jax.devices() if devices is None else devices
    if not isinstance(devices, list | tuple) or not devices:
        raise UserError(f"devices={devices!r}: give a list of some of jax.devices()")
    if mode not in MODES:
        raise UserError(f"parallel={mode!r}: must be one of {', '.join(MODES)}")
    if mode == "auto":
        mode = "sharded" if len(devices) > 1 else "jit"
    if processes.several() and mode != "sharded":
        raise UserError(f"parallel={mode!r}: is for one process, and there are {jax.process_count()}; use 'sharded' or 'auto'")
    if mode == "jit":
        return mode, devices[:1]
    if batch_size % len(devices):
        raise UserError(
            f"batch_size={batch_size}: not divisible by the {len(devices)} devices; use a multiple of {len(devices)}, or "
            "parallel='jit' for one device"
        )
    return mode, devices


def compile_blocks(
    method: Method,
    prepare: Callable,
    stored: np.ndarray | None,
    *,
    mode: str = "auto",
    batch_size: int,
    num_seeds: int | None = None,
    devices: list | None = None,
    programs: Programs | None = None,
) -> Blocks:
    """Compiles blocks of a method's steps for the devices.

    Args:
      method: of one seed.
      prepare: (key, stored examples [B, ...]) -> x [B, ...], on the device.
      stored: the training examples, placed whole on every device, or read batch by batch where they are memory-mapped; None
        where `fetch` is given batches, not indices.
      mode: one of `MODES`.
      batch_size: of the whole step, over all devices.
      num_seeds: how many runs train side by side (`jax.vmap`); None: one, without an axis of seeds.
      devices: all there are, by default.
      programs: where what was traced for one device is kept; nowhere by default.

    Raises:
      UserError: as `resolve`.
    """
    mode, devices = resolve(mode, batch_size, devices)
    streamed = stored is None or isinstance(stored, np.memmap)
    if mode == "pmap":
        return _pmap(method, prepare, stored, streamed, num_seeds, devices)
    return _jit(method, prepare, stored, streamed, num_seeds, devices, mode, programs or Programs())


def _jit(method, prepare, stored, streamed, num_seeds, devices, mode, programs) -> Blocks:
    block = _over_seeds(functools.partial(_block, method.train_step, prepare, None), num_seeds)
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_batch = NamedSharding(mesh, PartitionSpec(*[None] * (1 if num_seeds is None else 2), AXIS))
    data = None if streamed else processes.put(stored, everywhere)
    several = processes.several()

    def wishing(key: Array, state: State, data: Array | None, batches: Array, wishes: Array | None) -> tuple[State, Observed]:
        """With the processes' wishes, which have to be agreed upon in the same program: another would run next to it."""
        state, *observed = block(key, state, data, batches)
        return state, Observed(*observed, jnp.any(wishes) if several else False)

    compiled = programs.keep("block of steps", wishing, devices, num_seeds, donate_argnums=1, out_shardings=everywhere)

    def fetch(batches: np.ndarray) -> Array:
        if not several:
            return jax.device_put(_read(stored, batches) if streamed else batches, by_batch)
        rest = stored.shape[1:] if streamed and stored is not None else ()

        def share(index: tuple) -> np.ndarray:
            """What one of this process's devices computes with: nothing else is read."""
            part = batches[index[: batches.ndim]]
            return _read(stored, part) if streamed else part

        return jax.make_array_from_callback((*batches.shape, *rest), by_batch, share)

    def run(key: Array, state: State, batches: Array, wish: bool = False) -> tuple[State, Observed]:
        if not several:
            state, observed = compiled(key, state, data, batches, None)
            return state, observed._replace(wish=wish)
        by_device = NamedSharding(mesh, PartitionSpec(AXIS))
        wishes = jax.make_array_from_callback((len(devices),), by_device, lambda index: np.full(1, wish))
        return compiled(processes.put(key, everywhere), state, data, batches, wishes)

    def place(state: State) -> State:
        return processes.put(state, everywhere)

    def needed(key: Array, state: State, batches: jax.ShapeDtypeStruct) -> int:
        shape, dtype = _of_read(stored if streamed else None, batches.shape, batches.dtype)
        # Placed as `run` has it, which then need not trace again.
        batches = jax.ShapeDtypeStruct(shape, dtype, sharding=by_batch)
        wishes = jax.ShapeDtypeStruct((len(devices),), bool, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
        return compiled.needed(key, state, data, batches, wishes if several else None)

    return Blocks(fetch, run, place, lambda state: state, needed, mode, devices)


def _pmap(method, prepare, stored, streamed, num_seeds, devices) -> Blocks:
    block = _over_seeds(functools.partial(_block, over_devices(method, AXIS).train_step, prepare, AXIS), num_seeds)
    compiled = jax.pmap(block, AXIS, in_axes=(None, 0, 0, 0), donate_argnums=1, devices=devices)
    count = len(devices)
    by_device = NamedSharding(jax.make_mesh((count,), (AXIS,), devices=devices), PartitionSpec(AXIS))

    def place(tree: PyTree) -> PyTree:
        def copies(a: Array) -> Array:
            keys = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # in a network's collections, which NumPy does not know
            return (jnp if keys else np).broadcast_to(a, (count, *np.shape(a)))

        return jax.tree.map(lambda a: jax.device_put(copies(a), by_device), tree)

    def first(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a[0], tree)

    data = None if streamed else place(stored)
    position = 1 if num_seeds is None else 2  # of the batch's axis

    def fetch(batches: np.ndarray) -> Array:
        shape = batches.shape
        shares = batches.reshape(*shape[:position], count, shape[position] // count, *shape[position + 1 :])
        shares = np.ascontiguousarray(np.moveaxis(shares, position, 0))
        return jax.device_put(_read(stored, shares) if streamed else shares, by_device)

    def run(key: Array, state: State, batches: Array, wish: bool = False) -> tuple[State, Observed]:
        state, *observed = compiled(key, state, data, batches)
        return state, Observed(*first(observed), wish)

    def needed(key: Array, state: State, batches: jax.ShapeDtypeStruct) -> int:
        shape = batches.shape
        shares = (count, *shape[:position], shape[position] // count, *shape[position + 1 :])
        batches = jax.ShapeDtypeStruct(*_of_read(stored if streamed else None, shares, batches.dtype))
        return memory.needed(jax.make_jaxpr(compiled)(key, state, data, batches).jaxpr)

    return Blocks(fetch, run, place, first, needed, "pmap", devices)


def _of_read(stored: np.ndarray | None, shape: tuple, dtype: np.dtype) -> tuple[tuple, np.dtype]:
    """Shape and type on the device of what `_read` returns for indices, or batches, of these."""
    shape, dtype = (shape, dtype) if stored is None else ((*shape, *stored.shape[1:]), stored.dtype)
    return shape, jax.dtypes.canonicalize_dtype(dtype)


def _read(stored: np.ndarray | None, batches: np.ndarray) -> np.ndarray:
    """The batches, of which indices [...] are read from the memory-mapped examples in the order of their file."""
    if stored is None:
        return batches
    distinct, where = np.unique(batches, return_inverse=True)
    return np.asarray(stored[distinct])[where.reshape(batches.shape)]


def _block(
    step: Callable, prepare: Callable, axis: str | None, key: Array, state: State, data: Array | None, batches: Array
) -> tuple[State, PyTree, dict[str, Array]]:
    """Steps over batches [steps, B, ...], or, where there are `data`, over their indices [steps, B].

    Returns the State, the Info's means over steps and examples, and `finite` of the State.
    """

    def body(state: State, batch: Array) -> tuple[State, PyTree]:
        data_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        if axis is not None:
            data_key = jax.random.fold_in(data_key, jax.lax.axis_index(axis))
        state, info = step(step_key, state, prepare(data_key, batch if data is None else data[batch]))
        return state, jax.tree.map(jnp.mean, info)

    state, infos = jax.lax.scan(body, state, batches)
    return state, jax.tree.map(jnp.mean, infos), finite(state)


def finite(state: State) -> dict[str, Array]:
    """By player, whether all that belongs to it is finite: params, collections, averages, optimiser [].

    Losses are of the params before an update, so that they say nothing of the last one.
    """
    parts = [state.params, state.collections, state.opt_state, *(state.ema or ())]
    leaves = {
        player: [
            leaf for part in parts for leaf in jax.tree.leaves(getattr(part, player)) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        for player in Players._fields
    }
    return {player: jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in of])) for player, of in leaves.items() if of}


def _over_seeds(block: Callable, num_seeds: int | None) -> Callable:
    """`block` over a leading axis of seeds; one seed is not vmapped, which would make its convolutions grouped ones."""
    if num_seeds is None:
        return block
    if num_seeds > 1:
        return jax.vmap(block, in_axes=(0, 0, None, 0))

    def single(key: Array, state: State, data: Array | None, batches: Array) -> tuple[State, PyTree, dict[str, Array]]:
        result = block(key[0], of_seed(state, 0), data, batches[0])
        return jax.tree.map(lambda a: a[None], result)

    return single
