"""The nearest-neighbour estimates against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Diverged, Players, StandardNormal, UserError
from avb_jax.evaluation import knn, moments, quadrature
from avb_jax.methods import avb
from tests import gaussian


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
