"""Estimators against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Players, StandardNormal, UserError
from avb_jax.distributions import normal_log_prob
from avb_jax.evaluation import importance, knn, quadrature
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.methods import METHODS, avb
from tests import gaussian
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
    np.testing.assert_allclose(quadrature.log_likelihood(log_prob, StandardNormal(dim)), expected, atol=1e-4)


def test_quadrature_does_not_depend_on_the_chunk():
    x = jnp.ones((3, 2))
    log_prob = lambda z: jnp.sum(normal_log_prob(x, z[:, None]), axis=-1)  # noqa: E731
    one, two = (quadrature.log_likelihood(log_prob, StandardNormal(2), points=60, chunk=c) for c in (100, 3600))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_quadrature_refuses_many_latents():
    with pytest.raises(UserError, match="latent_dim=4: quadrature serves 1 to 3"):
        quadrature.log_likelihood(lambda z: z, StandardNormal(4))


def test_mixture_kl_of_one_gaussian_is_the_closed_form():
    mean, std = jnp.array([[0.5, -1.0]]), jnp.array([[0.4, 1.2]])
    expected = 0.5 * np.sum(np.square([0.5, -1.0]) + np.square([0.4, 1.2]) - 1 - 2 * np.log([0.4, 1.2]))
    np.testing.assert_allclose(quadrature.mixture_kl(mean, std, StandardNormal(2)), expected, rtol=1e-3)


def test_mixture_kl_of_far_components_by_hand():
    # Components that do not overlap: KL = mean of the components' KLs - log n.
    mean, std = jnp.array([[-3.0, 0.0], [3.0, 0.0]]), jnp.full((2, 2), 0.3)
    each = 0.5 * (9 + 2 * (0.09 - 1 - 2 * np.log(0.3)))
    np.testing.assert_allclose(quadrature.mixture_kl(mean, std, StandardNormal(2)), each - np.log(2), rtol=1e-3)


def knn_errors(dim, count, repetitions=8):
    """Estimate minus closed form of KL(N(0.3, 0.8^2), N(0, 1)) in every dimension, over repetitions."""
    mean, std, rng = 0.3, 0.8, np.random.default_rng(0)
    expected = dim * 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))
    return np.array([
        knn.kl_divergence(mean + std * rng.standard_normal((count, dim)), rng.standard_normal((count, dim))) - expected
        for _ in range(repetitions)
    ])  # fmt: skip


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
    with pytest.raises(UserError, match="occurs more than 3 times"):
        knn.kl_divergence(np.zeros((50, 2)), rng.standard_normal((50, 2)), k=3)
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


@pytest.mark.parametrize("method", METHODS)
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
