"""Annealed importance sampling and its reverse against closed forms, quadrature and the laws that they obey."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Bernoulli, Deterministic, Model, Players, StandardNormal, UserError, data, fit, networks, parallel
from avb_jax.evaluation import ais, bdmc, importance, quadrature
from avb_jax.evaluation.examples import sum_up
from avb_jax.evaluation.proposal import SMALLEST_STD, Normal, proposal
from avb_jax.methods import avb, vae
from avb_jax.players import log_joint
from tests.conftest import small_model
from tests.ppca import Case, Encoder

KEY = jax.random.key(1)


def assert_agree(estimates, errors, expected, sigmas=3.0):
    """The mean error over examples is within `sigmas` of its standard error, and the spread is what the errors say."""
    difference = np.asarray(estimates, np.float64) - np.asarray(expected, np.float64)
    errors = np.asarray(errors, np.float64)
    assert abs(difference.mean()) < sigmas * np.sqrt(np.sum(errors**2)) / len(errors), (difference.mean(), errors)
    assert np.sqrt(np.mean((difference / errors) ** 2)) < 1 + sigmas / np.sqrt(len(errors)), difference / errors


@pytest.mark.parametrize("dim", [2, *[pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 32)]])
@pytest.mark.parametrize("sigma", [0.3, pytest.param(0.1, marks=pytest.mark.slow)])
def test_probabilistic_pca(dim, sigma):
    """784 pixels, posterior standard deviations of 0.11 and 0.036; AIS and quadrature at their default settings."""
    case = Case(dim, sigma)
    assert case.posterior_std.max() < 0.4 * sigma
    annealed = ais.log_likelihood(KEY, case.state, case.x, model=case.model)
    assert_agree(annealed.log_likelihood, annealed.standard_error, case.log_likelihood)
    assert abs(np.mean(annealed.log_likelihood - case.log_likelihood)) < 0.05
    assert np.all(annealed.mean_log_weight <= annealed.log_likelihood + 1e-3)
    # Importance sampling with more than its 256 samples: its error estimate is worth nothing at an effective size of a few.
    sampled = importance.log_likelihood(KEY, case.state, case.x, model=case.model, samples=20_000, chunk=1)
    assert_agree(sampled.log_likelihood, sampled.standard_error, case.log_likelihood)
    if dim == 2:
        exact = quadrature.log_likelihood(KEY, case.state, case.x, model=case.model)
        assert exact.largest_share.max() < 0.3
        np.testing.assert_allclose(exact.log_likelihood, case.log_likelihood, atol=2e-2)


@functools.cache
def bernoulli_case(kind):
    """A decoder of 2 latents with random weights, or trained as a VAE on the 8x8 digits, and data."""
    digits = data.load("digits", "", "threshold")
    decoder = networks.MLPDecoder((8, 8), 1, (32,))
    encoder = networks.GaussianEncoder(networks.MLP((32,), input_rank=2), 2)
    model = Model(Players(encoder, decoder, None), StandardNormal(2), Bernoulli(), 2)
    optimizers = Players(optax.adam(3e-3), optax.adam(3e-3), None)
    steps = 400 if kind == "trained" else 0
    states = fit(vae, model, optimizers, digits, steps=steps, batch_size=64, log_every=100, mode="jit", quiet=True)
    return model, jax.tree.map(lambda a: a[0], states), digits.test[:30]


@pytest.mark.parametrize(
    ("kind", "initial"),
    [("random", "prior"), pytest.param("random", "encoder", marks=pytest.mark.slow),
     pytest.param("trained", "prior", marks=pytest.mark.slow), ("trained", "encoder")],
)  # fmt: skip
def test_two_latents_against_quadrature(kind, initial):
    model, state, images = bernoulli_case(kind)
    arguments = {"model": model, "binarize": "threshold"}
    exact = quadrature.log_likelihood(KEY, state, images, **arguments)
    assert exact.largest_share.max() < 0.3
    estimate = ais.log_likelihood(KEY, state, images, initial=initial, temperatures=200, **arguments)
    assert_agree(estimate.log_likelihood, estimate.standard_error, exact.log_likelihood)


def test_weights_are_unbiased_however_few_the_temperatures():
    """E[w] = p(x) and, in reverse from exact posterior samples, E[w] = 1 / p(x): not merely in the limit."""
    sigma, x = 0.5, 1.3
    start = Normal(jnp.array([0.2]), jnp.array([0.8]))
    log_density = lambda z: -0.5 * jnp.sum(z**2 + ((x - z) / sigma) ** 2) - jnp.log(2 * jnp.pi * sigma)  # noqa: E731
    log_p = -0.5 * x**2 / (1 + sigma**2) - 0.5 * np.log(2 * np.pi * (1 + sigma**2))
    betas = ais.schedule(4)

    def one(key):
        forward_key, z_key, reverse_key = jax.random.split(key, 3)
        forward = ais.forward(forward_key, log_density, start, betas, chains=4, leapfrog_steps=2)
        posterior = x / (1 + sigma**2) + sigma / np.sqrt(1 + sigma**2) * jax.random.normal(z_key, (1,))
        back = ais.reverse(reverse_key, log_density, start, betas, 4, 2, posterior, forward.step_size)
        return jnp.exp(forward.log_weight - log_p).mean(), jnp.exp(back + log_p).mean()

    for weights in jax.jit(jax.vmap(one))(jax.random.split(KEY, 100_000)):
        assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(len(weights))
        assert weights.std() / np.sqrt(len(weights)) < 0.01  # so that this says something


def test_the_schedule_is_a_sigmoid():
    betas = np.asarray(ais.schedule(100))
    assert betas.shape == (101,)
    assert betas[0] == 0
    assert betas[-1] == 1
    np.testing.assert_allclose(betas + betas[::-1], 1, atol=1e-5)
    gaps = np.diff(betas)
    assert np.all(gaps > 0)
    assert gaps[50] / gaps[0] > 10
    np.testing.assert_allclose(betas[25], (1 / (1 + np.exp(2)) - 1 / (1 + np.exp(4))) / np.tanh(2), rtol=1e-4)


def test_the_step_size_is_adapted():
    """Through a hundredfold shrinking of the posterior, to an acceptance of 0.65."""
    case = Case(8, 0.1, count=8)
    estimate = ais.log_likelihood(KEY, case.state, case.x, model=case.model, initial="prior", temperatures=400)
    assert abs(estimate.acceptance[:, 200:].mean() - ais.TARGET_ACCEPTANCE) < 0.08
    assert np.all(estimate.step_size[:, -1] < 0.3 * estimate.step_size[:, 0])


def test_a_proposal_by_hand():
    """The encoder's moments or those of its draws, with the deviation inflated and never 0; or the prior's."""

    def of(case, initial="encoder", inflation=1.5, draws=4000):
        return proposal(KEY, case.state, case.model, case.x[0], initial, draws, inflation)

    case = Case(3, count=1)
    encoder = case.state.params.encoder
    mean = encoder["a"] @ (case.x[0] - encoder["b"]) + 0.2 * encoder["std"]
    np.testing.assert_allclose(of(case).mean, mean, rtol=1e-4)
    np.testing.assert_allclose(of(case).std, 1.5 * encoder["std"], rtol=1e-5)
    np.testing.assert_array_equal(of(case, "prior"), [np.zeros(3), np.ones(3)])

    class Sampler(nn.Module):  # the same draws, without a word about their moments
        @nn.compact
        def __call__(self, x, noise):
            return Encoder(3, name="encoder")(x, noise).z

    black_box = Case(3, count=1)
    black_box.model = dataclasses.replace(case.model, networks=case.model.networks._replace(encoder=Sampler()))
    black_box.state = case.state._replace(params=case.state.params._replace(encoder={"encoder": encoder}))
    estimated, std = of(black_box), np.asarray(encoder["std"])
    np.testing.assert_array_less(abs(estimated.mean - mean), 4 * std / np.sqrt(4000))
    np.testing.assert_allclose(estimated.std / 1.5, std, rtol=4 / np.sqrt(2 * 4000))
    np.testing.assert_allclose(of(black_box, draws=2).std, _two_draws_std(black_box), rtol=1e-4)
    np.testing.assert_allclose(of(black_box, inflation=0.0).std, SMALLEST_STD)


def _two_draws_std(case):
    """1.5 times the deviation of two draws, |a - b| / sqrt(2)."""
    noise = jax.random.normal(KEY, (2, 1, 3))
    one, two = (case.model.networks.encoder.apply({"params": case.state.params.encoder}, case.x[:1], e)[0] for e in noise)
    return np.maximum(1.5 * abs(one - two) / np.sqrt(2), SMALLEST_STD)


def test_what_ais_reports_beside_its_estimate():
    """Of the chains alone, not of the pilots: weights, their sizes along the path, the share of accepted proposals."""
    case = Case(2, 0.3, count=3)
    estimate = ais.log_likelihood(KEY, case.state, case.x, model=case.model, chains=5, temperatures=7, initial="prior")
    assert estimate.log_weight.shape == estimate.divergent.shape == (3, 5)
    assert estimate.acceptance.shape == estimate.step_size.shape == estimate.effective_sample_size_path.shape == (3, 7)
    np.testing.assert_allclose(estimate.mean_log_weight, estimate.log_weight.mean(axis=1), rtol=1e-5)
    weights = np.exp(np.float64(estimate.log_weight) - np.max(estimate.log_weight, axis=1, keepdims=True))
    size = weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)
    np.testing.assert_allclose(estimate.effective_sample_size, size, rtol=1e-3)
    np.testing.assert_allclose(estimate.effective_sample_size_path[:, -1], size, rtol=1e-3)
    log_mean = np.log(weights.mean(axis=1)) + np.max(estimate.log_weight, axis=1)
    np.testing.assert_allclose(estimate.log_likelihood, log_mean, rtol=1e-5)


def test_the_sandwich_s_errors_are_those_of_its_sides():
    """Both bounds err about one log p(x), so that their difference has the spread of both errors put together."""
    case = Case(2, 0.3)
    result = bdmc.sandwich(KEY, case.state, jnp.arange(200), model=case.model, temperatures=5, chains=8)
    spread = np.std(result.width, ddof=1)
    reported = np.sqrt(np.mean(np.square(result.lower_error) + np.square(result.upper_error)))
    assert 0.7 < spread / reported < 1.4
    assert result.width.mean() > -4 * spread / np.sqrt(200)


def test_the_initial_scale_is_the_chains_mass_and_their_unit():
    """Latents measured in other units are annealed alike, since step sizes are in standard deviations of f_0."""
    x, betas, results = jnp.array([0.5, -0.3]), ais.schedule(10), []
    for unit in (jnp.ones(2), jnp.array([100.0, 0.01])):
        density = lambda z, unit=unit: -0.5 * jnp.sum((z / unit) ** 2 + ((x - z / unit) / 0.3) ** 2) - jnp.log(unit).sum()  # noqa: E731
        results.append(ais.forward(KEY, density, Normal(0.1 * unit, 0.8 * unit), betas, 4, 3))
    for field in ("log_weight", "step_size", "acceptance"):
        np.testing.assert_allclose(*(getattr(result, field) for result in results), rtol=1e-3, atol=1e-3, err_msg=field)


def test_chains_do_not_choose_their_own_step_size():
    """Two pilots do: however many chains run along, and whatever they meet, the step sizes are the same ones."""
    case = Case(2, 0.3, count=1)
    density = lambda z: log_joint(case.state, case.model)(case.x[0], z[None])[0]  # noqa: E731
    start, betas = Normal(jnp.zeros(2), jnp.ones(2)), ais.schedule(20)
    few, many = (jax.jit(ais.forward, static_argnums=(1, 4, 5))(KEY, density, start, betas, chains, 3) for chains in (1, 9))
    np.testing.assert_allclose(few.step_size, many.step_size, rtol=1e-5)
    assert np.std(few.step_size) > 0.01
    np.testing.assert_allclose(few.log_weight[0], many.log_weight[0], rtol=1e-4)
    # By hand: the log of a step size moves by the pilots' acceptance off target, and theirs is not the chains' mean.
    moves = np.diff(np.log(many.step_size)) / ais.ADAPTATION_RATE + ais.TARGET_ACCEPTANCE
    assert ((moves > -1e-4) & (moves < 1 + 1e-4)).all()
    assert np.abs(moves - many.acceptance[:-1]).max() > 0.05


def test_reverse_chains_take_the_forward_step_sizes_in_reverse():
    """At beta = 1 they begin with the last one.

    On a path that jumps from 1 to about 0, a chain weighs where that one took it, and where it is 0 no chain has moved.
    """
    log_density = lambda z: -0.5 * jnp.sum(jnp.square(z / 0.3))  # noqa: E731
    start, betas = Normal(jnp.zeros(1), jnp.ones(1)), jnp.array([0.0, 1e-6, 1.0])
    moved, still = (
        ais.reverse(KEY, log_density, start, betas, 8, 3, jnp.array([0.2]), jnp.array(sizes)) for sizes in ([0, 0.1], [0.1, 0])
    )
    excess = log_density(jnp.array([0.2])) - start.log_prob(jnp.array([0.2]))
    np.testing.assert_allclose(still, -excess, atol=1e-3)
    assert np.abs(moved + excess).min() > 1e-3


def test_more_temperatures_tighten_the_bound():
    case = Case(8, 0.1, count=8)
    few, many = (
        ais.log_likelihood(KEY, case.state, case.x, model=case.model, initial="prior", temperatures=t).mean_log_weight.mean()
        for t in (50, 400)
    )
    assert few < many < case.log_likelihood.mean()


def test_sandwich_of_a_model_in_closed_form():
    """The bounds surround the mean log p(x) of the model's own data, and close as the temperatures rise."""
    case, numbers = Case(8, 0.1), jnp.arange(40)
    wide, narrow = (
        bdmc.sandwich(KEY, case.state, numbers, model=case.model, initial="prior", temperatures=t, chains=4) for t in (30, 300)
    )
    assert wide.width.mean() > 3 * narrow.width.mean() > 0
    spread = np.sqrt(0.5 * 784 / len(numbers))  # of the mean of log p(x): chi-squared over two
    assert narrow.lower.mean() < case.mean_log_likelihood + 3 * spread
    assert narrow.upper.mean() > case.mean_log_likelihood - 3 * spread


def estimates(function, **options):
    """What per-example estimators make of twelve images, dynamically binarised, by a small AVB model."""
    model = small_model("avb", batch_norm=True)
    images = jax.random.uniform(jax.random.key(7), (12, 6, 6))
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), images)
    return functools.partial(function, KEY, state, images, model=model, binarize="dynamic", **options)


ANNEALED = {"chains": 3, "temperatures": 6, "leapfrog_steps": 2}


@pytest.mark.parametrize(
    ("function", "options"),
    [pytest.param(ais.log_likelihood, ANNEALED, marks=pytest.mark.slow), (importance.log_likelihood, {"samples": 8})],
)
def test_estimates_do_not_depend_on_chunk_or_devices(function, options):
    evaluate = estimates(function, **options)
    one = evaluate(chunk=12)
    for other in (evaluate(chunk=5), evaluate(chunk=1)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)
    key, state, images = jax.device_put(evaluate.args, jax.devices()[0])  # committed, as a restored State is
    split = lambda key, state, numbers, images: function(  # noqa: E731
        key, state, images, numbers=numbers, chunk=2, **evaluate.keywords
    )
    for devices in (1, 2, 4):
        other = parallel.over_examples(split, jax.devices()[:devices])(key, state, jnp.arange(12), images)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)
    last = function(key, state, images[8:], numbers=jnp.arange(8, 12), **evaluate.keywords)
    np.testing.assert_allclose(last.log_likelihood, one.log_likelihood[8:], rtol=1e-4)


@pytest.mark.slow
def test_the_sandwich_does_not_depend_on_chunk_or_devices():
    model = small_model("avb", batch_norm=True)
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), jnp.zeros((2, 6, 6)))
    one = bdmc.sandwich(KEY, state, jnp.arange(8), model=model, **ANNEALED)
    split = lambda key, state, numbers: bdmc.sandwich(key, state, numbers, model=model, chunk=3, **ANNEALED)  # noqa: E731
    for devices in (1, 4):
        other = parallel.over_examples(split, jax.devices()[:devices])(KEY, state, jnp.arange(8))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)


def test_chains_that_diverge_are_told():
    """A likelihood so sharp that three temperatures cannot adapt to it: the share of divergent transitions says so."""
    case = Case(2, sigma=1e-3, scale=1.0, count=4)
    estimate = ais.log_likelihood(KEY, case.state, case.x, model=case.model, initial="prior", temperatures=3)
    assert estimate.divergent.shape == (4, 16)
    assert estimate.divergent.min() > 0.3
    params = case.state.params._replace(decoder={"w": jnp.full((784, 2), jnp.nan), "b": jnp.zeros(784)})
    broken = case.state._replace(params=params)
    estimate = ais.log_likelihood(KEY, broken, case.x, model=case.model, initial="prior", temperatures=3)
    assert not np.isfinite(estimate.log_likelihood).any()
    assert estimate.divergent.min() == 1


def test_slips():
    case = Case(2, count=2)
    for options in ({"chains": 0}, {"temperatures": 0}, {"leapfrog_steps": 0}):
        ((name, _),) = options.items()
        with pytest.raises(UserError, match=f"{name}=0: must be at least 1"):
            ais.log_likelihood(KEY, case.state, case.x, model=case.model, **options)
    with pytest.raises(UserError, match="initial='posterior': must be one of encoder, prior"):
        ais.log_likelihood(KEY, case.state, case.x, model=case.model, initial="posterior")
    sampler = Model(case.model.networks, case.model.prior, Deterministic(), 2)
    for estimate in (ais.log_likelihood, importance.log_likelihood, quadrature.log_likelihood):
        with pytest.raises(UserError, match="likelihood=Deterministic: this model defines no p"):
            estimate(KEY, case.state, case.x, model=sampler)
    with pytest.raises(UserError, match="likelihood=Deterministic"):
        bdmc.sandwich(KEY, case.state, jnp.arange(2), model=sampler)


def test_weights_by_hand():
    # Weights 1 and 3: mean 2, effective 16 / 10, relative variance of the mean (1 + 1) / (2 * 1) / 2^2 = 1 / 4.
    log_mean, error, size = sum_up(jnp.log(jnp.array([1.0, 3.0])))
    np.testing.assert_allclose([log_mean, error, size], [np.log(2), 0.5, 1.6], rtol=1e-5)
    log_mean, error, size = sum_up(jnp.zeros(5))
    np.testing.assert_allclose([log_mean, error, size], [0, 0, 5], atol=1e-3)
