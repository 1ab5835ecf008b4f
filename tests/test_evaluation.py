"""Estimators against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Players, UserError, fit
from avb_jax.data import from_arrays
from avb_jax.distributions import normal_log_prob
from avb_jax.evaluation import importance, moments, optimality
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.methods import METHODS, avb
from avb_jax.types import Variables
from tests import gaussian, ppca
from tests.conftest import small_model


def test_moments_and_active_units():
    """Estimated moments, cleared of their sampling error, against those that an encoder tells; one latent is idle."""
    x = np.random.default_rng(0).standard_normal((3000, 2)).astype(np.float32)
    model = gaussian.model()
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), jnp.zeros((2, 2)))
    encoder = {**state.params.encoder, "m": jnp.array([0.8, 0.0])}
    state = state._replace(params=state.params._replace(encoder=encoder))
    estimated = moments.posterior_moments(jax.random.key(1), state, x, model=model, draws=16)
    variance = np.exp(-1.0)
    np.testing.assert_allclose(estimated.variance.mean(axis=0), variance, rtol=0.05)
    np.testing.assert_allclose(estimated.mean_error.mean(axis=0), variance / 16, rtol=0.05)
    activity = moments.activity(estimated)
    np.testing.assert_allclose(activity, [0.64, 0.0], atol=0.06)
    assert list(activity > moments.ACTIVE) == [True, False]
    assert np.var(np.asarray(estimated.mean), axis=0)[1] > 2 * moments.ACTIVE  # which the raw means would call active

    case = ppca.Case(2)
    told = moments.posterior_moments(jax.random.key(1), case.state, case.x, model=case.model, draws=2)
    np.testing.assert_allclose(told.variance, np.broadcast_to(case.posterior_std**2, (20, 2)), rtol=1e-5)
    assert not np.any(told.mean_error)


def test_a_fresh_adversary_finds_what_is_missing(sgd):
    """T is off by a constant of 1; the fresh one starts at the optimum and stays about there, on players that do not move."""
    model = gaussian.model(ema_decay=0.5)
    x = np.random.default_rng(0).random((500, 2), np.float32)
    state = avb.init(jax.random.key(0), model, sgd, jnp.asarray(x))
    encoder = {**state.params.encoder, "c": jnp.full(2, -0.3)}
    adversary = {**state.params.adversary, "offset": jnp.ones(())}
    trained = state.params._replace(encoder=encoder, adversary=adversary)
    state = state._replace(params=trained, average=Variables(trained, state.batch_stats), step=jnp.array(7))

    start = optimality.restart_adversary(jax.random.key(1), state, model, sgd, jnp.asarray(x))
    assert int(start.step) == 0
    optimizers = Players(*[optax.sgd(1e-3)] * 3)
    states = fit(
        optimality, model, optimizers, from_arrays(x), steps=20, batch_size=50, log_every=10, mode="jit", quiet=True,
        state=jax.tree.map(lambda a: a[None], start),
    )  # fmt: skip
    fresh = jax.tree.map(lambda a: a[0], states)
    assert int(fresh.step) == 20
    for player in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, getattr(fresh.params, player), getattr(trained, player))
    assert float(fresh.params.adversary["offset"]) != 0

    own, others = (optimality.adversary_terms(jax.random.key(2), s, x, model=model, draws=200) for s in (state, fresh))
    np.testing.assert_allclose(own.kl - others.kl, 1, atol=0.1)
    gap = np.asarray(own.loss - others.loss)
    # E softplus(-T - 1) + softplus(T + 1) against the same without the 1, over q and p, by quadrature on T's two laws.
    z = x[:, None] * 0.8 - 0.3 + np.exp(-0.5) * np.random.default_rng(1).standard_normal((500, 2000, 2))
    prior = np.random.default_rng(2).standard_normal((500, 2000, 2))
    t = lambda z: np.sum(0.5 * z**2 - 0.5 * ((z - 0.8 * x[:, None] + 0.3) / np.exp(-0.5)) ** 2 + 0.5, axis=-1)  # noqa: E731
    loss = lambda by: np.mean(np.logaddexp(0, -t(z) - by)) + np.mean(np.logaddexp(0, t(prior) + by))  # noqa: E731
    assert abs(gap.mean() - (loss(1) - loss(0))) < 4 * gap.std() / np.sqrt(500) + 2e-3
    with pytest.raises(UserError, match=r"networks\.adversary=None"):
        optimality.restart_adversary(jax.random.key(1), state, ppca.Case(2).model, sgd, jnp.asarray(x))


def test_importance_sampling_of_a_linear_gaussian_model():
    """p(x) = N(0, w^2 + sigma^2) in each dimension, although the encoder is not the posterior."""
    model = gaussian.model()
    x = jax.random.normal(jax.random.key(0), (50, 2))
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), x)
    arguments = {"model": model, "inflation": 1.5}
    estimate = importance.log_likelihood(jax.random.key(1), state, x, **arguments, samples=20_000)
    variance = state.params.decoder["w"] ** 2 + gaussian.SIGMA**2
    expected = jnp.sum(normal_log_prob(x, 0.0, 0.5 * jnp.log(variance)), axis=-1)
    errors = 1 / np.sqrt(np.asarray(estimate.effective_sample_size))  # of the log-mean weight, to first order
    np.testing.assert_array_less(jnp.abs(estimate.log_likelihood - expected), 5 * errors)
    few = importance.log_likelihood(jax.random.key(2), state, x, **arguments, samples=4)
    assert few.log_likelihood.mean() < estimate.log_likelihood.mean()  # a lower bound that rises with the samples
    again = importance.log_likelihood(jax.random.key(1), state, x, **arguments, samples=20_000, chunk=7)
    np.testing.assert_allclose(again.log_likelihood, estimate.log_likelihood, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name, functions in METHODS.items() if hasattr(functions, "elbo_terms")])
def test_elbo_does_not_depend_on_the_chunk(method, images, sgd):
    model = small_model(method, batch_norm=True)
    state = METHODS[method].init(jax.random.key(0), model, sgd, images)
    arguments = {"method": METHODS[method], "model": model, "binarize": "dynamic", "draws": 2}
    one, two = (elbo_terms(jax.random.key(1), state, images, **arguments, chunk=chunk) for chunk in (3, 8))
    np.testing.assert_allclose(one.elbo, two.elbo, rtol=1e-5)


def test_elbo_with_the_exact_log_ratio_is_the_analytic_one():
    """The estimator over many draws, on the game with a closed form, through AVB's own terms."""
    model = gaussian.model()
    x = np.array([[0.5, 0.9], [0.1, 0.2]], np.float32)
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), jnp.asarray(x))
    terms = elbo_terms(jax.random.key(1), state, np.repeat(x, 1000, 0), method=avb, model=model, draws=50)
    expected = -gaussian.analytic_negative_elbo(state.params.encoder, state.params.decoder, jnp.asarray(x))
    error = terms.elbo.std() / np.sqrt(len(terms.elbo))
    assert abs(terms.elbo.mean() - expected) < 4 * error
    for same_x in (slice(1000), slice(1000, 2000)):  # which differ by the draws alone; their own errors say by how much
        own = np.sqrt(np.mean(np.square(terms.standard_error[same_x])))
        np.testing.assert_allclose(own, terms.elbo[same_x].std(), rtol=0.1)
