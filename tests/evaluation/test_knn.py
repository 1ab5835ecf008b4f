"""The nearest-neighbour estimates against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist

from avb_jax import Diverged, UserError
from avb_jax.distributions import standard_normal
from avb_jax.evaluation import KNN, knn, quadrature
from avb_jax.evaluation.run import evaluate
from tests.conftest import small_method
from tests.evaluation import game
from tests.ppca import SHIFT, Case


def test_knn_agrees_with_quadrature_on_a_mixture():
    """As on the VAE's aggregated posterior in Table 1: two estimators that share nothing."""
    rng = np.random.default_rng(3)
    mean, std = np.array([[1.0, 0.5], [-1.0, 0.5], [0.5, -1.0], [-0.5, -1.0]]), np.full((4, 2), 0.6)
    exact = float(quadrature.mixture_kl(jnp.asarray(mean), jnp.asarray(std), standard_normal(2)))
    estimates = []
    for _ in range(6):
        draws = (mean[:, None] + std[:, None] * rng.standard_normal((4, 2500, 2))).reshape(-1, 2)
        estimates.append(knn.kl_divergence(draws, rng.standard_normal((10_000, 2))))
    assert abs(np.mean(estimates) - exact) < 0.01 + 4 * np.std(estimates, ddof=1) / np.sqrt(6)


def knn_errors(dim, count, repetitions=8, estimate=knn.kl_divergence):
    """Estimate minus closed form of KL(N(0.3, 0.8^2), N(0, 1)) in every dimension, over repetitions."""
    mean, std, rng = 0.3, 0.8, np.random.default_rng(0)
    expected = dim * 0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))
    return np.array(
        [
            estimate(mean + std * rng.standard_normal((count, dim)), rng.standard_normal((count, dim))) - expected
            for _ in range(repetitions)
        ]
    )


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
    exact = float(quadrature.mixture_kl(jnp.asarray(mean), jnp.asarray(std), standard_normal(2)))
    draws = (mean[:, None] + std[:, None] * rng.standard_normal((2, 5000, 2))).reshape(-1, 2)
    covariance = np.cov(draws, rowvar=False)
    of_gaussian = 0.5 * (np.trace(covariance) + np.sum(draws.mean(0) ** 2) - 2 - np.linalg.slogdet(covariance)[1])
    assert exact - of_gaussian > 0.5
    assert abs(knn.kl_to_standard_normal(draws) - exact) < 0.05


def test_knn_about_a_gaussian_refuses():
    rng = np.random.default_rng(2)
    with pytest.raises(UserError, match="n more than twice d"):
        knn.kl_to_standard_normal(np.zeros((10, 5)))
    line = rng.standard_normal((100, 1))
    for plane in (line * [1.0, 0.0], line * [0.0, 1.0] + [0.1, 0.0], (line * [1.0, 3.0]).astype(np.float32)):
        with pytest.raises(Diverged, match="plane of fewer dimensions"):
            knn.kl_to_standard_normal(plane)
    assert knn.kl_to_standard_normal(line * [1.0, 0.0] + 1e-6 * rng.standard_normal((100, 2))) > 10


def test_knn_of_gaussians():
    """In the plane, where Table 1 uses it, the bias is under a hundredth of a nat."""
    errors = knn_errors(2, 5000)
    assert abs(errors.mean()) < 0.01 + 4 * errors.std(ddof=1) / np.sqrt(len(errors))


@pytest.mark.slow
def test_knn_bias_in_many_dimensions_shrinks_with_the_samples():
    few, many = knn_errors(8, 500), knn_errors(8, 8000)
    assert abs(many.mean()) < 0.7 * abs(few.mean())


def test_knn_of_equal_samples_is_zero_on_average():
    rng = np.random.default_rng(1)
    estimates = [knn.kl_divergence(*rng.standard_normal((2, 5000, 2))) for _ in range(8)]
    assert abs(np.mean(estimates)) < 4 * np.std(estimates, ddof=1) / np.sqrt(8) + 0.005


def test_knn_by_hand():
    """The formula with all distances in a table: 5 of q, 4 of p, in 3 dimensions, k = 2."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    in_a, in_b = (np.sort(np.linalg.norm(a[:, None] - x, axis=2), axis=1) for x in (a, b))
    expected = 3 / 5 * np.sum(np.log(in_b[:, 1] / in_a[:, 2])) + np.log(4 / 4)  # in_a[:, 0] is a_i itself
    np.testing.assert_allclose(knn.kl_divergence(a, b, k=2), expected, rtol=1e-12)
    in_three = np.sort(np.linalg.norm(a[:, None] - b[:3], axis=2), axis=1)
    expected = 3 * np.mean(np.log(in_three[:, 1] / in_a[:, 2])) + np.log(3 / 4)
    np.testing.assert_allclose(knn.kl_divergence(a, b[:3], k=2), expected, rtol=1e-12)


def test_the_gaussian_part_is_unbiased(monkeypatch):
    """From as few as 12 draws in 3 dimensions: the mean over many sets, without what the neighbours add."""
    compared = []
    monkeypatch.setattr(knn, "kl_divergence", lambda a, b, k: compared.append((a, b, k)) or 0.0)
    rng, mean, std = np.random.default_rng(1), np.array([0.5, -1.0, 0.0]), np.array([0.5, 1.0, 2.0])
    estimates = [knn.kl_to_standard_normal(mean + std * rng.standard_normal((12, 3)), k=4) for _ in range(4000)]
    exact = 0.5 * np.sum(mean**2 + std**2 - 1 - 2 * np.log(std))
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / np.sqrt(4000)
    for whitened, draws, k in compared[:3]:
        assert k == 4
        assert whitened.shape == draws.shape == (12, 3)
        for x in (whitened, draws):
            np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-12)
            np.testing.assert_allclose(np.cov(x, rowvar=False), np.eye(3), atol=1e-12)


def test_the_seed_is_of_the_draws():
    a = np.random.default_rng(0).standard_normal((50, 2))
    one, again, other = (knn.kl_to_standard_normal(a, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


def test_knn_refuses_what_has_no_density():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 50, 2))
    with pytest.raises(Diverged, match="occurs more than 3 times"):
        knn.kl_divergence(np.concatenate([a, np.zeros((4, 2))]), b, k=3)
    for name, pair in (("a", (np.repeat(a, 2, axis=0), b)), ("b", (a, np.repeat(b, 2, axis=0)))):
        with pytest.raises(Diverged, match=f"{name}: 50 of 100 samples repeat others"):
            knn.kl_divergence(*pair)
    few = np.concatenate([a, a[:5]])  # as rounding brings about: close to the same without them
    assert abs(knn.kl_divergence(few, b) - knn.kl_divergence(a, b)) < 0.15


def test_knn_refuses_samples_that_are_in_both():
    a, b = np.random.default_rng(3).standard_normal((2, 50, 2))
    with pytest.raises(UserError, match="3 of a's 50 samples are in b too"):
        knn.kl_divergence(a, np.concatenate([b, a[:3]]), k=1)  # where log 0 would make it -inf
    with pytest.raises(UserError, match="50 of a's 50 samples are in b too"):
        knn.kl_divergence(a, a)
    assert np.isfinite(knn.kl_divergence(a, np.concatenate([b, a[:3]])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_knn_refuses_numbers_that_are_none(bad):
    a, b = np.random.default_rng(4).standard_normal((2, 50, 2))
    a[3, 1] = bad
    for call in (lambda: knn.kl_divergence(a, b), lambda: knn.kl_to_standard_normal(a)):
        with pytest.raises(UserError, match="a: 1 of 50 samples are not finite"):
            call()
    with pytest.raises(UserError, match="b: 1 of 50 samples are not finite"):
        knn.kl_divergence(b, a)


def test_knn_refuses_slips():
    a = np.random.default_rng(5).standard_normal((50, 2))
    for k, message in ((0, "k=0"), (2.5, r"k=2\.5"), (50, "got 50"), (10, "at least k from p .got 9")):
        with pytest.raises(UserError, match=message):
            knn.kl_divergence(a, -a if k != 10 else -a[:9], k=k)
    assert np.isfinite(knn.kl_divergence(a, -a[:10], k=10))
    assert np.isfinite(knn.kl_divergence(a[:11], -a, k=10))
    with pytest.raises(UserError, match="shapes"):
        knn.kl_divergence(a, np.zeros((50, 3)))
    for shape in ((50,), (50, 0), (50, 1, 1)):
        with pytest.raises(UserError, match="a: shape"):
            knn.kl_divergence(np.zeros(shape), a)


IMAGES = 40


@pytest.fixture(scope="module")
def of_game():
    """A report on the game, whose encoder does not say its moments, on 60 examples."""
    estimator = KNN(images=IMAGES, draws=1000, codes=9000)
    return evaluate(game.method(), game.state(), game.points(), [estimator], quiet=True)


@pytest.mark.slow
def test_the_aggregated_posterior_of_a_run(of_game):
    """KL(q(z), p(z)) by both estimates against a grid, and not KL(p(z), q(z))."""
    means = game.M * np.float64(game.points()) + game.C
    exact = quadrature.mixture_kl(means, np.full((60, 2), game.S), standard_normal(2))
    assert exact > 0.3
    assert of_game["kl_aggregated_posterior", "knn"].mean == pytest.approx(exact, abs=0.06)
    assert of_game["kl_aggregated_posterior", "knn_gaussian"].mean == pytest.approx(exact, abs=0.04)


def test_the_posteriors_of_a_run_and_their_mutual_information(of_game):
    """I(x; z) is what KL(q(z|x), p(z)) has above KL(q(z), p(z))."""
    kl, information = of_game["kl", "knn"], of_game["mutual_information", "knn"]
    exact = game.posterior_kl(game.points(IMAGES))
    assert kl.examples == information.examples == IMAGES
    assert abs(kl.mean - exact.mean()) < 0.02
    np.testing.assert_allclose(kl.examples_error, exact.std(ddof=1) / np.sqrt(IMAGES), rtol=0.1)
    aggregated = of_game["kl_aggregated_posterior", "knn_gaussian"].mean
    assert information.mean == pytest.approx(kl.mean - aggregated)
    assert information.mean > 0.1
    assert information.examples_error == pytest.approx(kl.examples_error)


def test_the_adversary_s_kl_next_to_the_neighbours(of_game):
    """For a figure: of the same examples, T's with its offset."""
    neighbours, under_t = of_game.results[0]["kl_by_both"]
    assert neighbours.shape == under_t.shape == (IMAGES,)
    exact = game.posterior_kl(game.points(IMAGES))
    np.testing.assert_allclose(under_t - game.OFFSET, exact, atol=0.3)
    np.testing.assert_allclose(neighbours, exact, atol=0.3)
    assert of_game.notes == []


def test_a_known_posterior_is_taken_as_it_is():
    """Where KL(q(z|x), p(z)) has a closed form, I(x; z) is with that one, and the neighbours' is a check of its own."""
    case, estimator = Case(2, count=30), KNN(images=10, draws=500, codes=3000)
    report = evaluate(case.method, case.state, case.x, [estimator], quiet=True)
    params = case.state.params
    mean = (case.x[:10] - params["b"]) @ np.asarray(params["a"]).T + SHIFT * np.asarray(params["std"])
    kl = 0.5 * np.sum(mean**2 + case.posterior_std**2 - 1 - 2 * np.log(case.posterior_std), axis=1)
    information, by_draws = report["mutual_information", "knn"], report["kl", "knn"]
    aggregated = report["kl_aggregated_posterior", "knn_gaussian"].mean
    np.testing.assert_allclose(information.mean, kl.mean() - aggregated, rtol=1e-4)
    np.testing.assert_allclose(information.examples_error, kl.std(ddof=1) / np.sqrt(10), rtol=1e-4)
    assert 0 < abs(by_draws.mean - kl.mean()) < 0.05
    drawn = report.results[0]["posterior"].z
    assert by_draws.mean == pytest.approx(np.mean([knn.kl_to_standard_normal(z) for z in drawn]))
    assert "kl_by_both" not in report.results[0]


def test_another_prior():
    """KL(q(z), p(z)) is by two samples, and what is about a Gaussian is left out, with a note; nothing else is drawn."""
    prior = dist.Normal(jnp.array([1.0, -1.0]), 1.5).to_event(1)
    report = evaluate(
        game.method(prior=prior), game.state(), game.points(), [KNN(images=IMAGES, draws=100, codes=6000)], quiet=True
    )
    assert set(report.estimates) == {("kl_aggregated_posterior", "knn")}
    means, std = game.M * np.float64(game.points()) + game.C, np.full((60, 2), game.S)
    exact = quadrature.mixture_kl(means, std, prior)
    assert report["kl_aggregated_posterior", "knn"].mean == pytest.approx(exact, abs=0.06)
    assert report.notes == ["avb: knn: KL(q(z|x), p(z)) and I(x; z) by neighbours about a Gaussian need the prior N(0, I)"]
    assert set(report.results[0]) == {"codes"}


@pytest.mark.parametrize(
    ("prior", "standard"),
    [
        (standard_normal(2), True),
        (dist.Normal(0.0, 1.0).expand([2]).to_event(1), True),
        (dist.Normal(jnp.array([0.0, 0.1]), 1.0).to_event(1), False),
        (dist.Normal(jnp.zeros(2), 2.0).to_event(1), False),
        (dist.Laplace(jnp.zeros(2), 1.0).to_event(1), False),
        (dist.TransformedDistribution(standard_normal(2), dist.transforms.ExpTransform()), False),
    ],
)
def test_which_priors_are_the_standard_normal(prior, standard):
    assert knn.is_standard_normal(prior) is standard


def test_no_posteriors():
    """With `images=0`, KL(q(z), p(z)) is all."""
    report = evaluate(game.method(), game.state(), game.points(), [KNN(images=0, codes=600)], quiet=True)
    assert set(report.estimates) == {("kl_aggregated_posterior", "knn"), ("kl_aggregated_posterior", "knn_gaussian")}


def test_what_it_needs():
    assert KNN().lacks(small_method("avb")) == KNN().lacks(small_method("bigan")) == ""
    assert KNN().lacks(small_method("gan")) == "has no encoder"
    assert KNN().lacks(small_method("avb")._replace(prior=None)) == "has no prior"
    for field in ("draws", "codes", "neighbours", "chunk"):
        with pytest.raises(UserError, match=f"{field}=0: must be at least 1"):
            KNN(**{field: 0})
    with pytest.raises(UserError, match="images=-1: must be at least 0"):
        KNN(images=-1)
