"""Devices: the same step under jit, under pmap, and under jit with the batch sharded over a mesh.

What is compiled is a block of steps, one `lax.scan` over the batches' indices, with the data set on the device (or over the
batches themselves, where the data set is a memory-mapped file). Every
array of the State that enters and leaves a block has a leading axis of seeds, which train side by side (`vmap`).

  jit      one device
  pmap     one program per device, each with its share of the batch and randomness of its own; gradients, batch
           statistics and what is observed are averaged over the devices
  sharded  one program over all devices of a mesh, with the batch split between them: the same numbers on any count
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from avb_jax.data.dataset import Dataset, training_pixels
from avb_jax.players import Model
from avb_jax.types import Array, Info, Players, PyTree, State, UserError

AXIS = "devices"
MODES = ("auto", "jit", "pmap", "sharded")


class Parallel(NamedTuple):
    """A compiled block of steps and what places its arguments; made by `compile_blocks`."""

    fetch: Callable  # indices [S, steps, batch_size] on the host -> the batches as `run` wants them; any thread may call it
    run: Callable  # (keys [S], state [S, ...], batches) -> (state, Info of means [S]); donates state
    place: Callable  # state [S, ...] on the host or one device -> as `run` wants it; a copy, which `run` may take
    gather: Callable  # as `run` returns it -> state [S, ...], one copy
    mode: str
    devices: int


def resolve(mode: str, batch_size: int, devices: list | None = None) -> tuple[str, list]:
    """The mode that 'auto' stands for (sharded where there are several devices), and the devices it uses.

    Raises:
      UserError: no such mode, or a batch that the devices cannot share equally.
    """
    devices = jax.devices() if devices is None else devices
    if mode not in MODES:
        raise UserError(f"parallel={mode!r}: must be one of {', '.join(MODES)}")
    if mode == "auto":
        mode = "sharded" if len(devices) > 1 else "jit"
    if mode == "jit":
        return mode, devices[:1]
    if batch_size % len(devices):
        raise UserError(
            f"batch_size={batch_size}: not divisible by the {len(devices)} devices; use a multiple of {len(devices)}, or "
            "parallel='jit' for one device"
        )
    return mode, devices


def compile_blocks(
    train_step: Callable, model: Model, optimizers: Players, dataset: Dataset, *, mode: str = "auto", batch_size: int,
    num_seeds: int = 1, devices: list | None = None,
) -> Parallel:
    """Compiles blocks of a method's steps for the devices.

    Args:
      train_step: a method's, (key, state, batch, *, model, optimizers) -> (state, info).
      model: the method's model.
      optimizers: an optax optimiser per player.
      dataset: its training examples are placed whole on every device, or are read batch by batch from their file.
      mode: one of `MODES`.
      batch_size: of the whole step, over all devices.
      num_seeds: S, how many runs train side by side.
      devices: all there are, by default.

    Returns:
      A `Parallel`. `run` takes keys [S], a State with a leading axis S, and what `fetch` makes of indices.

    Raises:
      UserError: as `resolve`.
    """
    mode, devices = resolve(mode, batch_size, devices)
    if mode == "pmap":
        return _pmap(train_step, model, optimizers, dataset, num_seeds, devices)
    step = functools.partial(train_step, model=model, optimizers=optimizers)
    block = _over_seeds(functools.partial(_block, step, dataset.binarize, dataset.flip), num_seeds)
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_batch = NamedSharding(mesh, PartitionSpec(None, None, AXIS))
    streams = isinstance(dataset.train, np.memmap)
    data = None if streams else jax.device_put(dataset.train, everywhere)
    compiled = jax.jit(block, donate_argnums=1, out_shardings=everywhere)

    def fetch(indices: np.ndarray) -> Array:
        return jax.device_put(_read(dataset.train, indices) if streams else indices, by_batch)

    def run(keys: Array, state: State, batches: Array) -> tuple[State, Info]:
        return compiled(keys, state, data, batches)

    def place(state: State) -> State:
        return jax.device_put(jax.tree.map(jnp.copy, state), everywhere)

    return Parallel(fetch, run, place, lambda state: state, mode, len(devices))


def over_examples(function: Callable, devices: list | None = None) -> Callable:
    """Compiles an estimator (key, state, numbers [N], *arrays [N, ...]) -> tree of [N, ...], examples split over devices.

    N must be a multiple of the devices' number. The estimator has to give each example numbers that follow from it alone
    (`evaluation.examples`); the result is then the same on any number of devices.
    """
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))

    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    @jax.jit
    def compiled(shared: tuple[Array, State], examples: tuple[Array, ...]) -> PyTree:
        mapped = jax.shard_map(
            lambda shared, examples: function(*shared, *examples), mesh=mesh, in_specs=(whole, split), out_specs=split,
            check_vma=False,
        )  # fmt: skip
        return mapped(shared, examples)

    def run(key: Array, state: State, numbers: Array, *arrays: Array) -> PyTree:
        shared = jax.device_put((key, state), NamedSharding(mesh, whole))  # a restored State sits on one device
        return compiled(shared, jax.device_put((numbers, *arrays), NamedSharding(mesh, split)))

    return run


def examples_per_call(count: int, chunk: int) -> int:
    """How many of `count` examples to give `over_examples` at once: `chunk` per device, fewer where there are not so many."""
    devices = jax.device_count()
    return devices * min(chunk, -(-count // devices))


def _pmap(train_step, model, optimizers, dataset, num_seeds, devices) -> Parallel:
    optimizers = jax.tree.map(_averaging, optimizers, is_leaf=lambda o: isinstance(o, optax.GradientTransformation))
    model = _with_axis(model)

    def step(key: Array, state: State, batch: Array) -> tuple[State, Info]:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        state, info = train_step(key, state, batch, model=model, optimizers=optimizers)
        # Batch normalisations that know AXIS agree already; this keeps a user's own, that does not, from drifting apart.
        batch_stats, average = _averaged(state.batch_stats), state.average
        if average is not None:
            average = average._replace(batch_stats=_averaged(average.batch_stats))
        info = jax.lax.pmean(jax.tree.map(jnp.mean, info), AXIS)
        return state._replace(batch_stats=batch_stats, average=average), info

    block = _over_seeds(functools.partial(_block, step, dataset.binarize, dataset.flip, axis=AXIS), num_seeds)
    compiled = jax.pmap(block, AXIS, in_axes=(None, 0, 0, 0), donate_argnums=1, devices=devices)
    count = len(devices)
    by_device = NamedSharding(jax.make_mesh((count,), (AXIS,), devices=devices), PartitionSpec(AXIS))

    def place(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jax.device_put(np.broadcast_to(a, (count, *np.shape(a))), by_device), tree)

    streams = isinstance(dataset.train, np.memmap)
    data = None if streams else place(dataset.train)

    def fetch(indices: np.ndarray) -> Array:
        seeds, steps, batch_size = indices.shape
        shares = indices.reshape(seeds, steps, count, batch_size // count).transpose(2, 0, 1, 3)
        shares = np.ascontiguousarray(shares)
        return jax.device_put(_read(dataset.train, shares) if streams else shares, by_device)

    def run(keys: Array, state: State, batches: Array) -> tuple[State, Info]:
        state, info = compiled(keys, state, data, batches)
        return state, jax.tree.map(lambda a: a[0], info)

    return Parallel(fetch, run, place, lambda state: jax.tree.map(lambda a: a[0], state), "pmap", count)


def _read(images: np.memmap, indices: np.ndarray) -> np.ndarray:
    """The images [*indices.shape, ...], read in the order of the file."""
    distinct, where = np.unique(indices, return_inverse=True)
    return np.asarray(images[distinct])[where.reshape(indices.shape)]


def _block(
    step, binarize: str, flip: bool, key: Array, state: State, data: Array | None, batches: Array, axis: str | None = None
):  # fmt: skip
    """Steps over batches [steps, B, ...], or, where there are `data`, over their indices [steps, B].

    Returns the State and the Info's means over steps and examples.
    """

    def body(state: State, batch: Array) -> tuple[State, Info]:
        data_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        if axis is not None:
            data_key = jax.random.fold_in(data_key, jax.lax.axis_index(axis))
        images = batch if data is None else data[batch]
        state, info = step(step_key, state, training_pixels(data_key, images, binarize, flip))
        return state, jax.tree.map(jnp.mean, info)

    state, infos = jax.lax.scan(body, state, batches)
    return state, jax.tree.map(jnp.mean, infos)


def _over_seeds(block: Callable, num_seeds: int) -> Callable:
    """`block` over a leading axis of seeds; one seed is not vmapped, which would make its convolutions grouped ones."""
    if num_seeds > 1:
        return jax.vmap(block, in_axes=(0, 0, None, 0))

    def single(key: Array, state: State, data: Array | None, batches: Array):
        result = block(key[0], jax.tree.map(lambda a: a[0], state), data, batches[0])
        return jax.tree.map(lambda a: a[None], result)

    return single


def _averaged(stats: PyTree) -> PyTree:
    """Batch statistics averaged over AXIS; whole numbers, such as a count of batches, are the same on every device."""
    return jax.tree.map(lambda a: jax.lax.pmean(a, AXIS) if jnp.issubdtype(a.dtype, jnp.floating) else a, stats)


def _averaging(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimiser, fed with gradients averaged over AXIS; its state is what it was."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(gradients, state, params=None, **extra):
        return optimizer.update(jax.lax.pmean(gradients, AXIS), state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _with_axis(tree):
    """The model, or a network, with AXIS in every `axis_name` field: batch statistics over the global batch.

    Modules are found in fields of other modules, and in the tuples, lists and dicts that these hold.
    """
    if isinstance(tree, Model):
        return dataclasses.replace(tree, networks=_with_axis(tree.networks))
    if not isinstance(tree, nn.Module):
        # Containers alone are searched: whatever else a field holds (a function, an array) is a leaf.
        children = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nn.Module))
        found = any(isinstance(child, nn.Module) for child in children)
        return jax.tree.map(_with_axis, tree, is_leaf=lambda node: isinstance(node, nn.Module)) if found else tree
    fields = {name: value for name, value in vars(tree).items() if name in type(tree).__dataclass_fields__}
    changed = {name: _with_axis(value) for name, value in fields.items() if name not in ("parent", "name")}
    if "axis_name" in fields:
        changed["axis_name"] = AXIS
    return tree.clone(**changed)
