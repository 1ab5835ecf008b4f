"""One program per device, each with a share of the batch: `jax.pmap`, or any other map with a named axis."""

import jax
import jax.numpy as jnp

from avb_jax.method import Method
from avb_jax.types import Array, State


def over_devices(method: Method, axis_name: str) -> Method:
    """The method with a `train_step` for a map over `axis_name`, which gets this device's share of the batch.

    Each device has randomness of its own; gradients, collections (the running statistics) and what is observed are averaged
    over the devices. A network that normalises over the batch does so over its device's share, unless it knows the axis itself:
    `networks.ResNet(axis_name=axis_name)`, `flax.linen.BatchNorm(axis_name=axis_name)`.

    Example::

        step = jax.pmap(over_devices(method, "devices").train_step, "devices", in_axes=(None, 0, 0))
    """

    def train_step(key: Array, state: State, x: Array) -> tuple:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        state, info = method.train_step(key, state, x, lambda tree: jax.lax.pmean(tree, axis_name))
        return state, jax.lax.pmean(jax.tree.map(jnp.mean, info), axis_name)

    return method._replace(train_step=train_step)
