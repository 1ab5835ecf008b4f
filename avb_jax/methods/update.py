"""From gradients to the next State: what every method's step ends with."""

import jax.numpy as jnp
import optax

from avb_jax.players import Model
from avb_jax.types import Players, State


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
    """Counts the step and moves the average, whose decay grows to `ema_decay` as (1 + t) / (10 + t)."""
    average = state.average
    if average is not None:
        decay = jnp.minimum(model.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(state.params, average, 1.0 - decay)
    return state._replace(step=state.step + 1, average=average)
