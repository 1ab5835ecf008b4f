"""Shapes and numbers of the pure functions, with jit, without, and under pmap (`pytest -k chex`)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from absl.testing import parameterized

from avb_jax import Bernoulli, Gaussian, Players, StandardNormal, objectives, players
from avb_jax.data import to_pixels
from avb_jax.distributions import DiscretizedLogistic, normal_kl
from avb_jax.methods import METHODS
from avb_jax.networks.conv import conv, conv_transpose
from tests.conftest import small_model

ALL = {"with_jit": True, "without_jit": True, "with_pmap": True}
B, Z = 8, 3


def setup(method="avb", **options):
    """Model, optimisers, state and images for a method."""
    model, optimizers = small_model(method, **options), Players(*[optax.sgd(0.1)] * 3)
    x = jax.random.uniform(jax.random.key(7), (B, 6, 6))
    return model, optimizers, METHODS[method].init(jax.random.key(0), model, optimizers, x), x


class DistributionsTest(chex.TestCase):
    """Distributions against scipy's."""

    @chex.variants(**ALL)
    def test_standard_normal(self):
        z = jax.random.normal(jax.random.key(0), (B, Z))
        log_prob = self.variant(StandardNormal(Z).log_prob)(z)
        chex.assert_shape(log_prob, (B,))
        np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(np.asarray(z)).sum(-1), rtol=1e-5)

    @chex.variants(**ALL)
    def test_bernoulli(self):
        logits, x = jax.random.normal(jax.random.key(0), (B, 2, 5, 1)), jnp.ones((B, 2, 5)).at[:, 0].set(0.0)
        log_prob = self.variant(Bernoulli().log_prob)(logits, x)
        p = 1 / (1 + np.exp(-np.asarray(logits[..., 0], np.float64)))
        np.testing.assert_allclose(log_prob, scipy.stats.bernoulli.logpmf(x, p).sum((1, 2)), rtol=1e-5)

    @chex.variants(**ALL)
    def test_discretized_logistic(self):
        likelihood = DiscretizedLogistic()
        output = jax.random.normal(jax.random.key(0), (B, 2, 5, 2)) * jnp.array([0.4, 2.0]) + jnp.array([0.5, 0.0])
        x = jnp.round(jax.random.uniform(jax.random.key(1), (B, 2, 5)) * 255) / 255
        x = x.at[:, 0, 0].set(0.0).at[:, 0, 1].set(1.0)
        log_prob = self.variant(likelihood.log_prob)(output, x)
        mean, raw = np.moveaxis(np.asarray(output, np.float64), -1, 0)
        scale = np.exp(np.log(0.002) + np.log(250.0) / (1 + np.exp(-raw)))
        upper, lower = np.where(x > 0.999, np.inf, x + 0.5 / 255), np.where(x < 0.001, -np.inf, x - 0.5 / 255)
        # The survival function where both ends lie above the mean, so that their difference is not lost.
        cdf, sf = (getattr(scipy.stats.logistic, f) for f in ("cdf", "sf"))
        below = cdf(upper, mean, scale) - cdf(lower, mean, scale)
        above = sf(lower, mean, scale) - sf(upper, mean, scale)
        expected = np.log(np.where(lower > mean, above, below)).sum((1, 2))
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4)

    def test_discretized_logistic_sums_to_one(self):
        likelihood = DiscretizedLogistic(levels=8)
        output = jnp.array([[0.3, 1.0], [-0.5, -2.0], [1.4, 3.0]]).reshape(3, 1, 2)
        levels = jnp.arange(8)[:, None, None] / 7.0
        log_prob = jax.vmap(lambda x: likelihood.log_prob(output, jnp.broadcast_to(x, (3, 1))))(levels)
        np.testing.assert_allclose(jnp.exp(log_prob).sum(axis=0), 1.0, rtol=1e-5)
        samples = likelihood.sample(jax.random.key(0), jnp.broadcast_to(output[:1], (20_000, 1, 2)))
        counts = np.array([np.mean(np.isclose(samples, level)) for level in levels.ravel()])
        np.testing.assert_allclose(counts, jnp.exp(log_prob[:, 0]), atol=0.015)

    def test_discretized_logistic_is_finite_far_out(self):
        likelihood = DiscretizedLogistic()
        output = jnp.array([[50.0, -50.0], [-50.0, -50.0], [0.5, -50.0]]).reshape(3, 1, 2)
        value, gradient = jax.value_and_grad(lambda o: likelihood.log_prob(o, jnp.array([[0.0], [0.5], [1.0]])).sum())(output)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()

    @chex.variants(**ALL)
    @parameterized.parameters(0.3, None)
    def test_gaussian(self, std):
        likelihood = Gaussian(std)
        output = jax.random.normal(jax.random.key(0), (B, 2, 5, likelihood.parameters))
        x = jax.random.uniform(jax.random.key(1), (B, 2, 5))
        log_prob = self.variant(likelihood.log_prob)(output, x)
        mean = np.asarray(output[..., 0], np.float64)
        if std is None:  # log std = log 0.01 + (log 1 - log 0.01) sigmoid(raw), which lies in (0.01, 1)
            std = np.exp(np.log(0.01) + np.log(100.0) / (1 + np.exp(-np.asarray(output[..., 1], np.float64))))
        np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(x, mean, std).sum((1, 2)), rtol=1e-4)

    @parameterized.parameters(Bernoulli(), Gaussian(0.3), Gaussian(), DiscretizedLogistic(levels=4))
    def test_samples_are_from_the_distribution_that_is_scored(self, likelihood):
        """The score, the gradient of log p in the output, has a mean of 0 over samples, and not over others."""
        output = jnp.array([[0.4, 0.3], [0.7, -0.5]])[:, : likelihood.parameters]
        many = jnp.broadcast_to(output, (50_000, *output.shape))
        score = jax.grad(lambda output, x: likelihood.log_prob(output, x).sum())
        for shift, matches in ((0.0, True), (0.2, False)):
            scores = score(many, likelihood.sample(jax.random.key(1), many + shift))
            error = scores.std(axis=0) / np.sqrt(len(scores))
            assert bool((jnp.abs(scores.mean(axis=0)) < 4 * error).all()) == matches
        # The mean image is the samples' mean; a logistic that is cut off at 0 and 1 has another.
        if not isinstance(likelihood, DiscretizedLogistic):
            samples = likelihood.sample(jax.random.key(2), many)
            error = samples.std(axis=0) / np.sqrt(len(samples))
            np.testing.assert_array_less(abs(samples.mean(axis=0) - likelihood.mean(output[None])[0]), 4 * error)

    @chex.variants(**ALL)
    def test_normal_kl_by_hand(self):
        # KL(N(1, 4), N(0, 1)) = (1 + 4 - 1 - log 4) / 2 = 2 - log 2, twice for two latents.
        kl = self.variant(normal_kl)(jnp.ones((B, 2)), 2 * jnp.ones((B, 2)))
        np.testing.assert_allclose(kl, np.full(B, 2 * (2 - np.log(2))), rtol=1e-6)

    @chex.variants(**ALL)
    def test_pixels(self):
        images = jnp.array([[0, 127, 128, 255]], jnp.uint8)
        pixels = self.variant(lambda x: to_pixels(jax.random.key(0), x, "none"))(images)
        np.testing.assert_allclose(pixels, np.array([[0, 127, 128, 255]]) / 255, rtol=1e-6)
        cut = self.variant(lambda x: to_pixels(jax.random.key(0), x, "threshold"))(images)
        np.testing.assert_array_equal(cut, [[0, 0, 1, 1]])
        many = jnp.full((10_000, 1), 51, jnp.uint8)  # an intensity of one fifth
        drawn = self.variant(lambda x: to_pixels(jax.random.key(0), x, "dynamic"))(many)
        assert set(np.unique(drawn)) == {0.0, 1.0}
        np.testing.assert_allclose(drawn.mean(), 0.2, atol=4 * np.sqrt(0.2 * 0.8 / 10_000))


class ObjectivesTest(chex.TestCase):
    """Losses and steps."""

    @chex.variants(**ALL)
    @parameterized.product(batch_norm=[False, True], method=["avb", "vae"])
    def test_step(self, batch_norm, method):
        model, optimizers, state, x = setup(method, batch_norm=batch_norm, ema_decay=0.9)
        step = functools.partial(METHODS[method].train_step, jax.random.key(1), model=model, optimizers=optimizers)
        after, info = self.variant(step)(state, x)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(jnp.asarray, after), state)
        chex.assert_tree_all_finite((after, info))
        chex.assert_shape((info.elbo, info.reconstruction, info.kl), (B,))
        np.testing.assert_allclose(info.elbo, -info.reconstruction - info.kl, rtol=1e-5)
        assert (info.adversary_loss is None) == (method == "vae")
        assert int(after.step) == 1

    @chex.variants(**ALL)
    def test_adversary_loss(self):
        model, _, state, x = setup()
        draws = players.draw(jax.random.key(1), model, x)
        loss_of = self.variant(lambda s, d, z: objectives.adversary_loss(s.adversary, Players({}, {}, {}), d, z, model=model))
        loss, (said, _) = loss_of(state.params, draws, draws.z_prior)
        t = model.networks.adversary.apply({"params": state.params.adversary}, x, draws.z_prior[0])
        # With both z alike, softplus(-T) + softplus(T), and T is right about exactly one of each pair.
        np.testing.assert_allclose(said.loss, np.logaddexp(0, -t) + np.logaddexp(0, t), rtol=1e-4)
        np.testing.assert_allclose(said.accuracy, 0.5)
        np.testing.assert_allclose(loss, said.loss.mean(), rtol=1e-5)

    @chex.variants(**ALL)
    @parameterized.parameters("avb", "vae")
    def test_sample_and_reconstruct(self, method):
        model, _, state, x = setup(method)
        functions = METHODS[method]
        samples = self.variant(lambda s: functions.sample(jax.random.key(0), s, model, 5))(state)
        chex.assert_shape(samples, (5, 6, 6))
        again = self.variant(lambda s, x: functions.reconstruct(jax.random.key(0), s, model, x))(state, x)
        chex.assert_shape(again, (B, 6, 6))
        assert ((samples > 0) & (samples < 1)).all()
        assert ((again > 0) & (again < 1)).all()
        terms = self.variant(lambda s, x: functions.elbo_terms(jax.random.key(0), s, x, model=model))(state, x)
        chex.assert_shape((terms.kl, terms.reconstruction), (B,))


class ConvTest(chex.TestCase):
    """The two formulations of a convolution are one function, gradients too."""

    @chex.variants(with_jit=True)
    @parameterized.product(name=["conv", "conv_transpose"], size=[(7, 4), (8, 8)], kernel=[1, 2, 3, 5], stride=[1, 2, 3])
    def test_formulations_agree(self, name, size, kernel, stride):
        function = {"conv": conv, "conv_transpose": conv_transpose}[name]
        x = jax.random.normal(jax.random.key(0), (2, *size, 3))
        w = jax.random.normal(jax.random.key(1), (kernel, kernel, 3, 4))

        def value_and_gradients(formulation):
            def loss(x, w):
                y = function(x, w, stride, formulation)
                return jnp.sum(jnp.sin(y)), y

            return self.variant(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)

        chex.assert_trees_all_close(value_and_gradients("lax"), value_and_gradients("matmul"), rtol=1e-4, atol=1e-4)
