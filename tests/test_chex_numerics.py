"""Shapes and numbers of the pure functions, with jit, without, and under pmap (`pytest -k chex`)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from absl.testing import parameterized

from avb_jax import Players, UserError, contrast, distributions
from avb_jax.data import to_pixels
from avb_jax.distributions import DiscretizedLogistic, bernoulli, deterministic, discretized_logistic, gaussian
from avb_jax.methods import avb
from avb_jax.networks import onednn
from avb_jax.networks.conv import conv, conv_transpose
from avb_jax.players import draw
from tests.conftest import small_method, small_networks

ALL = {"with_jit": True, "without_jit": True, "with_pmap": True}
B, Z = 8, 3
IMAGES = jax.random.uniform(jax.random.key(7), (B, 6, 6))


def log_prob(likelihood):
    """The function (output, x) -> log p(x|z)."""
    return lambda output, x: likelihood(output).log_prob(x)


class DistributionsTest(chex.TestCase):
    """Distributions against scipy's."""

    @chex.variants(**ALL)
    def test_priors(self):
        z = jax.random.normal(jax.random.key(0), (B, Z))
        found = self.variant(distributions.standard_normal(Z).log_prob)(z)
        chex.assert_shape(found, (B,))
        np.testing.assert_allclose(found, scipy.stats.norm.logpdf(np.asarray(z)).sum(-1), rtol=1e-5)
        mean, std = jnp.arange(3.0), jnp.array([0.5, 1.0, 2.0])
        found = self.variant(lambda z: distributions.normal(mean, std).log_prob(z))(z)
        np.testing.assert_allclose(found, scipy.stats.norm.logpdf(np.asarray(z), mean, std).sum(-1), rtol=1e-5)

    @chex.variants(**ALL)
    def test_bernoulli(self):
        """Also between 0 and 1, where it is the expected log-likelihood of a binary image; and far out."""
        logits = jax.random.normal(jax.random.key(0), (B, 2, 5, 1))
        p = 1 / (1 + np.exp(-np.asarray(logits[..., 0], np.float64)))
        for x in (jnp.ones((B, 2, 5)).at[:, 0].set(0.0), jax.random.uniform(jax.random.key(1), (B, 2, 5))):
            found = self.variant(log_prob(bernoulli))(logits, x)
            chex.assert_shape(found, (B,))
            np.testing.assert_allclose(found, (x * np.log(p) + (1 - x) * np.log1p(-p)).sum((1, 2)), rtol=1e-5)
        far = jnp.array([[[-200.0], [200.0]]])
        np.testing.assert_allclose(self.variant(log_prob(bernoulli))(jnp.tile(far, (B, 1, 1)), jnp.ones((B, 2))), -200.0)

    @chex.variants(**ALL)
    def test_discretized_logistic(self):
        output = jax.random.normal(jax.random.key(0), (B, 2, 5, 2)) * jnp.array([0.4, 2.0]) + jnp.array([0.5, 0.0])
        x = jnp.round(jax.random.uniform(jax.random.key(1), (B, 2, 5)) * 255) / 255
        x = x.at[:, 0, 0].set(0.0).at[:, 0, 1].set(1.0)
        found = self.variant(log_prob(discretized_logistic()))(output, x)
        mean, raw = np.moveaxis(np.asarray(output, np.float64), -1, 0)
        scale = np.exp(np.log(0.002) + np.log(250.0) / (1 + np.exp(-raw)))
        upper, lower = np.where(x > 0.999, np.inf, x + 0.5 / 255), np.where(x < 0.001, -np.inf, x - 0.5 / 255)
        # The survival function where both ends lie above the mean, so that their difference is not lost.
        cdf, sf = (getattr(scipy.stats.logistic, f) for f in ("cdf", "sf"))
        below = cdf(upper, mean, scale) - cdf(lower, mean, scale)
        above = sf(lower, mean, scale) - sf(upper, mean, scale)
        expected = np.log(np.where(lower > mean, above, below)).sum((1, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_discretized_logistic_sums_to_one(self):
        likelihood = discretized_logistic(levels=8)
        output = jnp.array([[0.3, 1.0], [-0.5, -2.0], [1.4, 3.0]]).reshape(3, 1, 2)
        levels = jnp.arange(8)[:, None, None] / 7.0
        found = jax.vmap(lambda x: likelihood(output).log_prob(jnp.broadcast_to(x, (3, 1))))(levels)
        np.testing.assert_allclose(jnp.exp(found).sum(axis=0), 1.0, rtol=1e-5)
        samples = likelihood(jnp.broadcast_to(output[:1], (20_000, 1, 2))).sample(jax.random.key(0))
        counts = np.array([np.mean(np.isclose(samples, level)) for level in levels.ravel()])
        np.testing.assert_allclose(counts, jnp.exp(found[:, 0]), atol=0.015)
        many = DiscretizedLogistic(jnp.array([0.2, 0.9]), jnp.array(0.1), 5).sample(jax.random.key(1), (3, 4))
        chex.assert_shape(many, (3, 4, 2))
        np.testing.assert_allclose(many * 4, np.round(many * 4), atol=1e-6)

    def test_discretized_logistic_is_finite_far_out(self):
        output = jnp.array([[50.0, -50.0], [-50.0, -50.0], [0.5, -50.0]]).reshape(3, 1, 2)
        x = jnp.array([[0.0], [0.5], [1.0]])
        value, gradient = jax.value_and_grad(lambda o: discretized_logistic()(o).log_prob(x).sum())(output)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()

    @chex.variants(**ALL)
    @parameterized.parameters(0.3, None)
    def test_gaussian(self, std):
        output = jax.random.normal(jax.random.key(0), (B, 2, 5, 2 if std is None else 1))
        x = jax.random.uniform(jax.random.key(1), (B, 2, 5))
        found = self.variant(log_prob(gaussian(std)))(output, x)
        mean = np.asarray(output[..., 0], np.float64)
        if std is None:  # log std = log 0.01 + (log 1 - log 0.01) sigmoid(raw), which lies in (0.01, 1)
            std = np.exp(np.log(0.01) + np.log(100.0) / (1 + np.exp(-np.asarray(output[..., 1], np.float64))))
        np.testing.assert_allclose(found, scipy.stats.norm.logpdf(x, mean, std).sum((1, 2)), rtol=1e-4)

    @parameterized.parameters((bernoulli, 1), (gaussian(0.3), 1), (gaussian(), 2), (discretized_logistic(levels=4), 2))
    def test_samples_are_from_the_distribution_that_is_scored(self, likelihood, parameters):
        """The score, the gradient of log p in the output, has a mean of 0 over samples, and not over others."""
        output = jnp.array([[0.4, 0.3], [0.7, -0.5]])[:, :parameters]
        many = jnp.broadcast_to(output, (50_000, *output.shape))
        score = jax.grad(lambda output, x: likelihood(output).log_prob(x).sum())
        for shift, matches in ((0.0, True), (0.2, False)):
            scores = score(many, likelihood(many + shift).sample(jax.random.key(1)))
            error = scores.std(axis=0) / np.sqrt(len(scores))
            assert bool((jnp.abs(scores.mean(axis=0)) < 4 * error).all()) == matches
        # The mean image is the samples' mean; a logistic that is cut off at 0 and 1 has another.
        samples = likelihood(many).sample(jax.random.key(2))
        if parameters == 1 or not np.isin(samples * 3, np.arange(4)).all():
            error = samples.std(axis=0) / np.sqrt(len(samples))
            np.testing.assert_array_less(abs(samples.mean(axis=0) - likelihood(output[None]).mean[0]), 4 * error)
        else:
            np.testing.assert_array_equal(likelihood(output[None]).mean[0], output[:, 0])

    @chex.variants(**ALL)
    def test_a_deterministic_image_is_the_sigmoid(self):
        logits = jax.random.normal(jax.random.key(0), (B, 2, 5, 1))
        found = self.variant(lambda output: deterministic(output).mean)(logits)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[..., 0])), rtol=1e-5)

    @parameterized.parameters(
        (lambda: gaussian(0.0), "std=0.0: must be a positive number, or None"),
        (lambda: gaussian(min_std=1.0), "min_std=1.0, max_std=1.0: need 0 < min_std < max_std"),
        (lambda: discretized_logistic(levels=1), "levels=1, .*: need at least 2 levels"),
        (lambda: discretized_logistic(max_scale=0.001), "max_scale=0.001: need at least 2 levels and 0 < min_scale"),
        (lambda: gaussian(0.3)(jnp.zeros((4, 2, 2))), r"returned shape \(4, 2, 2\); the gaussian likelihood needs .*, 1\]"),
        (lambda: gaussian()(jnp.zeros((4, 2, 1))), r"needs \[B, \*x, 2\], 2 number"),
        (lambda: bernoulli(jnp.zeros(1)), r"returned shape \(1,\)"),
    )
    def test_slips_are_named(self, make, message):
        with pytest.raises(UserError, match=message):
            make()

    @chex.variants(**ALL)
    def test_kl_by_hand(self):
        # KL(N(1, 4), N(0, 1)) = (1 + 4 - 1 - log 4) / 2 = 2 - log 2, twice for two latents.
        def kl(mean, std):
            return distributions.kl_divergence(distributions.normal(mean, std), distributions.standard_normal(2))

        found = self.variant(kl)(jnp.ones((B, 2)), 2 * jnp.ones((B, 2)))
        np.testing.assert_allclose(found, np.full(B, 2 * (2 - np.log(2))), rtol=1e-6)

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
        counts = self.variant(lambda x: to_pixels(jax.random.key(0), x, "none"))(jnp.array([[-3.0, 7.5]]))
        np.testing.assert_array_equal(counts, [[-3.0, 7.5]])


class MethodsTest(chex.TestCase):
    """Losses and steps."""

    @chex.variants(**ALL)
    @parameterized.parameters("avb", "vae")
    def test_step(self, name):
        method = small_method(name, batch_norm=True, ema_decay=0.9, optimizers=optax.sgd(0.1))
        state = method.init(jax.random.key(0), IMAGES)
        after, info = self.variant(lambda state, x: method.train_step(jax.random.key(1), state, x))(state, IMAGES)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.map(jnp.asarray, after), state)
        chex.assert_tree_all_finite((after, info))
        chex.assert_shape((info.elbo, info.reconstruction, info.kl), (B,))
        np.testing.assert_allclose(info.elbo, -info.reconstruction - info.kl, rtol=1e-5)
        assert int(after.step) == 1

    @chex.variants(**ALL)
    def test_adversary_loss(self):
        networks, state = small_networks("avb"), small_method("avb").init(jax.random.key(0), IMAGES)
        prior = distributions.standard_normal(Z)
        draws = draw(jax.random.key(1), IMAGES, prior, Z)

        def loss_of(adversary, draws):
            collections = Players({}, {}, {})
            alike = contrast.Compared(jnp.stack([draws.z_prior, draws.z_prior]))
            return avb.adversary_loss(adversary, collections, draws, alike, networks=networks, prior=prior)

        loss, (terms, _) = self.variant(loss_of)(state.params.adversary, draws)
        t, _ = networks.adversary.apply({"params": state.params.adversary}, IMAGES, draws.z_prior, train=False)
        # With both z alike, softplus(-T) + softplus(T), and T is right about exactly one of each pair.
        np.testing.assert_allclose(terms.loss, np.logaddexp(0, -t[0]) + np.logaddexp(0, t[0]), rtol=1e-4)
        np.testing.assert_allclose(terms.accuracy, 0.5)
        np.testing.assert_allclose(loss, terms.loss.mean(), rtol=1e-5)

    @chex.variants(**ALL)
    def test_what_evaluates(self):
        method, key = small_method("avb"), jax.random.key(0)
        state = method.init(key, IMAGES)
        samples = self.variant(lambda state: method.sample(key, state, 5))(state)
        chex.assert_shape(samples, (5, 6, 6))
        again = self.variant(lambda state, x: method.decode(state, method.encode(key, state, x).z).mean)(state, IMAGES)
        chex.assert_shape(again, (B, 6, 6))
        for images in (samples, again):
            assert ((images > 0) & (images < 1)).all()
        terms = self.variant(lambda state, x: method.elbo(key, state, x))(state, IMAGES)
        chex.assert_shape((terms.kl, terms.reconstruction, terms.elbo), (B,))


class ConvTest(chex.TestCase):
    """The formulations of a convolution are one function, gradients too."""

    @chex.variants(with_jit=True)
    @parameterized.product(name=["conv", "conv_transpose"], kernel=[1, 2, 3, 5], stride=[1, 2, 3])
    def test_formulations_agree(self, name, kernel, stride):
        function = {"conv": conv, "conv_transpose": conv_transpose}[name]
        size = (7, 4) if (kernel + stride) % 2 else (8, 8)
        x = jax.random.normal(jax.random.key(0), (2, *size, 3))
        w = jax.random.normal(jax.random.key(1), (kernel, kernel, 3, 4))

        def value_and_gradients(formulation):
            def loss(x, w):
                y = function(x, w, stride, formulation)
                return jnp.sum(jnp.sin(y)), y

            return self.variant(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)

        expected = value_and_gradients("lax")
        for formulation in ("rows", "patches", *(["onednn"] if onednn.available() else [])):
            chex.assert_trees_all_close(expected, value_and_gradients(formulation), rtol=1e-4, atol=1e-4)
