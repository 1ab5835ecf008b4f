"""How a step goes from losses to the next State, whatever the method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from avb_jax.method import identity
from avb_jax.streams import stream
from avb_jax.types import AdversaryTerms, Array, Draws, Players, PyTree, State


class Generative(NamedTuple):
    """What the encoder's and decoder's loss has found on its way, next to its value."""

    terms: Any  # per example, for the Info
    compared: PyTree  # what the adversary's loss compares with its other side
    collections: Players  # new ones of encoder and decoder


def adversarial_step(
    key: Array,
    state: State,
    *,
    draw: Callable[[Array], Draws],
    loss: Callable,
    adversary_loss: Callable,
    optimizers: Players,
    adversary_steps: int = 1,
    gradients: Callable | None = None,
    reduce: Callable = identity,
) -> tuple[State, Any, AdversaryTerms]:
    """Algorithm 1 with any two losses: `adversary_steps - 1` updates of T alone, then all players at once.

    In the joint update one set of draws serves all gradients, each taken at the params before it. The updates of T that go
    first use draws of their own, on the same x: the others' gradients then meet a T that has caught up (section 3.2).

    Args:
      key: a key of this step's own.
      state: the State before.
      draw: key -> Draws.
      loss: of encoder and decoder, (params, adversary, collections, draws) -> (loss [], `Generative`).
      adversary_loss: T's, (adversary, collections, draws, compared) -> (loss [], (AdversaryTerms, T's new collections)).
      optimizers: an optax optimiser per player.
      adversary_steps: updates of T in all.
      gradients: arguments and returns as `of_both`, which is the default.
      reduce: averages a pytree over devices.

    Returns:
      The State after, the `Generative.terms` and the adversary's terms.
    """
    for i in range(1, adversary_steps):
        draws = draw(jax.random.fold_in(stream(key, "adversary"), i))
        _, generative = loss(state.params, state.params.adversary, state.collections, draws)
        gradient, (_, collections) = jax.grad(adversary_loss, has_aux=True)(
            state.params.adversary, state.collections, draws, generative.compared
        )
        state = state._replace(collections=state.collections._replace(adversary=mean_collections(reduce, collections)))
        state = apply_gradients(state, reduce(Players(adversary=gradient)), optimizers)

    of_players, generative, terms, collections = (gradients or of_both)(loss, adversary_loss, state, draw(key))
    collections = mean_collections(reduce, generative.collections._replace(adversary=collections))
    state = apply_gradients(state._replace(collections=collections), reduce(of_players), optimizers)
    return state._replace(step=state.step + 1), generative.terms, terms


def of_both(
    loss: Callable, adversary_loss: Callable, state: State, draws: Draws, of_players: Callable | None = None
) -> tuple[Players, Generative, AdversaryTerms, PyTree]:
    """The gradients of both losses at the State, one after the other.

    Args:
      loss: of encoder and decoder, as in `adversarial_step`.
      adversary_loss: T's, as there.
      state: the State before.
      draws: of the step.
      of_players: arguments as `loss`, -> (gradients of encoder and decoder, `Generative`); of `loss` by default.

    Returns:
      The gradients of all players, the `Generative`, the adversary's terms and its new collections.
    """
    params, collections = state.params, state.collections
    gradients, generative = (of_players or jax.grad(loss, has_aux=True))(
        params._replace(adversary=None), params.adversary, collections, draws
    )
    gradient, (terms, after) = jax.grad(adversary_loss, has_aux=True)(params.adversary, collections, draws, generative.compared)
    return gradients._replace(adversary=gradient), generative, terms, after


def apply_gradients(state: State, gradients: Players, optimizers: Players) -> State:
    """Updates each player that has a gradient with its own optimiser; the others are left as they are."""
    params, opt_state = {}, {}
    for name, gradient in gradients._asdict().items():
        params[name], opt_state[name] = getattr(state.params, name), getattr(state.opt_state, name)
        if gradient is not None:
            updates, opt_state[name] = getattr(optimizers, name).update(gradient, opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
    return state._replace(params=Players(**params), opt_state=Players(**opt_state))


def mean_collections(reduce: Callable, collections: PyTree) -> PyTree:
    """Collections averaged over devices; whole numbers, such as a count of batches, are the same on each."""

    def floating(a: Array) -> Array | None:
        return a if jnp.issubdtype(a.dtype, jnp.floating) else None

    averaged = reduce(jax.tree.map(floating, collections))
    return jax.tree.map(lambda a, mean: a if mean is None else mean, collections, averaged, is_leaf=lambda a: a is None)


def warmup(beta: float, steps: int) -> Callable[[Array], Array]:
    """The weight of the KL term, rising linearly over `steps` steps to `beta`: step -> []."""

    def at(step: Array) -> Array:
        return jnp.asarray(beta * (jnp.minimum(1.0, (step + 1) / steps) if steps else 1.0), jnp.float32)

    return at
