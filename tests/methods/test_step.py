"""Each method's `train_step` against the one of `reference.py`, over a table of settings."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Players, contrast, distributions, divergences, networks
from avb_jax.types import Variables
from tests import reference
from tests.conftest import METHODS, method_of, small_modules
from tests.reference import Settings

T = 3
EMA_DECAY = 0.9
RATES = Players(0.03, 0.02, 0.05)  # each player's own, so that none can pass for another
ADAPTIVE = {"adaptive": True, "noise_draws": 2}
MOMENTS = functools.partial(networks.MomentEncoder, bases=2, widths=(4,))  # noise: 3 + 2 * (3 + 1)
FLOW = functools.partial(networks.RealNVPEncoder, flows=2, widths=(4,))
PRIOR = (0.4, 1.7)

# (method, options of the modules, settings); every setting that a step reads is away from its default somewhere.
CASES = {
    "avb: T first": ("avb", {}, {"adversary_steps": 3, "noise_draws": 2, "beta": 0.7, "beta_warmup": 10}),
    "avb: batch norm": ("avb", {"batch_norm": True}, {"adversary_steps": 2, "noise_draws": 2}),
    "avb: another prior": ("avb", {}, {"prior": PRIOR, "minus_log_prior": True}),
    "avb: estimated moments": ("avb", {}, {**ADAPTIVE, "moment_draws": 3, "adversary_steps": 2, "prior": PRIOR}),
    "avb: estimated moments that flow": ("avb", {}, {**ADAPTIVE, "moment_draws": 3, "moment_gradients": True}),
    "avb: given moments": ("avb", {"encoder": MOMENTS}, {**ADAPTIVE, "noise_dim": 11, "adversary_floor": 0.05}),
    "avb: given moments that flow": (
        "avb",
        {"encoder": MOMENTS},
        {**ADAPTIVE, "noise_dim": 11, "moment_gradients": True, "minus_log_prior": True, "prior": PRIOR},
    ),
    "avb: contrast, batch norm": (
        "avb",
        {"encoder": networks.GaussianEncoder, "batch_norm": True},
        {**ADAPTIVE, "adversary_steps": 2},
    ),
    "avb: hellinger": ("avb", {}, {"divergence": "hellinger", "adversary_floor": 0.1}),
    "vae": ("vae", {}, {"beta": 0.7, "beta_warmup": 10, "noise_draws": 2}),
    "vae: batch norm, another prior": ("vae", {"batch_norm": True}, {"prior": PRIOR}),
    "vae: log q": ("vae", {"encoder": FLOW}, {"noise_draws": 2, "prior": PRIOR}),
    "aae: a T that could see x": ("aae", {"batch_norm": True}, {"adversary_steps": 2, "noise_draws": 2}),
    "aae: settings": ("aae", {}, {"beta": 0.7, "beta_warmup": 10, "adversary_floor": 0.1, "divergence": "kl", "prior": PRIOR}),
    "avb: slope": ("avb", {}, {"gradient_penalty": 0.7, "noise_draws": 2}),
    "bigan": ("bigan", {}, {"adversary_steps": 2, "gradient_penalty": 0.7, "prior": PRIOR}),
    "bigan: hellinger, batch norm": (
        "bigan",
        {"batch_norm": True},
        {"divergence": "hellinger", "generator_divergence": "reverse_kl"},
    ),
    "gan": (
        "gan",
        {},
        {"adversary_steps": 2, "divergence": "pearson", "generator_divergence": "kl", "gradient_penalty": 0.7, "prior": PRIOR},
    ),
    "gan: batch norm": ("gan", {"batch_norm": True}, {}),
    "vaegan": ("vaegan", {}, {"adversary_steps": 2, "beta": 0.7, "beta_warmup": 10, "feature_weight": 0.3, "prior": PRIOR}),
    "vaegan: batch norm": (
        "vaegan",
        {"batch_norm": True},
        {"divergence": "reverse_kl", "generator_divergence": "kl", "gradient_penalty": 0.7},
    ),
}


def of_settings(name, modules, settings):
    """The method that a step's reference is of, from the settings that its constructor has."""
    mean, std = settings.prior
    given = settings._replace(divergence=getattr(divergences, settings.divergence))._asdict()
    given["generator_divergence"] = divergences.GENERATOR_DIVERGENCES[settings.generator_divergence]
    given["prior"] = distributions.normal(jnp.full(3, mean), jnp.full(3, std))
    if settings.adaptive:
        given["contrast"] = contrast.GaussianContrast(settings.moment_draws, settings.moment_gradients)
    if name in ("avb", "vae", "aae"):
        given["likelihood"] = distributions.bernoulli
    accepted = {*inspect.signature(METHODS[name]).parameters, "noise_dim"}
    given = {field: value for field, value in given.items() if field in accepted}
    return method_of(name, modules, optimizers=Players(*map(optax.sgd, RATES)), ema_decay=EMA_DECAY, **given)


def scattered(tree, seed, scale):
    """The tree with noise on every array, so that no two of a state's trees are alike and no network is at its start."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noisy)


def positive(stats):
    """Statistics away from their start, variances above 0."""
    return jax.tree.map(lambda a: 0.1 + jnp.abs(a), scattered(stats, 1, 0.3))


def state_of(method, images):
    """A state at step T whose params, statistics and averages all differ."""
    state = method.init(jax.random.key(0), images)
    params = scattered(state.params, 2, 0.3)
    ema = Variables(scattered(params, 3, 0.3), positive(state.collections))
    return state._replace(step=jnp.array(T), params=params, collections=positive(positive(state.collections)), ema=ema)


QUICK = (
    "avb: T first",
    "avb: given moments that flow",
    "avb: hellinger",
    "vae",
    "aae: settings",
    "bigan",
    "gan",
    "vaegan: batch norm",
)


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_a_step_is_the_reference_s(case, images):
    """All of the new state, and all that is observed."""
    name, options, given = CASES[case]
    modules, settings = small_modules(name, **options), Settings(**given)
    method = of_settings(name, modules, settings)

    @jax.jit
    def both(key, state, images):
        return (
            method.train_step(key, state, images),
            reference.step(name, key, state, T, images, modules, settings, RATES, EMA_DECAY),
        )

    (after, info), (params, stats, ema, observed) = both(jax.random.key(5), state_of(method, images), images)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    assert int(after.step) == T + 1
    jax.tree.map(close, after.params, params)
    jax.tree.map(close, after.collections, stats)
    jax.tree.map(close, tuple(after.ema), ema)
    found = {name: value for name, value in info._asdict().items() if value is not None}
    assert found.keys() == observed.keys()
    for name, value in found.items():
        close(value, observed[name], err_msg=name)
