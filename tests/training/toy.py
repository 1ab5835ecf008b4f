"""A method that is traced and compiled in no time: for what the host loop does around any method's step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax import Method, Players
from avb_jax.method import identity
from avb_jax.types import State


class Seen(NamedTuple):
    """An Info with the names of AVB's, [B] each."""

    elbo: jax.Array
    reconstruction: jax.Array
    kl: jax.Array
    adversary_loss: jax.Array


def toy(name: str = "avb", rate: float = 0.1, statistics: bool = True) -> Method:
    """A decoder that is one image and moves to the mean of those that it sees, with noise of every step's own."""

    def init(key, x):
        player = {"image": jax.random.normal(key, x.shape[1:])}
        collections = {"statistics": {"count": jnp.zeros(())}} if statistics else {}
        return State(
            jnp.int32(0), Players(None, player, None), Players(None, {"moves": player}, None), Players({}, collections, {})
        )

    def train_step(key, state, x, reduce=identity):
        image = state.params.decoder["image"]
        move = reduce(jnp.mean(x - image, axis=0)) + jax.random.normal(key, image.shape)
        distance = jnp.sum(jnp.square(x - image), axis=(1, 2))
        collections = jax.tree.map(lambda count: count + 1, state.collections)
        params, moves = ({"image": image + rate * move}, {"moves": {"image": move}})
        after = State(state.step + 1, Players(None, params, None), Players(None, moves, None), collections)
        return after, Seen(-distance, distance, distance, distance)

    def sample(key, state, count):
        return jnp.broadcast_to(state.params.decoder["image"], (count, *state.params.decoder["image"].shape))

    return Method(name, init, train_step, sample)
