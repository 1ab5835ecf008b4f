"""Moving averages: how they follow, that training does not feel them, and that all that evaluates reads them alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import UserError
from avb_jax.transforms import with_ema
from avb_jax.transforms.ema import averaged
from avb_jax.types import Variables
from tests.conftest import small_method
from tests.methods.test_contract import evaluations

KEY = jax.random.key(3)


def broken(tree):
    """The tree with no number in it."""
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), tree)


def test_averages_follow_by_hand(images):
    # Step t (from 0) has decay min(0.15, (1 + t) / (10 + t)): 0.1, then 0.15.
    method = small_method("avb", batch_norm=True, ema_decay=0.15, optimizers=optax.sgd(1.0))
    state, step = method.init(jax.random.key(0), images), jax.jit(method.train_step)
    expected = state.params, state.collections
    chex.assert_trees_all_equal(tuple(state.ema), expected)
    for t, decay in enumerate((0.1, 0.15)):
        state, _ = step(jax.random.key(t), state, images)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, (state.params, state.collections))
    chex.assert_trees_all_close(tuple(state.ema), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["avb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vae", "gan"))])
def test_training_is_not_changed_and_evaluation_reads_averages_alone(name, images):
    """Whatever the method can do: it is what the plain method does of a State that has the averages for its own."""
    plain = small_method(name, batch_norm=True, optimizers=optax.sgd(0.3))
    method = with_ema(plain, 0.9)
    both = [one.init(jax.random.key(0), images) for one in (plain, method)]
    for i in range(2):
        both = [
            jax.jit(one.train_step)(jax.random.key(i), state, images)[0]
            for one, state in zip((plain, method), both, strict=True)
        ]
    without, state = both
    chex.assert_trees_all_close(state._replace(ema=None), without, rtol=1e-6)
    of_averages = without._replace(params=state.ema.params, collections=state.ema.collections)
    raw_is_broken = state._replace(params=broken(state.params), collections=broken(state.collections))

    @jax.jit
    def evaluate(state, of_averages):
        one, other = evaluations(method, state, images), evaluations(plain, of_averages, images)
        assert one.keys() == other.keys()
        return [{field: result() for field, (_, result) in of.items()} for of in (one, other)]

    found, expected = evaluate(raw_is_broken, of_averages)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(found)


def test_a_fresh_adversary_starts_on_the_averages(images):
    """Players as they are evaluated, T as it is initialised, with averages of its own that its training moves."""
    method = small_method("avb", batch_norm=True, ema_decay=0.9)
    state, anew = (method.init(jax.random.key(k), images) for k in (0, 1))
    state, _ = jax.jit(method.train_step)(KEY, state, images)
    state = state._replace(params=broken(state.params), collections=broken(state.collections))
    fresh = method.fresh_adversary(optax.sgd(1.0), state)
    start = fresh.init(jax.random.key(1), images)
    expected = Variables(
        *(getattr(state.ema, part)._replace(adversary=getattr(anew, part).adversary) for part in ("params", "collections"))
    )
    chex.assert_trees_all_equal((start.params, start.collections), tuple(expected))
    chex.assert_trees_all_equal(start.ema, expected)
    after, _ = jax.jit(fresh.train_step)(KEY, start, images)
    chex.assert_trees_all_close(after.ema.params[:2], expected.params[:2], rtol=1e-5, atol=1e-6)
    rate = 1.0 - 0.1  # by the decay of the first step
    moved = jax.tree.map(lambda new, old: old + rate * (new - old), after.params.adversary, start.params.adversary)
    chex.assert_trees_all_close(after.ema.params.adversary, moved, rtol=1e-5, atol=1e-6)


def test_whole_numbers_are_not_averaged(images):
    """A count that a user's network keeps is the last one's."""
    plain = small_method("vae", optimizers=optax.sgd(0.1))

    def init(key, x):
        state = plain.init(key, x)
        return state._replace(collections=state.collections._replace(encoder={"seen": {"count": jnp.array(3)}}))

    def train_step(key, state, x, reduce=None):
        count = state.collections.encoder["seen"]["count"] + 5
        return state._replace(collections=state.collections._replace(encoder={"seen": {"count": count}})), None

    method = with_ema(plain._replace(init=init, train_step=train_step), 0.9)
    state, _ = method.train_step(KEY, method.init(KEY, images), images)
    assert int(state.ema.collections.encoder["seen"]["count"]) == 8
    assert state.ema.collections.encoder["seen"]["count"].dtype == jnp.int32


def test_a_state_without_averages_is_evaluated_as_it_is(images):
    method = small_method("vae", ema_decay=0.9)
    state = method.init(jax.random.key(0), images)._replace(ema=None)
    assert averaged(state) is state
    np.testing.assert_array_equal(method.sample(KEY, state, 2), small_method("vae").sample(KEY, state, 2))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_out_of_range_is_named(decay):
    with pytest.raises(UserError, match=f"decay={decay}: must be between 0 and 1"):
        small_method("avb", ema_decay=decay)
