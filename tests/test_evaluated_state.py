"""What evaluation reads of a State: the averages where there are any, of params and of statistics, and nothing else.

Every estimator runs on states in which single parts are not numbers: what it reads shows in the result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Players, StandardNormal, networks, objectives
from avb_jax.evaluation import ais, bdmc, elbo, importance, moments, optimality, quadrature
from avb_jax.methods import METHODS
from avb_jax.players import Model, draw, evaluation_variables, log_joint, mean_images
from avb_jax.streams import stream
from tests.conftest import small_model
from tests.test_step import state_of

KEY = jax.random.key(1)
ANNEALING = {"chains": 2, "temperatures": 3, "leapfrog_steps": 2, "fit_draws": 4}
IMAGES = np.random.default_rng(0).random((2, 6, 6), np.float32)


def in_one_dimension(model: Model) -> Model:
    """The model with one latent, for the estimator that goes over a grid."""
    return dataclasses.replace(model, prior=StandardNormal(1))


# name: (method, players whose variables it reads, (method, state, model) -> tree of numbers)
READERS = {
    "sample": ("avb", "decoder", lambda m, s, o: METHODS[m].sample(KEY, s, o, 3)),
    "mean_images": ("avb", "decoder", lambda m, s, o: mean_images(s, o, jnp.ones((3, 3)))),
    "sample_posterior": ("avb", "encoder", lambda m, s, o: METHODS[m].sample_posterior(KEY, s, o, IMAGES)),
    "reconstruct": ("avb", "encoder decoder", lambda m, s, o: METHODS[m].reconstruct(KEY, s, o, IMAGES)),
    "log_joint": ("avb", "decoder", lambda m, s, o: log_joint(s, o)(IMAGES[0], jnp.ones((3, 3)))),
    "AVB's terms": ("avb", "encoder decoder adversary", lambda m, s, o: METHODS[m].elbo_terms(KEY, s, IMAGES, model=o)[:2]),
    "VAE's terms": ("vae", "encoder decoder", lambda m, s, o: METHODS[m].elbo_terms(KEY, s, IMAGES, model=o)[:2]),
    "elbo": (
        "avb", "encoder decoder adversary",
        lambda m, s, o: elbo.elbo_terms(KEY, s, IMAGES, method=METHODS[m], model=o, draws=2),
    ),
    "importance": ("avb", "encoder decoder", lambda m, s, o: importance.log_likelihood(KEY, s, IMAGES, model=o, samples=4)),
    "ais": ("avb", "encoder decoder", lambda m, s, o: ais.log_likelihood(KEY, s, IMAGES, model=o, **ANNEALING).log_likelihood),
    "bdmc": ("avb", "encoder decoder", lambda m, s, o: bdmc.sandwich(KEY, s, jnp.arange(2), model=o, **ANNEALING)[:2]),
    "quadrature": ("avb", "decoder", lambda m, s, o: quadrature.log_likelihood(KEY, s, IMAGES, model=o, points=12)[0]),
    "moments": ("avb", "encoder", lambda m, s, o: moments.posterior_moments(KEY, s, IMAGES, model=o, draws=3)),
    "draws": ("avb", "encoder", lambda m, s, o: moments.posterior_draws(KEY, s, IMAGES, model=o, draws=3).z),
    "exact KL": ("vae", "encoder", lambda m, s, o: moments.posterior_draws(KEY, s, IMAGES, model=o, draws=3).kl),
    "T's terms": ("avb", "encoder adversary", lambda m, s, o: optimality.adversary_terms(KEY, s, IMAGES, model=o, draws=2)),
}  # fmt: skip


def broken(part):
    """The tree with no number in it."""
    return jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), part)


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", READERS)
def test_estimators_read_the_averages_in_evaluation_mode(name):
    """Raw params and statistics have no part; of the averages, those of the players that the estimator is about have.

    A network in training mode would not read its averaged statistics, and what reads them depends on no other example.
    """
    method, players, read = READERS[name]
    model = small_model(method, batch_norm=True, ema_decay=0.9, noise_draws=2)
    if name == "quadrature":
        model = in_one_dimension(model)
    state = state_of(method, model, jnp.asarray(IMAGES))
    read = jax.jit(functools.partial(read, method, o=model))

    averaged = read(s=state)
    assert is_finite(averaged)
    raw_is_broken = state._replace(params=broken(state.params), batch_stats=broken(state.batch_stats))
    jax.tree.map(np.testing.assert_array_equal, read(s=raw_is_broken), averaged)
    for part in ("params", "batch_stats"):
        for player in Players._fields:
            held = getattr(state.average, part)
            damaged = held._replace(**{player: broken(getattr(held, player))})
            result = read(s=state._replace(average=state.average._replace(**{part: damaged})))
            assert is_finite(result) == (player not in players.split()), (part, player)


def test_without_averages_evaluation_reads_the_raw_ones(images):
    model = small_model("avb", batch_norm=True, ema_decay=0.9)
    state = state_of("avb", model, images)
    assert evaluation_variables(state) is state.average
    assert evaluation_variables(state._replace(average=None)) == (state.params, state.batch_stats)


def test_a_fresh_adversary_starts_on_the_averages():
    """Players as they are evaluated, T and its statistics as they are initialised."""
    model = small_model("avb", batch_norm=True, ema_decay=0.9)
    optimizers = Players(*[optax.sgd(0.1)] * 3)
    state = state_of("avb", model, jnp.asarray(IMAGES))
    start = optimality.restart_adversary(KEY, state, model, optimizers, IMAGES)
    fresh = METHODS["avb"].init(KEY, model, optimizers, IMAGES)
    for part in ("params", "batch_stats"):
        expected = getattr(state.average, part)._replace(adversary=getattr(fresh, part).adversary)
        for found in (getattr(start, part), getattr(start.average, part)):
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("contrast", ["none", "adaptive"])
def test_a_fresh_adversary_s_step_is_eq_3_3_s(contrast):
    """T alone, at standardised z under contrast, with an encoder in evaluation mode; written out."""
    model = small_model("avb", batch_norm=True, ema_decay=0.9, noise_draws=2, contrast=contrast, moment_draws=3)
    optimizers = Players(*[optax.sgd(0.1)] * 3)
    state = state_of("avb", model, jnp.asarray(IMAGES))
    after, info = optimality.train_step(KEY, state, IMAGES, model=model, optimizers=optimizers)
    noise_key, prior_key = jax.random.split(KEY)
    variables = {"params": state.params.encoder, **state.batch_stats.encoder}

    def z_of(noise):
        return jnp.stack([model.networks.encoder.apply(variables, IMAGES, each, train=False) for each in noise])

    z, z_prior = z_of(jax.random.normal(noise_key, (2, 2, 3))), jax.random.normal(prior_key, (2, 2, 3))
    if contrast == "adaptive":
        fixed = z_of(jnp.repeat(jax.random.normal(jax.random.key(0), (3, 1, 3)), 2, axis=1))
        z = (z - fixed.mean(axis=0)) / fixed.std(axis=0, ddof=1)

    def loss(psi):
        pairs = jnp.concatenate([jnp.asarray(IMAGES)] * 4), jnp.concatenate([*z, *z_prior])
        variables = {"params": psi, **state.batch_stats.adversary}
        t, stats = model.networks.adversary.apply(variables, *pairs, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.logaddexp(0, -t[:4]) + jnp.logaddexp(0, t[4:])), stats

    gradient, stats = jax.grad(loss, has_aux=True)(state.params.adversary)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params.adversary, gradient)
    jax.tree.map(close, after.params, state.params._replace(adversary=expected))
    jax.tree.map(close, after.batch_stats, state.batch_stats._replace(adversary=stats))
    close(jnp.mean(info.adversary_loss), loss(state.params.adversary)[0])


@pytest.mark.parametrize("contrast", ["none", "adaptive"])
def test_what_t_says_of_an_example_is_what_its_losses_say(contrast):
    """T's terms under either contrast, on the same draws through the objectives: each example's loss, accuracy and KL."""
    model = small_model("avb", batch_norm=True, ema_decay=0.9, contrast=contrast, encoder=networks.GaussianEncoder)
    state = state_of("avb", model, jnp.asarray(IMAGES))
    terms = optimality.adversary_terms(KEY, state, IMAGES, model=model, draws=5)
    params, stats = state.average
    several = dataclasses.replace(model, noise_draws=5)
    for n, x in enumerate(jnp.asarray(IMAGES)):
        sampled = draw(jax.random.fold_in(stream(KEY, "adversary"), n), several, x[None])
        _, (elbo_terms, seen, _) = objectives.negative_elbo_adversarial(
            params, params.adversary, stats, sampled, model=several, train=False
        )
        loss, (said, _) = objectives.adversary_loss(params.adversary, stats, sampled, seen, model=several, train=False)
        found = terms.loss[n], terms.accuracy[n], terms.kl[n]
        np.testing.assert_allclose(found, (loss, said.accuracy[0], elbo_terms.kl[0]), rtol=1e-4, atol=1e-5)
