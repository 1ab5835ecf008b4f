"""AVB and SIVI in the shape of blackjax's variational algorithms."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import VIAlgorithm
from jax.flatten_util import ravel_pytree

from avb_jax.inference.fitting import Game, game, started
from avb_jax.settings import at_least, check_settings
from avb_jax.streams import stream
from avb_jax.types import Array, PyTree, State


class VIState(NamedTuple):
    """What a step carries to the next one."""

    players: State
    position: PyTree  # where q began: what draws look like


def as_vi_algorithm(
    logdensity_fn: Callable[[PyTree], Array],
    *,
    method: str = "avb",
    num_samples: int = 512,
    rng_key: Array | None = None,
    **settings,
) -> VIAlgorithm:
    """AVB, SIVI or UIVI with blackjax's interface.

    `init(position)`, `step(rng_key, state)`, `sample(rng_key, state, num_samples)`. A step is one of the game: T's updates, and
    the sampler's. q begins as N(position, I), where `fit` looks for a beginning nearer to the density. Rates do not fall;
    samples are of averaged params.

    Args:
      logdensity_fn: position -> log p~ [], up to a constant; the position is any pytree of arrays, without constraints.
      method: 'avb', 'sivi' or 'uivi'.
      num_samples: draws of a step.
      rng_key: of the players' first params; always the same by default.
      **settings: of `fit`: noise_dim, widths, gaussian_share, adversary_widths, adversary_steps, sampler_rate, adversary_rate,
        inflation, clip.

    Returns:
      A `blackjax.base.VIAlgorithm`. `step` returns the new state and what the step was observed by: `elbo` [num_samples], and
      under AVB T's loss and accuracy.

    Raises:
      UserError: settings out of range.
    """
    check_settings(num_samples=at_least(num_samples, 2))

    def flat(position: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
        at, unravel = ravel_pytree(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), position))
        return at, unravel

    @functools.lru_cache
    def play(structure, shapes: tuple[tuple[int, ...], ...]) -> Game:
        at, unravel = flat(jax.tree.unflatten(structure, [jnp.zeros(shape) for shape in shapes]))
        return game(lambda z: logdensity_fn(unravel(z)), at.size, method=method, steps=None, **settings)

    def of(position: PyTree) -> Game:
        leaves, structure = jax.tree.flatten(position)
        with jax.ensure_compile_time_eval():
            return play(structure, tuple(jnp.shape(leaf) for leaf in leaves))

    def init(position: PyTree) -> VIState:
        played, at = of(position), flat(position)[0]
        key = stream(jax.random.key(0), "players") if rng_key is None else rng_key
        return VIState(started(played, at, 1.0).init(key, jnp.zeros((num_samples, 0))), position)

    def step(rng_key: Array, state: VIState) -> tuple[VIState, NamedTuple]:
        played = of(state.position)
        players, info = played.method.train_step(rng_key, state.players, jnp.zeros((num_samples, 0)))
        return state._replace(players=players), info

    def sample(rng_key: Array, state: VIState, num_samples: int = 1) -> PyTree:
        played, unravel = of(state.position), flat(state.position)[1]
        return jax.vmap(unravel)(played.method.sample(rng_key, state.players, num_samples))

    return VIAlgorithm(init, step, sample)
