"""Runs side by side: each is the run that it would be alone."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from avb_jax import UserError
from avb_jax.transforms import over_seeds
from tests.conftest import small_method
from tests.methods.test_contract import evaluations

SEEDS = 2


def of_seed(method, seed):
    """The method with every key that evaluates folded by the seed's number."""

    def folding(function):
        return function and (lambda key, *inputs: function(jax.random.fold_in(key, seed), *inputs))

    return method._replace(**{field: folding(getattr(method, field)) for field in ("sample", "encode", "elbo", "adversary")})


def evaluate(method, state, images):
    """All that it can do apart from training."""
    return {field: result() for field, (_, result) in evaluations(method, state, images).items()}


@pytest.mark.parametrize("name", ["avb", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vae", "gan"))])
@pytest.mark.slow
def test_every_seed_is_the_run_that_it_would_be_alone(name, images):
    """In a step on a batch of its own, and in all that evaluates, on the same batch."""
    settings = {} if name == "vae" else {"adversary_steps": 2}
    method = small_method(name, batch_norm=True, ema_decay=0.9, optimizers=optax.sgd(0.3), **settings)
    several, key = over_seeds(method, SEEDS), jax.random.key(0)
    assert several.name == method.name
    assert several.fresh_adversary is None
    x = jnp.stack([images, 1 - images])
    states = jax.jit(several.init)(key, images)
    assert states.step.shape == (SEEDS,)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    after, info = jax.jit(several.train_step)(keys, states, x)
    found, step = jax.jit(lambda state: evaluate(several, state, images))(after), jax.jit(method.train_step)
    alone_of = jax.jit(lambda seed, state: evaluate(of_seed(method, seed), state, images))
    for seed in range(SEEDS):
        start, after_, info_, found_ = jax.tree.map(lambda a, seed=seed: a[seed], (states, after, info, found))
        alone = method.init(jax.random.fold_in(key, seed), images)
        chex.assert_trees_all_close(start, alone, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close((after_, info_), step(keys[seed], alone, x[seed]), rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(found_, alone_of(seed, after_), rtol=1e-4, atol=1e-5)


def test_no_seeds_are_refused():
    with pytest.raises(UserError, match="count=0: must be at least 1"):
        over_seeds(small_method("vae"), 0)
