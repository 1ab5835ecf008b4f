"""Estimators against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Diverged, Players, StandardNormal, UserError, fit
from avb_jax.data import from_arrays
from avb_jax.distributions import normal_log_prob
from avb_jax.evaluation import importance, knn, moments, optimality, quadrature
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.methods import METHODS, avb
from tests import gaussian, ppca
from tests.conftest import small_model


def test_knn_agrees_with_quadrature_on_a_mixture():
    """As on the VAE's aggregated posterior in Table 1: two estimators that share nothing."""
    rng = np.random.default_rng(3)
    mean, std = np.array([[1.0, 0.5], [-1.0, 0.5], [0.5, -1.0], [-0.5, -1.0]]), np.full((4, 2), 0.6)
    exact = float(quadrature.mixture_kl(jnp.asarray(mean), jnp.asarray(std), StandardNormal(2)))
    estimates = []
    for _ in range(6):
        draws = (mean[:, None] + std[:, None] * rng.standard_normal((4, 2500, 2))).reshape(-1, 2)
        estimates.append(knn.kl_divergence(draws, rng.standard_normal((10_000, 2))))
    assert abs(np.mean(estimates) - exact) < 0.01 + 4 * np.std(estimates, ddof=1) / np.sqrt(6)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_quadrature_of_a_linear_gaussian_model(dim):
    """p(x|z) = N(w z, s^2) gives p(x) = N(0, w^2 + s^2), in each dimension."""
    w, s = 0.9, 0.5
    x = jax.random.normal(jax.random.key(0), (5, dim))
    log_prob = lambda z: jnp.sum(normal_log_prob(x, w * z[:, None], np.log(s)), axis=-1)  # noqa: E731
    expected = jnp.sum(normal_log_prob(x, 0.0, 0.5 * np.log(w**2 + s**2)), axis=-1)
    value, share = quadrature.log_integral(log_prob, StandardNormal(dim))
    np.testing.assert_allclose(value, expected, atol=1e-4)
    # A cell's share at the posterior's peak: its volume times the Gaussian density there.
    std, spacing = w * s / np.hypot(w, s) / w, 12.0 / quadrature.POINTS[dim]
    assert np.all(share <= 1.001 * (spacing / (std * np.sqrt(2 * np.pi))) ** dim)
    assert np.all(share > 0.8 * (spacing / (std * np.sqrt(2 * np.pi))) ** dim)


def test_quadrature_does_not_depend_on_the_chunk():
    x = jnp.ones((3, 2))
    log_prob = lambda z: jnp.sum(normal_log_prob(x, z[:, None]), axis=-1)  # noqa: E731
    one, two = (quadrature.log_integral(log_prob, StandardNormal(2), points=60, chunk=c) for c in (100, 3600))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_quadrature_refuses_many_latents():
    with pytest.raises(UserError, match="latent_dim=4: quadrature serves 1 to 3"):
        quadrature.log_integral(lambda z: z, StandardNormal(4))


def test_mixture_kl_of_one_gaussian_is_the_closed_form():
    mean, std = jnp.array([[0.5, -1.0]]), jnp.array([[0.4, 1.2]])
    expected = 0.5 * np.sum(np.square([0.5, -1.0]) + np.square([0.4, 1.2]) - 1 - 2 * np.log([0.4, 1.2]))
    np.testing.assert_allclose(quadrature.mixture_kl(mean, std, StandardNormal(2)), expected, rtol=1e-3)


def test_mixture_kl_of_far_components_by_hand():
    # Components that do not overlap: KL = mean of the components' KLs - log n.
    mean, std = jnp.array([[-3.0, 0.0], [3.0, 0.0]]), jnp.full((2, 2), 0.3)
    each = 0.5 * (9 + 2 * (0.09 - 1 - 2 * np.log(0.3)))
    np.testing.assert_allclose(quadrature.mixture_kl(mean, std, StandardNormal(2)), each - np.log(2), rtol=1e-3)


def knn_errors(dim, count, repetitions=8, estimate=knn.kl_divergence):
    """Estimate minus closed form of KL(N(0.3, 0.8^2), N(0, 1)) in every dimension, over repetitions."""
    mean, std, rng = 0.3, 0.8, np.random.default_rng(0)
    expected = dim * 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))
    return np.array([
        estimate(mean + std * rng.standard_normal((count, dim)), rng.standard_normal((count, dim))) - expected
        for _ in range(repetitions)
    ])  # fmt: skip


def via_gaussian(a, b):
    del b  # which it needs no draws for
    return knn.kl_to_standard_normal(a)


@pytest.mark.parametrize("dim", [2, 8, 32])
def test_knn_about_a_gaussian_has_little_bias(dim):
    """Where the two-sample estimate is off by nats (`benchmarks/knn.py`), this one is off by hundredths."""
    errors = knn_errors(dim, 2000, 4, via_gaussian)
    assert abs(errors.mean()) < 0.08 + 4 * errors.std(ddof=1) / 2


def test_knn_about_a_gaussian_of_correlated_and_far_draws():
    """KL(N(m, C), N(0, I)) = (tr C + |m|^2 - d - log |C|) / 2, at 60 nats."""
    rng, dim = np.random.default_rng(5), 6
    factor = np.tril(rng.standard_normal((dim, dim))) * 0.1 + 0.01 * np.eye(dim)
    mean = 3.0 * np.ones(dim)
    exact = 0.5 * (np.sum(factor**2) + mean @ mean - dim - 2 * np.sum(np.log(np.abs(np.diag(factor)))))
    assert exact > 30
    estimate = knn.kl_to_standard_normal(mean + rng.standard_normal((4000, dim)) @ factor.T)
    assert abs(estimate - exact) < 0.1


def test_knn_about_a_gaussian_of_what_is_none():
    """Two separate modes in the plane, where quadrature knows the answer and a fitted Gaussian alone is far off."""
    mean, std, rng = np.array([[1.5, 0.5], [-1.5, 0.0]]), np.full((2, 2), 0.3), np.random.default_rng(6)
    exact = float(quadrature.mixture_kl(jnp.asarray(mean), jnp.asarray(std), StandardNormal(2)))
    draws = (mean[:, None] + std[:, None] * rng.standard_normal((2, 5000, 2))).reshape(-1, 2)
    covariance = np.cov(draws, rowvar=False)
    of_gaussian = 0.5 * (np.trace(covariance) + np.sum(draws.mean(0) ** 2) - 2 - np.linalg.slogdet(covariance)[1])
    assert exact - of_gaussian > 0.5
    assert abs(knn.kl_to_standard_normal(draws) - exact) < 0.05


def test_knn_about_a_gaussian_refuses():
    rng = np.random.default_rng(2)
    with pytest.raises(UserError, match="n more than twice d"):
        knn.kl_to_standard_normal(np.zeros((10, 5)))
    with pytest.raises(Diverged, match="plane of fewer dimensions"):
        knn.kl_to_standard_normal(rng.standard_normal((100, 1)) * np.array([[1.0, 0.0]]))


def test_mutual_information_of_a_linear_gaussian_encoder():
    """q(z|x) = N(m x + c, s^2), x ~ N(0, 1): I(x; z) = log(1 + m^2 / s^2) in two dimensions, as a difference of KLs."""
    x, (m, c, s) = np.random.default_rng(0).standard_normal((4000, 2)), (0.8, -0.3, np.exp(-0.5))
    model = gaussian.model()
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), jnp.zeros((2, 2)))
    arguments = {"model": model, "draws": 1000}
    draws = moments.posterior_draws(jax.random.key(1), state, x[:20], **arguments).z
    codes = moments.posterior_draws(jax.random.key(2), state, x, model=model, draws=2).z.reshape(-1, 2)
    of_x = np.array([knn.kl_to_standard_normal(z) for z in np.asarray(draws)])
    exact = 0.5 * np.sum((m * x[:20] + c) ** 2 + s**2 - 1 - 2 * np.log(s), axis=1)
    assert abs(np.mean(of_x - exact)) < 4 * np.std(of_x - exact) / np.sqrt(20) + 0.01
    exact = 0.5 * np.mean(np.sum((m * x + c) ** 2 + s**2 - 1 - 2 * np.log(s), axis=1))
    information = exact - knn.kl_to_standard_normal(codes)
    assert abs(information - np.log(1 + m**2 / s**2)) < 0.03


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
    state = state._replace(params=trained, average=trained, step=jnp.array(7))

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


def test_knn_of_gaussians():
    """In the plane, where Table 1 uses it, the bias is under a hundredth of a nat."""
    errors = knn_errors(2, 5000)
    assert abs(errors.mean()) < 0.01 + 4 * errors.std(ddof=1) / np.sqrt(len(errors))


def test_knn_bias_in_many_dimensions_shrinks_with_the_samples():
    few, many = knn_errors(8, 500), knn_errors(8, 8000)
    assert abs(many.mean()) < 0.7 * abs(few.mean())


def test_knn_of_equal_samples_is_zero_on_average():
    rng = np.random.default_rng(1)
    estimates = [knn.kl_divergence(*rng.standard_normal((2, 5000, 2))) for _ in range(8)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates, ddof=1) / np.sqrt(8) + 0.005


def test_knn_refuses_what_has_no_density():
    rng = np.random.default_rng(2)
    with pytest.raises(Diverged, match="occurs more than 3 times"):
        knn.kl_divergence(np.zeros((50, 2)), rng.standard_normal((50, 2)), k=3)
    shared = rng.standard_normal((50, 2))
    for k in (1, 3):
        with pytest.raises(UserError, match="a, b: 20 samples of a are in b"):
            knn.kl_divergence(shared, np.concatenate([rng.standard_normal((40, 2)), shared[:20]]), k=k)
    for a, b, name in ((np.where(shared > 2, np.inf, shared), shared + 0.1, "a"), (shared, np.full((50, 2), np.nan), "b")):
        with pytest.raises(Diverged, match=f"{name}: .* of 50 samples are not finite"):
            knn.kl_divergence(a, b)
    with pytest.raises(UserError, match="k=10: needs more than k samples"):
        knn.kl_divergence(np.zeros((5, 2)), np.zeros((50, 2)))
    with pytest.raises(UserError, match="shapes"):
        knn.kl_divergence(np.zeros((50, 3)), np.zeros((50, 2)))


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
    model = small_model(method, conv=True)
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
