"""Codes under a condition: chains against the closed form of a linear Gaussian decoder, and what conditions are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avb_jax
from avb_jax import Posterior, UserError, conditional, distributions, models, networks
from avb_jax.data import from_arrays
from avb_jax.figures import conditional as figures
from avb_jax.method import Method
from tests.conftest import small_method

W = jnp.array([[1.0, 0.5, -0.3, 0.8], [0.2, -1.0, 0.7, 0.4]])  # x = z W + 0.5 n
STD = 0.5
PRIOR = distributions.normal(jnp.array([0.3, -0.2]), jnp.array([1.0, 1.5]))


def linear(likelihood=None):
    """p(x|z) = N(z W, 0.5^2), which has no params."""
    likelihood = likelihood or distributions.gaussian(STD)

    def decode(state, z):
        del state
        return likelihood((z @ W)[..., None])

    return Method("linear", None, None, None, PRIOR, decode=decode)


def given_the_half():
    """Mean and covariance of z given that the first two of four numbers are 1.2 and 0.4."""
    seen = np.asarray(W[:, :2])
    covariance = np.linalg.inv(np.diag([1.0, 1 / 1.5**2]) + seen @ seen.T / STD**2)
    return covariance @ (np.array([0.3, -0.2 / 1.5**2]) + seen @ np.array([1.2, 0.4]) / STD**2), covariance


@pytest.mark.parametrize("leapfrog_steps", [1, 8])
@pytest.mark.slow
def test_a_known_part_against_the_closed_form(leapfrog_steps):
    """The posterior of z given two of four numbers, its mean and covariance; the others are not looked at."""
    x, mask = jnp.array([1.2, 0.4, 50.0, -50.0]), jnp.array([1.0, 1.0, 0.0, 0.0])
    found = conditional.sample(
        jax.random.key(0),
        linear(),
        None,
        conditional.known(x, mask),
        count=2000,
        steps=300 if leapfrog_steps == 1 else 100,
        leapfrog_steps=leapfrog_steps,
        acceptance=0.6 if leapfrog_steps == 1 else 0.8,
    )
    mean, covariance = given_the_half()
    error = np.sqrt(np.diag(covariance) / 2000)
    assert np.all(np.abs(found.z.mean(axis=0) - mean) < 4 * error)
    np.testing.assert_allclose(np.cov(found.z.T), covariance, atol=0.12 * covariance.max())
    assert abs(found.acceptance.mean() - (0.6 if leapfrog_steps == 1 else 0.8)) < 0.12
    by_hand = distributions.normal(found.z @ W[:, :2], jnp.full(2, STD)).log_prob(x[:2])
    np.testing.assert_allclose(found.log_condition, by_hand, rtol=1e-3, atol=1e-3)


def test_the_encoder_asked_with_a_half_against_the_closed_form():
    """Alternating with the posterior of the whole as the encoder settles to the posterior given the half."""
    precision = jnp.diag(jnp.array([1.0, 1 / 1.5**2])) + W @ W.T / STD**2

    def encode(key, state, x, draws=None):
        del state, draws
        mean = (PRIOR.mean / PRIOR.variance + x @ W.T / STD**2) @ jnp.linalg.inv(precision)
        return Posterior(jax.random.multivariate_normal(key, mean, jnp.linalg.inv(precision)))

    method = linear()._replace(encode=encode)
    x, mask = jnp.array([1.2, 0.4, 50.0, -50.0]), jnp.array([1.0, 1.0, 0.0, 0.0])
    z = conditional.by_encoder(jax.random.key(0), method, None, x, mask, count=4000, rounds=60)
    mean, covariance = given_the_half()
    assert np.all(np.abs(z.mean(axis=0) - mean) < 4 * np.sqrt(np.diag(covariance) / 4000))
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.12 * covariance.max())
    with pytest.raises(UserError, match="'linear': has no encoder and decoder to alternate between"):
        conditional.by_encoder(jax.random.key(0), linear(), None, x, mask)


def test_what_is_not_known_may_be_no_number():
    """It has no part in the condition, nor in its gradient."""
    mask = jnp.array([1.0, 1.0, 0.0, 0.0])
    for likelihood in (distributions.gaussian(STD), distributions.bernoulli):
        method = linear(likelihood)

        def condition(z, rest, method=method):
            log_condition = conditional.known(jnp.array([1.0, 0.0, rest, rest]), mask)
            return log_condition(method.decode(None, z[None]))

        of = jax.value_and_grad(condition)
        np.testing.assert_array_equal(np.hstack(of(jnp.ones(2), jnp.nan)), np.hstack(of(jnp.ones(2), 0.3)))


def test_without_a_condition_draws_are_the_prior_s():
    found = conditional.sample(jax.random.key(0), linear(), None, lambda of_x: jnp.zeros(()), count=2000, steps=60)
    np.testing.assert_allclose(found.z.mean(axis=0), PRIOR.mean, atol=4 * 1.5 / np.sqrt(2000))
    np.testing.assert_allclose(found.z.std(axis=0), (1.0, 1.5), rtol=0.07)


@pytest.mark.slow
def test_a_class_is_asked_of_the_mean_image():
    """A classifier that is sure of one class where the first number is positive: draws lie there."""

    def log_probabilities(x):
        return jax.nn.log_softmax(jnp.stack([60.0 * x[:, 0], jnp.zeros(len(x))], axis=-1))

    for label, sign in ((0, 1), (1, -1)):
        condition = conditional.of_class(log_probabilities, label)
        found = conditional.sample(jax.random.key(0), linear(), None, condition, count=200, steps=60)
        assert np.mean(sign * (found.z @ W)[:, 0] > 0) > 0.97


def test_slips_are_named():
    condition = conditional.known(jnp.zeros(4), jnp.ones(4))
    for settings, message in (
        ({"count": 0}, "count=0: must be at least 1"),
        ({"steps": 1}, "steps=1: must be at least 2"),
        ({"acceptance": 1.0}, r"acceptance=1\.0: must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            conditional.sample(jax.random.key(0), linear(), None, condition, **settings)
    with pytest.raises(UserError, match="'linear': has no codes to draw"):
        conditional.sample(jax.random.key(0), linear()._replace(decode=None), None, condition)
    uniform = avb_jax.distributions.dist.Uniform(jnp.zeros(2), 1.0).to_event(1)
    with pytest.raises(UserError, match="'linear': has a prior that does not cover all vectors"):
        conditional.sample(jax.random.key(0), linear()._replace(prior=uniform), None, condition)
    whole = lambda output: avb_jax.distributions.dist.MultivariateNormal(output[..., 0], jnp.eye(4))  # noqa: E731
    with pytest.raises(UserError, match="pixels of MultivariateNormal are not independent given z"):
        conditional.sample(jax.random.key(0), linear(whole), None, condition)
    net = networks.GatedPixelCNN((2, 2), 1, channels=2, layers=1, kernel_size=3)
    of_pixels = models.Autoregressive(net, distributions.bernoulli, jnp.zeros((1, 2, 2, 0)), {})
    with pytest.raises(UserError, match="of_class: Autoregressive has no mean to show to a classifier"):
        conditional.of_class(lambda x: x, 0)(of_pixels)


@pytest.fixture
def halves(monkeypatch):
    """Images whose class is which half is white, with labels; and short figures."""
    monkeypatch.setattr(figures, "DRAWS", 2)
    monkeypatch.setattr(figures, "BY_ENCODER", 1)
    monkeypatch.setattr(figures, "ROWS", 3)
    x = np.zeros((40, 6, 6), np.float32)
    x[::2, :, :3], x[1::2, :, 3:] = 1.0, 1.0
    return from_arrays(x, x[:6])._replace(train_labels=np.arange(40) % 2, test_labels=np.arange(6) % 2)


def test_a_classifier_is_trained_on_the_spot(halves):
    log_probabilities = figures.classifier(jax.random.key(0), halves, steps=200)
    found = log_probabilities(jnp.asarray(halves.test))
    np.testing.assert_array_equal(found.argmax(axis=1), halves.test_labels)
    np.testing.assert_allclose(jnp.exp(found).sum(axis=1), 1.0, rtol=1e-5)
    with pytest.raises(UserError, match="'conditional': arrays has no labels"):
        figures.classifier(jax.random.key(0), halves._replace(train_labels=None))


@pytest.mark.slow
def test_the_figures(halves):
    """Rows of a class; and of an image, its left half, draws that keep it, the encoder's, and the whole as reconstructed."""
    method = small_method("avb")
    state = method.init(jax.random.key(0), jnp.asarray(halves.train))
    grid = figures.of_classes(jax.random.key(0), method, state, halves)
    assert (grid.images.shape, grid.columns) == ((4, 6, 6), 2)
    grid = figures.inpainting(jax.random.key(0), method, state, halves)
    assert (grid.images.shape, grid.columns) == ((18, 6, 6), 6)
    rows = grid.images.reshape(3, 6, 6, 6)
    np.testing.assert_array_equal(rows[:, 0], halves.test[:3])
    np.testing.assert_array_equal(rows[:, 1:5, :, :3], np.broadcast_to(halves.test[:3, None, :, :3], (3, 4, 6, 3)))
    np.testing.assert_array_equal(rows[:, 1, :, 3:], 0.5)
    alone = figures.inpainting(jax.random.key(0), method._replace(encode=None), state, halves)
    assert alone.columns == 4
