"""Is T near its optimum? A fresh adversary, trained on frozen players, says how much T misses.

This module has the `train_step` of a method, so that `loop.fit` trains the fresh adversary with all that it does for one:
devices, progress, checkpoints.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import contrast, objectives, players
from avb_jax.evaluation.examples import map_examples
from avb_jax.methods.update import apply_gradients, finish_step
from avb_jax.players import Model
from avb_jax.types import Array, Info, Players, State, UserError, Variables


def restart_adversary(key: Array, state: State, model: Model, optimizers: Players, x: Array) -> State:
    """The players as they are evaluated, at step 0, with a newly initialised adversary; one run's State.

    Args:
      key: of the adversary's params.
      state: the trained State, without a leading axis of seeds.
      model: the method's model.
      optimizers: of which the adversary's is used.
      x: [B, ...] any batch, for its shape.

    Raises:
      UserError: the model has no adversary.
    """
    if model.networks.adversary is None:
        raise UserError("networks.adversary=None: this method has no T whose optimality could be measured")
    fresh = players.init(key, model, optimizers, x)
    frozen = players.evaluation_variables(state)
    start = Variables(
        frozen.params._replace(adversary=fresh.params.adversary),
        frozen.batch_stats._replace(adversary=fresh.batch_stats.adversary),
    )
    average = jax.tree.map(jnp.copy, start) if model.ema_decay else None
    return State(fresh.step, start.params, Players(adversary=fresh.opt_state.adversary), start.batch_stats, average)


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One update of T alone (eq. 3.3), encoder in evaluation mode; arguments and returns as in `avb.train_step`."""
    draws = players.draw(key, model, batch)
    encoder = state.params.encoder, state.batch_stats.encoder
    z = contrast.encode(model, *encoder, batch, draws.noise, train=False)[0].seen
    gradient, (said, stats) = jax.grad(objectives.adversary_loss, has_aux=True)(
        state.params.adversary, state.batch_stats, draws, z, model=model
    )
    state = state._replace(batch_stats=state.batch_stats._replace(adversary=stats))
    state = apply_gradients(state, Players(adversary=gradient), optimizers)
    return finish_step(state, model), Info(
        adversary_loss=said.loss, adversary_accuracy=said.accuracy, adversary_saturation=said.saturation
    )  # fmt: skip


class AdversaryTerms(NamedTuple):
    """What a T says, per example, averaged over draws."""

    loss: Array  # [N] eq. 3.3 as a minimisation, nats; of two T on the same players the lower one is nearer the optimum
    accuracy: Array  # [N] in [0, 1]
    kl: Array  # [N] its estimate of KL(q(z|x), p(z)), nats: T itself, and log r(z|x) - log p(z) under adaptive contrast


@functools.partial(jax.jit, static_argnames=("model", "binarize", "draws", "chunk"))
def adversary_terms(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 4, chunk: int = 250,
) -> AdversaryTerms:  # fmt: skip
    """Evaluates T on examples; the same key gives two T the same z.

    Args:
      key: randomness, see `examples.map_examples`.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      model: the method's model.
      numbers: [N] which examples they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      draws: of z from q(z|x) and from p(z), per example.
      chunk: examples at once.
    """
    params, stats = players.evaluation_variables(state)

    def one(key: Array, x: Array) -> AdversaryTerms:
        sampled = players.draw(key, dataclasses.replace(model, noise_draws=draws), x[None])
        drawn, _ = contrast.encode(model, params.encoder, stats.encoder, x[None], sampled.noise, train=False)
        _, (said, _) = objectives.adversary_loss(params.adversary, stats, sampled, drawn.seen, model=model, train=False)
        return AdversaryTerms(said.loss[0], said.accuracy[0], (said.t + drawn.log_ratio.mean(axis=0))[0])

    return map_examples("adversary", one, key, images, numbers, binarize, chunk)
