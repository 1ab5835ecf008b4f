"""Annealed importance sampling and its reverse against closed forms, quadrature and the laws that they obey."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avb_jax
from avb_jax import UserError, data, networks
from avb_jax.distributions import bernoulli, normal, standard_normal
from avb_jax.evaluation import AIS, BDMC, Quadrature, ais
from tests.conftest import small_method
from tests.evaluation.common import KEY, assert_agree, over
from tests.ppca import Case


@pytest.mark.parametrize(
    ("dim", "sigma", "settings"),
    [
        (8, 0.3, {"temperatures": 100, "leapfrog_steps": 5}),
        *(pytest.param(dim, sigma, {}, marks=pytest.mark.slow) for dim in (2, 8, 32) for sigma in (0.3, 0.1)),
    ],
)
@pytest.mark.slow
def test_probabilistic_pca(dim, sigma, settings):
    """784 pixels, posterior standard deviations of 0.11 and 0.036; in full at the default settings."""
    case = Case(dim, sigma)
    assert case.posterior_std.max() < 0.4 * sigma
    estimate = over(AIS(**settings), case.method, case.state, case.x)
    assert_agree(estimate.log_likelihood, estimate.standard_error, case.log_likelihood)
    assert abs(np.mean(estimate.log_likelihood - case.log_likelihood)) < 0.05
    assert np.all(estimate.mean_log_weight <= estimate.log_likelihood + 1e-3)


@functools.cache
def bernoulli_case(kind):
    """A decoder of 2 latents with random weights, or trained as a VAE on the 8x8 digits, and data."""
    digits = data.load("digits", "", "threshold")
    method = avb_jax.vae(
        networks.GaussianEncoder(networks.MLP((32,), input_rank=2), 2),
        networks.MLPDecoder((8, 8), 1, (32,)),
        prior=standard_normal(2),
        likelihood=bernoulli,
        optimizers=optax.adam(3e-3),
        noise_dim=2,
    )
    steps = 400 if kind == "trained" else 0
    state = avb_jax.fit(method, digits, steps=steps, batch_size=64, parallel="jit", quiet=True, callbacks=[])
    return method, state, digits.test[:30]


@pytest.mark.parametrize(
    ("kind", "initial", "count"),
    [
        ("random", "prior", 8),
        *(
            pytest.param(kind, initial, 30, marks=pytest.mark.slow)
            for kind in ("random", "trained")
            for initial in ("prior", "encoder")
        ),
    ],
)
def test_two_latents_against_quadrature(kind, initial, count):
    method, state, images = bernoulli_case(kind)
    images = images[:count]
    exact = over(Quadrature(), method, state, images, binarize="threshold")
    assert exact.largest_share.max() < 0.3
    estimate = over(AIS(initial=initial, temperatures=200 if count == 30 else 60), method, state, images, binarize="threshold")
    assert_agree(estimate.log_likelihood, estimate.standard_error, exact.log_likelihood)


@pytest.mark.slow
def test_weights_are_unbiased_however_few_the_temperatures():
    """E[w] = p(x) and, in reverse from exact posterior samples, E[w] = 1 / p(x): not merely in the limit."""
    sigma, x = 0.5, 1.3
    start = normal(jnp.array([0.2]), jnp.array([0.8]))
    betas, precision = ais.schedule(4), 1 + sigma**-2
    log_p = -0.5 * x**2 / (1 + sigma**2) - 0.5 * np.log(2 * np.pi * (1 + sigma**2))

    def log_density(z):
        return -0.5 * jnp.sum(z**2 + ((x - z) / sigma) ** 2) - jnp.log(2 * jnp.pi * sigma)

    def one(key):
        forward_key, z_key, reverse_key = jax.random.split(key, 3)
        forward = ais.forward(forward_key, log_density, start, betas, chains=4, leapfrog_steps=2)
        posterior = x / (1 + sigma**2) + jax.random.normal(z_key, (1,)) / np.sqrt(precision)
        back = ais.reverse(reverse_key, log_density, start, betas, 4, 2, posterior, forward.step_size)
        return jnp.exp(forward.log_weight - log_p).mean(), jnp.exp(back + log_p).mean()

    for weights in jax.jit(jax.vmap(one))(jax.random.split(KEY, 30_000)):
        assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(len(weights))
        assert weights.std() / np.sqrt(len(weights)) < 0.02  # so that this says something


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
    with pytest.raises(UserError, match="temperatures=0: must be at least 1"):
        ais.schedule(0)


def test_the_step_size_is_adapted():
    """Through a hundredfold shrinking of the posterior, to an acceptance of 0.65."""
    case = Case(8, 0.1, count=4)
    estimate = over(AIS(initial="prior", temperatures=400, chains=6), case.method, case.state, case.x)
    assert abs(estimate.acceptance[:, 200:].mean() - ais.TARGET_ACCEPTANCE) < 0.08
    assert np.all(estimate.step_size[:, -1] < 0.3 * estimate.step_size[:, 0])


@pytest.mark.slow
def test_more_temperatures_tighten_the_bound():
    case = Case(8, 0.1, count=4)
    few, many = (
        over(AIS(initial="prior", temperatures=t, chains=6), case.method, case.state, case.x).mean_log_weight.mean()
        for t in (50, 400)
    )
    assert few < many < case.log_likelihood.mean()


def test_what_an_estimate_holds_besides_log_p():
    """Of the chains alone, not of the pilots: weights, their sizes along the path, the share of accepted proposals."""
    case = Case(2, 0.3, count=3)
    estimate = over(AIS(chains=5, temperatures=7, initial="prior"), case.method, case.state, case.x)
    assert estimate.log_weight.shape == estimate.divergent.shape == (3, 5)
    assert estimate.acceptance.shape == estimate.step_size.shape == estimate.effective_sample_size_path.shape == (3, 7)
    np.testing.assert_allclose(estimate.mean_log_weight, estimate.log_weight.mean(axis=1), rtol=1e-5)
    weights = np.exp(np.float64(estimate.log_weight) - np.max(estimate.log_weight, axis=1, keepdims=True))
    size = weights.sum(axis=1) ** 2 / (weights**2).sum(axis=1)
    np.testing.assert_allclose(estimate.effective_sample_size, size, rtol=1e-3)
    np.testing.assert_allclose(estimate.effective_sample_size_path[:, -1], size, rtol=1e-3)
    log_mean = np.log(weights.mean(axis=1)) + np.max(estimate.log_weight, axis=1)
    np.testing.assert_allclose(estimate.log_likelihood, log_mean, rtol=1e-5)


@pytest.mark.slow
def test_the_initial_scale_is_the_chains_mass_and_their_unit():
    """Latents measured in other units are annealed alike, since step sizes are in standard deviations of f_0."""
    x, betas, results = jnp.array([0.5, -0.3]), ais.schedule(10), []
    for unit in (jnp.ones(2), jnp.array([100.0, 0.01])):

        def density(z, unit=unit):
            return -0.5 * jnp.sum((z / unit) ** 2 + ((x - z / unit) / 0.3) ** 2) - jnp.log(unit).sum()

        results.append(ais.forward(KEY, density, normal(0.1 * unit, 0.8 * unit), betas, 4, 3))
    for field in ("log_weight", "step_size", "acceptance"):
        np.testing.assert_allclose(*(getattr(result, field) for result in results), rtol=1e-3, atol=1e-3, err_msg=field)


@pytest.mark.slow
def test_chains_do_not_choose_their_own_step_size():
    """Two pilots do: however many chains run along, and whatever they meet, the step sizes are the same ones."""
    case = Case(2, 0.3, count=1)

    def density(z):
        return case.method.log_joint(case.state, case.x, z[None])[0]

    start, betas = normal(jnp.zeros(2), jnp.ones(2)), ais.schedule(20)
    few, many = (
        jax.jit(lambda key, chains=chains: ais.forward(key, density, start, betas, chains, 3))(KEY) for chains in (1, 9)
    )
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
    start, betas = normal(jnp.zeros(1), jnp.ones(1)), jnp.array([0.0, 1e-6, 1.0])

    def log_density(z):
        return -0.5 * jnp.sum(jnp.square(z / 0.3))

    moved, still = (
        ais.reverse(KEY, log_density, start, betas, 8, 3, jnp.array([0.2]), jnp.array(sizes)) for sizes in ([0, 0.1], [0.1, 0])
    )
    excess = log_density(jnp.array([0.2])) - start.log_prob(jnp.array([0.2]))
    np.testing.assert_allclose(still, -excess, atol=1e-3)
    assert np.abs(moved + excess).min() > 1e-3


def test_chains_that_diverge_are_counted():
    """A likelihood so sharp that three temperatures cannot adapt to it, and one that is not a number."""
    case, estimator = Case(2, sigma=1e-3, scale=1.0, count=4), AIS(initial="prior", temperatures=3)
    estimate = over(estimator, case.method, case.state, case.x)
    assert estimate.divergent.shape == (4, 16)
    assert estimate.divergent.min() > 0.3
    broken = case.state._replace(params={**case.state.params, "w": jnp.full((784, 2), jnp.nan)})
    estimate = over(estimator, case.method, broken, case.x)
    assert not np.isfinite(estimate.log_likelihood).any()
    assert estimate.divergent.min() == 1


class Notes:
    """What `note_divergence` needs of a subject."""

    def __init__(self):
        self.lines = []
        self.note = self.lines.append


def test_chains_that_diverge_are_noted():
    notes = Notes()
    ais.note_divergence(notes, "ais", np.array([[0.05, 0.1], [0.1, 0.0]]))
    assert notes.lines == []
    ais.note_divergence(notes, "ais", np.array([[0.05, 0.1], [0.2, 0.9]]))
    (line,) = notes.lines
    assert line.startswith("ais: 2 of 4 chains diverged in more than 10% of their transitions")


@pytest.mark.parametrize("estimator", [AIS, BDMC])
def test_settings_out_of_range(estimator):
    for field in ("chains", "temperatures", "leapfrog_steps", "chunk", "images"):
        with pytest.raises(UserError, match=f"{field}=0: must be at least 1"):
            estimator(**{field: 0})
    with pytest.raises(UserError, match="initial='posterior': must be one of encoder, prior"):
        estimator(initial="posterior")
    with pytest.raises(UserError, match="fit_draws=1: must be at least 2"):
        estimator(fit_draws=1)
    with pytest.raises(UserError, match=r"inflation=0\.0: must be positive"):
        estimator(inflation=0.0)


@pytest.mark.parametrize("estimator", [AIS, BDMC])
def test_what_it_needs(estimator):
    assert estimator().lacks(small_method("avb")) == ""
    assert estimator().lacks(small_method("bigan")) == "has no likelihood p(x|z)"
    without_encoder = small_method("avb")._replace(encode=None)
    assert estimator().lacks(without_encoder) == "has no encoder to fit a proposal to; use initial='prior'"
    assert estimator(initial="prior").lacks(without_encoder) == ""
