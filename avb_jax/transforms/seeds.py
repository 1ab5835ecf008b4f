"""Several runs side by side, from a seed each."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from avb_jax.method import Method
from avb_jax.types import Array, State, UserError


@functools.partial(jax.jit, static_argnums=1)
def of_seed(state: State, index: int) -> State:
    """The State of one of several seeds, without their axis."""
    return jax.tree.map(lambda a: a[index], state)


def over_seeds(method: Method, count: int) -> Method:
    """The method with a leading axis of seeds on every array of the State, over which all of it is mapped (`jax.vmap`).

    `init` takes one key, from which each seed's is folded; `train_step` takes keys [count] and x [count, B, ...]; what
    evaluates takes one key, folded likewise, and the same x or z for all seeds.

    Raises:
      UserError: a count below 1.

    Example:
      >>> import optax, avb_jax
      >>> from avb_jax import networks
      >>> decoder, adversary = networks.MLPDecoder((3,), 1, (8,)), networks.ImageAdversary(networks.MLP((8,)))
      >>> prior = avb_jax.distributions.standard_normal(2)
      >>> method = over_seeds(avb_jax.gan(decoder, adversary, prior=prior, optimizers=optax.adam(1e-3)), 5)
      >>> state = method.init(jax.random.key(0), jnp.zeros((4, 3)))
      >>> state.step.shape, method.sample(jax.random.key(1), state, 2).shape
      ((5,), (5, 2, 3))
    """
    if count < 1:
        raise UserError(f"count={count}: must be at least 1")

    def keys(key: Array) -> Array:
        return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(count))

    def init(key: Array, x: Array) -> State:
        return jax.vmap(lambda key: method.init(key, x))(keys(key))

    def train_step(key: Array, state: State, x: Array, *rest) -> tuple:
        return jax.vmap(lambda key, state, x: method.train_step(key, state, x, *rest))(key, state, x)

    def with_key(function: Callable | None) -> Callable | None:
        if function is None:
            return None
        return lambda key, state, *arguments, **options: jax.vmap(
            lambda key, state: function(key, state, *arguments, **options)
        )(keys(key), state)

    def without_key(function: Callable | None) -> Callable | None:
        if function is None:
            return None
        return lambda state, *arguments: jax.vmap(lambda state: function(state, *arguments))(state)

    return method._replace(
        init=init,
        train_step=train_step,
        sample=with_key(method.sample),
        encode=with_key(method.encode),
        decode=without_key(method.decode),
        prior_of=without_key(method.prior_of),
        log_joint=without_key(method.log_joint),
        log_likelihood=with_key(method.log_likelihood),
        elbo=with_key(method.elbo),
        adversary=with_key(method.adversary),
        fresh_adversary=None,
    )
