"""Each method's `train_step` against the one of `reference.py`, over a table of settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Players, networks
from avb_jax.methods import METHODS
from avb_jax.types import Variables
from tests import reference
from tests.conftest import small_model

T = 3
RATES = Players(0.03, 0.02, 0.05)  # each player's own, so that none can pass for another
ADAPTIVE = {"contrast": "adaptive", "noise_draws": 2}
MOMENTS = functools.partial(networks.MomentEncoder, bases=2, widths=(4,))  # noise: 3 + 2 * (3 + 1)
SHARED = functools.partial(networks.GaussianEncoder)
FLOW = functools.partial(networks.RealNVPEncoder, flows=2, widths=(4,))

# (method, model options); every setting that a step reads is away from its default somewhere.
CASES = {
    "avb": ("avb", {}),
    "avb: T first": ("avb", {"adversary_steps": 3, "noise_draws": 2, "beta": 0.7, "beta_warmup": 10}),
    "avb: batch norm": ("avb", {"batch_norm": True, "adversary_steps": 2, "noise_draws": 2}),
    "avb: estimated moments": ("avb", {**ADAPTIVE, "moment_draws": 3, "adversary_steps": 2}),
    "avb: estimated moments that flow": ("avb", {**ADAPTIVE, "moment_draws": 3, "moment_gradients": True}),
    "avb: given moments": ("avb", {**ADAPTIVE, "encoder": MOMENTS, "noise_dim": 11, "adversary_floor": 0.05}),
    "avb: given moments that flow": ("avb", {**ADAPTIVE, "encoder": MOMENTS, "noise_dim": 11, "moment_gradients": True}),
    "avb: contrast, batch norm": ("avb", {**ADAPTIVE, "batch_norm": True, "encoder": SHARED, "adversary_steps": 2}),
    **{f"avb: {name}": ("avb", {"divergence": name, "adversary_floor": 0.1}) for name in reference.DIVERGENCES},
    "vae": ("vae", {"beta": 0.7, "beta_warmup": 10, "noise_draws": 2}),
    "vae: batch norm": ("vae", {"batch_norm": True}),
    "vae: log q": ("vae", {"encoder": FLOW, "noise_draws": 2}),
    "aae: a T that could see x": ("aae", {"adversary_steps": 2, "noise_draws": 2, "batch_norm": True}),
    "bigan": ("bigan", {"adversary_steps": 2, "noise_draws": 2}),
    "bigan: hellinger, batch norm": ("bigan", {"divergence": "hellinger", "batch_norm": True}),
    "gan": ("gan", {"adversary_steps": 2, "divergence": "pearson"}),
    "gan: batch norm": ("gan", {"batch_norm": True}),
    "vaegan": ("vaegan", {"adversary_steps": 2, "beta": 0.7, "feature_weight": 0.3}),
    "vaegan: batch norm": ("vaegan", {"batch_norm": True, "divergence": "reverse_kl"}),
}


def scattered(tree, seed, scale):
    """The tree with noise on every array, so that no two of a state's trees are alike and no network is at its start."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def positive(stats):
    """Statistics away from their start, variances above 0."""
    return jax.tree.map(lambda a: 0.1 + jnp.abs(a), scattered(stats, 1, 0.3))


def state_of(method, model, images):
    """A state at step T whose params, statistics and averages all differ."""
    state = METHODS[method].init(jax.random.key(0), model, Players(*map(optax.sgd, RATES)), images)
    params = scattered(state.params, 2, 0.3)
    average = Variables(scattered(params, 3, 0.3), positive(state.batch_stats))
    return state._replace(
        step=jnp.array(T), params=params, batch_stats=positive(positive(state.batch_stats)), average=average
    )


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_reference_s(case, images):
    """All of the new state, and all that is observed."""
    method, options = CASES[case]
    model = small_model(method, ema_decay=0.9, **options)
    optimizers = Players(*map(optax.sgd, RATES))

    @jax.jit
    def both(key, state, images):
        return (
            METHODS[method].train_step(key, state, images, model=model, optimizers=optimizers),
            reference.step(method, key, state, T, images, model, RATES),
        )

    state = state_of(method, model, images)
    (after, info), (params, stats, average, observed) = both(jax.random.key(5), state, images)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    assert int(after.step) == T + 1
    jax.tree.map(close, after.params, params)
    jax.tree.map(close, after.batch_stats, stats)
    jax.tree.map(close, tuple(after.average), average)
    found = {name: value for name, value in info._asdict().items() if value is not None}
    assert found.keys() == observed.keys()
    for name, value in found.items():
        close(value, observed[name], err_msg=name)
