"""Importance sampling, the proposals that estimators start from, and what weights are summed up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

from avb_jax import Method, Posterior, State, UserError
from avb_jax.distributions import normal, standard_normal
from avb_jax.evaluation import AIS, BDMC, ImportanceSampling, Quadrature
from avb_jax.evaluation.examples import pareto_k, sum_up
from avb_jax.evaluation.proposal import SMALLEST_STD, proposal
from avb_jax.evaluation.run import evaluate
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.common import KEY, assert_agree, over
from tests.ppca import SHIFT, Case


@pytest.mark.parametrize("dim", [2, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_probabilistic_pca(dim):
    """With more than the 256 samples of the default: its error estimate is worth nothing at an effective size of a few."""
    case = Case(dim)
    sampled = over(ImportanceSampling(samples=20_000 if dim == 32 else 4000, chunk=1), case.method, case.state, case.x)
    assert_agree(sampled.log_likelihood, sampled.standard_error, case.log_likelihood)


@pytest.mark.slow
def test_a_linear_gaussian_model_with_a_black_box_for_an_encoder():
    """p(x) = N(0, w^2 + sigma^2) in each dimension, by AVB's own functions, although the encoder is not the posterior."""
    method, state = game.method(), game.state()
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    estimate = over(ImportanceSampling(samples=5000, inflation=1.5), method, state, x)
    errors = 1 / np.sqrt(estimate.effective_sample_size)  # of the log-mean weight, to first order
    np.testing.assert_array_less(np.abs(estimate.log_likelihood - game.log_evidence(x)), 5 * errors)
    few = over(ImportanceSampling(samples=4, inflation=1.5), method, state, x)
    assert few.log_likelihood.mean() < estimate.log_likelihood.mean()  # a lower bound that rises with the samples


def test_effective_sample_size_and_error_of_known_weights():
    """Importance weights p(z|x) / r(z) of r = N(m x + c, (1.5 s)^2): E[w^2], by draws of r."""
    x = game.points(40)
    estimator = ImportanceSampling(samples=1000, fit_draws=500, inflation=1.5)
    estimate = over(estimator, game.method(), game.state(), x)
    precision = 1 + game.W**2 / game.SIGMA**2
    mean, std = game.W / game.SIGMA**2 / precision * x[:, None], 1 / np.sqrt(precision)
    start = game.M * x[:, None] + game.C, 1.5 * game.S
    z = start[0] + start[1] * np.random.default_rng(2).standard_normal((40, 20_000, 2))
    square = np.exp(2 * np.sum(stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z, *start), axis=-1)).mean(axis=1)
    np.testing.assert_allclose(estimate.effective_sample_size.mean(), np.mean(1000 / square), rtol=0.05)
    error = np.sqrt(np.mean(square - 1) / 1000 / 40)
    numbers = estimator.numbers(None, estimate)
    number = numbers["log_likelihood", "importance"]
    assert (number.examples, number.mean) == (40, pytest.approx(estimate.log_likelihood.mean()))
    np.testing.assert_allclose(number.estimator_error, error, rtol=0.1)
    np.testing.assert_allclose(numbers["effective_sample_size", "importance"].mean, np.mean(1000 / square), rtol=0.05)


def test_weights_by_hand():
    # Weights 1 and 3: mean 2, effective 16 / 10, relative variance of the mean (1 + 1) / (2 * 1) / 2^2 = 1 / 4.
    log_mean, error, size = sum_up(jnp.log(jnp.array([1.0, 3.0])))
    np.testing.assert_allclose([log_mean, error, size], [np.log(2), 0.5, 1.6], rtol=1e-5)
    assert np.isnan(sum_up(jnp.zeros(1)).standard_error)  # a single weight does not say
    log_mean, error, size = sum_up(jnp.zeros(5))
    np.testing.assert_allclose([log_mean, error, size], [0, 0, 5], atol=1e-3)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
@pytest.mark.slow
def test_the_tail_of_pareto_weights_has_their_shape(k):
    """Of u^-k; drawn towards 1/2 with the weight of ten next to the tail's 40."""
    weights = np.random.default_rng(0).random((2000, 200)) ** -k
    found = np.asarray(jax.vmap(pareto_k)(jnp.log(weights)))
    expected = (40 * k + 5) / 50
    np.testing.assert_allclose(found.mean(), expected, atol=0.036)
    assert 0.1 < found.std() < 0.3  # of a maximum likelihood, (1 + k) / sqrt(40) before it is drawn
    np.testing.assert_allclose(pareto_k(jnp.log(7.0 * weights[0])), found[0], rtol=1e-3)
    assert np.isnan(pareto_k(jnp.zeros(20)))


def test_a_semi_implicit_proposal_is_the_mixture_of_the_encoder_s_components():
    """Of its conditionals at the draws, inflated, and for a tenth a Gaussian of their moments; by hand for two draws."""
    method, means, std = game.method(), jnp.array([[[-1.0, 0.0]], [[2.0, 1.0]]]), jnp.full((2, 1, 2), 0.4)

    def encode(key, state, x, draws=None):
        return Posterior(means, conditional=(means, std))

    found = proposal(KEY, game.state(), method._replace(encode=encode), jnp.zeros(2), "semi_implicit", 2, 1.5)
    z = np.array([0.3, 0.2])
    parts = [stats.norm.pdf(z, means[i, 0], 0.6).prod() for i in range(2)]
    broad = stats.norm.pdf(z, [0.5, 0.5], 1.5 * np.array([3.0, 1.0]) / np.sqrt(2)).prod()
    np.testing.assert_allclose(found.log_prob(z), np.log(0.45 * sum(parts) + 0.1 * broad), rtol=1e-5)
    estimator = ImportanceSampling(initial="semi_implicit")
    assert estimator.lacks(method) == "has no encoder that is semi-implicit; use initial='encoder'"
    assert not estimator.lacks(method._replace(semi_implicit=True))


def test_a_proposal_by_hand():
    """The encoder's moments or those of its draws, with the deviation inflated and never 0; or the prior itself."""
    case = Case(3, count=1)

    def of(method, initial="encoder", inflation=1.5, draws=4000):
        return proposal(KEY, case.state, method, case.x[0], initial, draws, inflation)

    p = case.state.params
    mean, std = p["a"] @ (case.x[0] - p["b"]) + SHIFT * p["std"], np.asarray(p["std"])
    np.testing.assert_allclose(of(case.method).mean, mean, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(of(case.method).variance), 1.5 * std, rtol=1e-5)
    assert of(case.method, "prior") is case.method.prior

    estimated = of(case.black_box)
    np.testing.assert_array_less(abs(estimated.mean - mean), 4 * std / np.sqrt(4000))
    np.testing.assert_allclose(np.sqrt(estimated.variance) / 1.5, std, rtol=4 / np.sqrt(2 * 4000))
    one, two = case.black_box.encode(KEY, case.state, case.x, 2).z[:, 0]
    of_two = np.maximum(1.5 * abs(one - two) / np.sqrt(2), SMALLEST_STD)  # the deviation of two draws
    np.testing.assert_allclose(np.sqrt(of(case.black_box, draws=2).variance), of_two, rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(of(case.black_box, inflation=0.0).variance), SMALLEST_STD, rtol=1e-5)


def mixture_prior():
    """Two narrow Gaussians far apart, of different weights."""
    components = dist.Normal(jnp.array([[-2.0], [1.5]]), jnp.array([[0.3], [0.5]])).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.25, 0.75])), components)


PRIORS = {
    "mixture": (mixture_prior, lambda z: 0.25 * stats.norm.pdf(z, -2, 0.3) + 0.75 * stats.norm.pdf(z, 1.5, 0.5)),
    "wide": (lambda: dist.Normal(jnp.full(1, 3.0), 5.0).to_event(1), lambda z: stats.norm.pdf(z, 3, 5)),
    "half normal": (lambda: dist.HalfNormal(jnp.full(1, 2.0)).to_event(1), lambda z: stats.halfnorm.pdf(z, scale=2)),
}
X = np.array([[-4.1], [0.2], [0.7], [2.9], [4.0]], np.float32)


def of_prior(prior):
    """p(x|z) = N(z + sin z, 0.5^2) with one latent of a prior; its encoder is a wide Gaussian."""

    def decode(state, z):
        return normal(z + jnp.sin(z), 0.5)

    def log_joint(state, x, z):
        return decode(state, z).log_prob(x) + prior.log_prob(z)

    def encode(key, state, x, draws=None):
        shape = x.shape if draws is None else (draws, *x.shape)
        std = jnp.ones_like(x)
        return Posterior(0.8 * x + jax.random.normal(key, shape), 0.8 * x, std, gaussian=True)

    return Method("sine", None, None, None, prior, encode=encode, decode=decode, log_joint=log_joint)


STATE = State(jnp.zeros((), jnp.int32), {}, None, None)


def by_integration(density):
    """Log p(x) of X on a fine grid over z."""
    z = np.linspace(-30, 30, 600_001)
    p_x = stats.norm.pdf(X, z + np.sin(z), 0.5) * density(z)
    return np.log(p_x.sum(axis=1) * 1e-4)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("initial", ["prior", "encoder"])
@pytest.mark.slow
def test_other_priors_than_the_standard_normal(name, initial):
    """From the prior, whatever its kind; from the encoder where it covers what a Gaussian does."""
    prior, density = PRIORS[name]
    method, estimator = of_prior(prior()), ImportanceSampling(samples=20_000, initial=initial)
    if name == "half normal" and initial == "encoder":
        lacking = "sine has a prior that does not cover all vectors, HalfNormal; use ImportanceSampling\\(initial='prior'\\)"
        with pytest.raises(UserError, match=lacking) as error:
            over(estimator, method, STATE, X)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=f"ImportanceSampling: {lacking}"):
            evaluate(method, STATE, X, [estimator], quiet=True)
        return
    estimate = over(estimator, method, STATE, X)
    assert estimate.effective_sample_size.min() > 20
    assert_agree(estimate.log_likelihood, estimate.standard_error, by_integration(density))


@pytest.mark.parametrize("name", ["mixture", "wide"])
@pytest.mark.slow
def test_quadrature_and_annealing_with_other_priors(name):
    prior, density = PRIORS[name]
    method, exact = of_prior(prior()), by_integration(density)
    np.testing.assert_allclose(over(Quadrature(), method, STATE, X).log_likelihood, exact, atol=2e-3)
    estimate = over(AIS(temperatures=60, chains=30, leapfrog_steps=5), method, STATE, X)
    np.testing.assert_array_less(abs(estimate.log_likelihood - exact), 4 * estimate.standard_error + 0.01)


@pytest.mark.parametrize("estimator", [AIS(), AIS(initial="prior"), BDMC(initial="prior"), Quadrature()])
def test_estimators_that_move_over_all_vectors_refuse_a_prior_on_some(estimator):
    method = of_prior(PRIORS["half normal"][0]())
    assert estimator.lacks(method).startswith("has a prior that does not cover all vectors, HalfNormal")
    assert estimator.lacks(of_prior(standard_normal(1))) == ""


def test_what_it_needs():
    estimator = ImportanceSampling()
    assert estimator.lacks(small_method("avb")) == ""
    assert estimator.lacks(small_method("gan")) == "has no likelihood p(x|z)"
    assert estimator.lacks(small_method("avb")._replace(encode=None)).startswith("has no encoder to fit a proposal to")
    of_density = Method("density", None, None, None, log_joint=lambda state, x, z: z)
    assert ImportanceSampling(initial="prior").lacks(of_density) == "has no prior to start from"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"chunk": 0}, "chunk=0: must be at least 1"),
        ({"initial": "posterior"}, "initial='posterior': must be one of encoder, prior"),
        ({"fit_draws": 1}, "fit_draws=1: must be at least 2"),
        ({"inflation": -1.0}, r"inflation=-1\.0: must be positive"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        ImportanceSampling(**settings)
