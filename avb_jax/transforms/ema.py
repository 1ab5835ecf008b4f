"""Exponential moving averages of params and collections, which evaluation then uses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from avb_jax.method import Method, identity
from avb_jax.types import Array, State, UserError, Variables


def with_ema(method: Method, decay: float) -> Method:
    """The method, with averages in `State.ema`, which all that evaluates uses in the place of params and collections.

    The decay grows to `decay` as (1 + t) / (10 + t), t the steps taken. Training is not changed.

    Raises:
      UserError: a decay outside (0, 1).

    Example:
      >>> import avb_jax
      >>> from avb_jax import networks
      >>> decoder, adversary = networks.MLPDecoder((3,), 1, (8,)), networks.ImageAdversary(networks.MLP((8,)))
      >>> prior = avb_jax.distributions.standard_normal(2)
      >>> method = with_ema(avb_jax.gan(decoder, adversary, prior=prior, optimizers=optax.adam(1e-3)), 0.99)
      >>> x = jnp.zeros((4, 3))
      >>> state, info = method.train_step(jax.random.key(1), method.init(jax.random.key(0), x), x)
      >>> jax.tree.structure(state.ema.params) == jax.tree.structure(state.params)
      True
    """
    if not 0 < decay < 1:
        raise UserError(f"decay={decay!r}: must be between 0 and 1; leave `with_ema` out for none")

    def init(key: Array, x: Array) -> State:
        return begun(method.init(key, x))

    def begun(state: State) -> State:
        return state._replace(ema=jax.tree.map(jnp.copy, Variables(state.params, state.collections)))

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple:
        rate = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        after, info = method.train_step(key, state._replace(ema=None), x, reduce)

        def move(new: Array, old: Array) -> Array:  # a count that a user's module carries is not averaged
            return optax.incremental_update(new, old, 1.0 - rate) if jnp.issubdtype(new.dtype, jnp.floating) else new

        ema = jax.tree.map(move, Variables(after.params, after.collections), state.ema)
        return after._replace(ema=ema), info

    def fresh_adversary(optimizer: optax.GradientTransformation, state: State) -> Method:
        return with_ema(method.fresh_adversary(optimizer, averaged(state)), decay)

    def of_averages(function: Callable | None, position: int) -> Callable | None:
        """The function with the averages in the State that is its argument at `position`."""
        if function is None:
            return None
        return lambda *arguments, **options: function(
            *arguments[:position], averaged(arguments[position]), *arguments[position + 1 :], **options
        )

    return method._replace(
        init=init,
        train_step=train_step,
        sample=of_averages(method.sample, 1),
        encode=of_averages(method.encode, 1),
        decode=of_averages(method.decode, 0),
        prior_of=of_averages(method.prior_of, 0),
        log_joint=of_averages(method.log_joint, 0),
        log_likelihood=of_averages(method.log_likelihood, 1),
        elbo=of_averages(method.elbo, 1),
        adversary=of_averages(method.adversary, 1),
        fresh_adversary=None if method.fresh_adversary is None else fresh_adversary,
    )


def averaged(state: State) -> State:
    """The State to evaluate: its averages as params and collections, where it has them."""
    if state.ema is None:
        return state
    return state._replace(params=state.ema.params, collections=state.ema.collections, ema=None)
