"""What evaluation reads of a State: the averages where there are any, of params and of statistics, and nothing else.

Every estimator runs on states in which single parts are not numbers: what it reads shows in the result.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import contrast, networks, players
from avb_jax.distributions import bernoulli, standard_normal
from avb_jax.evaluation import AIS, BDMC, ELBO, ImportanceSampling, Moments, Quadrature
from avb_jax.evaluation.moments import Draws
from avb_jax.evaluation.optimality import AdversaryEstimator
from avb_jax.network import as_network
from avb_jax.streams import stream
from avb_jax.types import Players
from tests.conftest import method_of, small_method, small_modules
from tests.methods.test_step import state_of

KEY = jax.random.key(1)
ANNEALING = {"chains": 2, "temperatures": 3, "leapfrog_steps": 2, "fit_draws": 4}
IMAGES = np.random.default_rng(0).random((2, 6, 6), np.float32)


def by(estimator):
    """What an estimator of an example reads."""
    return lambda method, state: estimator.over(method, KEY, state, IMAGES, jnp.arange(2), "none")


# name: (method, players whose variables it reads, (method, state) -> tree of numbers)
READERS = {
    "sample": ("avb", "decoder", lambda m, s: m.sample(KEY, s, 3)),
    "decode": ("avb", "decoder", lambda m, s: m.decode(s, jnp.ones((3, 3))).mean),
    "encode": ("avb", "encoder", lambda m, s: m.encode(KEY, s, IMAGES).z),
    "log_joint": ("avb", "decoder", lambda m, s: m.log_joint(s, IMAGES, jnp.ones((2, 3)))),
    "AVB's terms": ("avb", "encoder decoder adversary", lambda m, s: m.elbo(KEY, s, IMAGES)[:2]),
    "VAE's terms": ("vae", "encoder decoder", lambda m, s: m.elbo(KEY, s, IMAGES)[:2]),
    "elbo": ("avb", "encoder decoder adversary", by(ELBO(draws=2))),
    "importance": ("avb", "encoder decoder", by(ImportanceSampling(samples=32))),
    "ais": ("avb", "encoder decoder", lambda m, s: by(AIS(**ANNEALING))(m, s).log_likelihood),
    "bdmc": ("avb", "encoder decoder", lambda m, s: by(BDMC(**ANNEALING))(m, s)[:2]),
    "quadrature": ("avb", "decoder", lambda m, s: by(Quadrature(points=12))(m, s).log_likelihood),
    "moments": ("avb", "encoder", by(Moments(draws=3))),
    "draws": ("avb", "encoder", lambda m, s: by(Draws(draws=3))(m, s).z),
    "exact KL": ("vae", "encoder", lambda m, s: by(Draws(draws=3))(m, s).kl),
    "T's terms": ("avb", "encoder adversary", by(AdversaryEstimator(draws=2))),
}


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
    kind, read_players, read = READERS[name]
    options = {"prior": standard_normal(1)} if name == "quadrature" else {}
    modules = small_modules(kind, batch_norm=True)
    if name == "quadrature":
        modules = modules._replace(encoder=networks.BlackBoxEncoder(modules.encoder.trunk, 1))
    method = method_of(
        kind,
        modules,
        **{"prior": standard_normal(3), "noise_dim": 3, **options},
        likelihood=bernoulli,
        optimizers=optax.adam(1e-3),
        ema_decay=0.9,
        noise_draws=2,
    )
    state = state_of(method, jnp.asarray(IMAGES))
    read = jax.jit(functools.partial(read, method))

    averaged = read(state)
    assert is_finite(averaged)
    raw_is_broken = state._replace(params=broken(state.params), collections=broken(state.collections))
    jax.tree.map(np.testing.assert_array_equal, read(raw_is_broken), averaged)
    for part in ("params", "collections"):
        for player in Players._fields:
            held = getattr(state.ema, part)
            damaged = held._replace(**{player: broken(getattr(held, player))})
            result = read(state._replace(ema=state.ema._replace(**{part: damaged})))
            assert is_finite(result) == (player not in read_players.split()), (part, player)


def test_a_fresh_adversary_starts_on_the_averages():
    """Players as they are evaluated, T and its statistics as they are initialised; so are its own averages."""
    method = small_method("avb", batch_norm=True, ema_decay=0.9)
    state = state_of(method, jnp.asarray(IMAGES))
    start = method.fresh_adversary(optax.sgd(0.1), state).init(KEY, IMAGES)
    anew = method.init(KEY, IMAGES)
    for part in ("params", "collections"):
        expected = getattr(state.ema, part)._replace(adversary=getattr(anew, part).adversary)
        for found in (getattr(start, part), getattr(start.ema, part)):
            jax.tree.map(np.testing.assert_array_equal, found, expected)


CONTRASTS = {"none": contrast.PriorContrast(), "adaptive": contrast.GaussianContrast(moment_draws=3)}


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.slow
def test_a_fresh_adversary_s_step_is_eq_3_3_s(name):
    """T alone, at standardised z under contrast, with an encoder in evaluation mode; written out."""
    modules = small_modules("avb", batch_norm=True)
    method = small_method("avb", batch_norm=True, noise_draws=2, contrast=CONTRASTS[name])
    start = state_of(method, jnp.asarray(IMAGES))._replace(ema=None)
    fresh = method.fresh_adversary(optax.sgd(0.1), start)
    opt_state = Players(adversary=optax.sgd(0.1).init(start.params.adversary))
    state = start._replace(opt_state=opt_state)
    after, info = jax.jit(fresh.train_step)(KEY, state, IMAGES)
    noise_key, prior_key = jax.random.split(KEY)
    variables = {"params": state.params.encoder, **state.collections.encoder}

    def z_of(noise):
        return jnp.stack([modules.encoder.apply(variables, IMAGES, each, train=False) for each in noise])

    z, z_prior = z_of(jax.random.normal(noise_key, (2, 2, 3))), jax.random.normal(prior_key, (2, 2, 3))
    if name == "adaptive":
        fixed = z_of(jnp.repeat(jax.random.normal(jax.random.key(0), (3, 1, 3)), 2, axis=1))
        z = (z - fixed.mean(axis=0)) / fixed.std(axis=0, ddof=1)

    def loss(psi):
        pairs = jnp.concatenate([jnp.asarray(IMAGES)] * 4), jnp.concatenate([*z, *z_prior])
        variables = {"params": psi, **state.collections.adversary}
        t, stats = modules.adversary.apply(variables, *pairs, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.logaddexp(0, -t[:4]) + jnp.logaddexp(0, t[4:])), stats

    gradient, stats = jax.grad(loss, has_aux=True)(state.params.adversary)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params.adversary, gradient)
    jax.tree.map(close, after.params, state.params._replace(adversary=expected))
    jax.tree.map(close, after.collections, state.collections._replace(adversary=stats))
    assert int(after.step) == int(state.step) + 1
    close(jnp.mean(info.adversary_loss), loss(state.params.adversary)[0])


@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.slow
def test_what_t_says_of_an_example_is_what_its_losses_say(name):
    """T's terms under either contrast, on the same draws through the losses: each example's loss, accuracy and KL."""
    from avb_jax.methods import avb

    options = {"batch_norm": True, "encoder": networks.GaussianEncoder}
    method = small_method("avb", **options, contrast=CONTRASTS[name])
    nets = Players(*map(as_network, small_modules("avb", **options)))
    state, prior = state_of(method, jnp.asarray(IMAGES))._replace(ema=None), standard_normal(3)
    terms = AdversaryEstimator(draws=5).over(method, KEY, state, IMAGES, jnp.arange(2), "none")
    of = {"networks": nets, "prior": prior, "contrast": CONTRASTS[name], "train": False}
    for n, x in enumerate(jnp.asarray(IMAGES)):
        draws = players.draw(jax.random.fold_in(stream(KEY, "adversary"), n), x[None], prior, 3, 5)
        params, collections = state.params, state.collections
        _, of_players = avb.negative_elbo_adversarial(params, params.adversary, collections, draws, likelihood=bernoulli, **of)
        loss, (said, _) = avb.adversary_loss(params.adversary, collections, draws, of_players.compared, **of)
        found = terms.loss[n], terms.accuracy[n], terms.kl[n]
        np.testing.assert_allclose(found, (loss, said.accuracy[0], of_players.terms.kl[0]), rtol=1e-4, atol=1e-5)
