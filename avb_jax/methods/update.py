"""How a step goes from losses to the next State, whatever the method."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from avb_jax import players
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import Array, Info, Players, PyTree, State, Variables


def play(
    key: Array, state: State, batch: Array, *, model: Model, optimizers: Players, loss: Callable, adversary_loss: Callable,
    gradients: Callable | None = None,
) -> tuple[State, PyTree, Info]:  # fmt: skip
    """Algorithm 1 with any two losses: `adversary_steps - 1` updates of T alone, then all players at once.

    In the joint update one set of draws serves all gradients, each taken at the params before it. The updates of T that go
    first use draws of their own, on the same x: the others' gradients then meet a T that has caught up (section 3.2).

    Args:
      key: a key of this step's own.
      state: the State before.
      batch: x [B, ...].
      model: networks, distributions and scales.
      optimizers: an optax optimiser per player.
      loss: of encoder and decoder, (params, adversary, batch_stats, draws, *, model, beta) -> (loss [], (observed, shown,
        batch_stats)); `shown` is what T is to judge.
      adversary_loss: T's, (adversary, batch_stats, draws, shown, *, model) -> (loss [], (`objectives.Said`, T's batch_stats)).
      gradients: arguments as `loss`, -> (gradients of encoder and decoder, the same second part); of `loss` by default.

    Returns:
      The State after, what `loss` observed, and an Info of beta and what T said.
    """
    for i in range(1, model.adversary_steps):
        draws = players.draw(jax.random.fold_in(stream(key, "adversary"), i), model, batch)
        _, (_, shown, _) = loss(state.params, state.params.adversary, state.batch_stats, draws, model=model)
        gradient, (_, stats) = jax.grad(adversary_loss, has_aux=True)(
            state.params.adversary, state.batch_stats, draws, shown, model=model
        )
        batch_stats = state.batch_stats._replace(adversary=stats)
        state = apply_gradients(state._replace(batch_stats=batch_stats), Players(adversary=gradient), optimizers)

    draws = players.draw(key, model, batch)
    beta = model.beta_at(state.step)
    generative, (observed, shown, stats) = (gradients or jax.grad(loss, has_aux=True))(
        state.params._replace(adversary=None), state.params.adversary, state.batch_stats, draws, model=model, beta=beta
    )
    gradient, (said, adversary_stats) = jax.grad(adversary_loss, has_aux=True)(
        state.params.adversary, state.batch_stats, draws, shown, model=model
    )
    state = state._replace(batch_stats=stats._replace(adversary=adversary_stats))
    state = apply_gradients(state, generative._replace(adversary=gradient), optimizers)
    info = Info(
        beta=beta, adversary_loss=said.loss, adversary_accuracy=said.accuracy, adversary_saturation=said.saturation
    )
    return finish_step(state, model), observed, info


def apply_gradients(state: State, gradients: Players, optimizers: Players) -> State:
    """Updates each player that has a gradient with its own optimiser; the others are left as they are."""
    params, opt_state = {}, {}
    for name, gradient in gradients._asdict().items():
        params[name], opt_state[name] = getattr(state.params, name), getattr(state.opt_state, name)
        if gradient is not None:
            updates, opt_state[name] = getattr(optimizers, name).update(gradient, opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    return state._replace(params=Players(**params), opt_state=Players(**opt_state))


def finish_step(state: State, model: Model) -> State:
    """Counts the step and moves the averages, whose decay grows to `ema_decay` as (1 + t) / (10 + t)."""
    average = state.average
    if average is not None:
        decay = jnp.minimum(model.ema_decay, (1.0 + state.step) / (10.0 + state.step))

        def move(new: Array, old: Array) -> Array:  # a count that a user's module carries is not averaged
            return optax.incremental_update(new, old, 1.0 - decay) if jnp.issubdtype(new.dtype, jnp.floating) else new

        average = jax.tree.map(move, Variables(state.params, state.batch_stats), average)
    return state._replace(step=state.step + 1, average=average)
