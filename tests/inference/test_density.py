"""The methods for a density, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy import stats

from avb_jax import Players, Posterior, UserError, inference, networks
from avb_jax.contrast import GaussianContrast, PriorContrast
from avb_jax.inference.density import LEAST, STEEPEST, Density
from tests.inference.densities import gaussian

KEY = jax.random.key(11)


class Bent(nn.Module):
    """A sampler that does not give its moments, of one pair at a time."""

    @nn.compact
    def __call__(self, x, noise):
        assert x.shape == (len(noise), 0)
        return 0.5 * noise + nn.tanh(nn.Dense(2)(noise))


class Blank(nn.Module):
    """Features of an example without numbers, which no dense layer takes in every release of JAX."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.ones((len(x), 3))


@pytest.fixture
def bent():
    """A method for the Gaussian of that sampler and a T that starts off 0, with SGD at rate 1."""
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    return inference.density_method(gaussian, 2, Bent(), adversary, optimizers=optax.sgd(1.0), noise_dim=2, adversary_steps=1)


def test_where_there_is_no_density_nothing_moves():
    def bounded(z):
        inside = jnp.log(jnp.minimum(jnp.maximum(2.0 - z[0], 0.0), 1.0))  # its slope past 2 is NaN
        steep = -jnp.where(z[1] > 3.0, 1e25 * z[1] + 1e20 * z[0], jnp.where(z[1] == 3.0, jnp.sqrt(jnp.abs(z[1] - 3.0)), 0.0))
        return inside + steep + jnp.where(z[0] < -2, jnp.nan, -jnp.sum(z**2))

    of = Density(bounded, 2)
    points = jnp.array([[3.0, 0.0], [0.5, 2.0], [-3.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    values, slopes = jax.vmap(jax.value_and_grad(of.log_prob))(points)
    np.testing.assert_allclose(values, [LEAST, -4.25, LEAST, -9.0, -4e25], rtol=1e-6)
    expected = [[0.0, 0.0], [-1.0, -4.0], [0.0, 0.0], [0.0, 0.0], [-1e-5 * STEEPEST, -STEEPEST]]
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)
    assert of.log_prob(jnp.array([3.0, 0.0])) == np.float32(LEAST)


@pytest.mark.parametrize("contrast", [GaussianContrast(prior_share=0.1), PriorContrast()])
def test_a_contrast_that_draws_from_the_density_is_refused(contrast):
    sampler, adversary = networks.Sampler(2, (4,)), networks.LatentAdversary((4,))
    with pytest.raises(UserError, match=r"contrast=.*: must be a GaussianContrast without a prior_share"):
        inference.density_method(
            lambda z: -jnp.sum(z**2), 2, sampler, adversary, optimizers=optax.sgd(1.0), noise_dim=4, contrast=contrast
        )


def test_a_density_is_a_method(bent):
    """Its joint density is the density, its draws those of the sampler, and its ELBO log p~ - log r - T, by hand."""
    x = jnp.zeros((5, 0))
    state = jax.jit(bent.init)(KEY, x)
    z = jax.random.normal(KEY, (5, 2))
    np.testing.assert_allclose(bent.log_joint(state, x, z), [gaussian(one) for one in z], rtol=1e-6)
    assert bent.sample(KEY, state, 7).shape == (7, 2)
    assert bent.encode(KEY, state, x, 3).z.shape == (3, 5, 2)
    assert (bent.decode, bent.prior, state.params.decoder) == (None, None, None)
    terms, of_t = bent.elbo(KEY, state, x), bent.adversary(KEY, state, x)
    np.testing.assert_array_equal(terms.reconstruction, 0)
    np.testing.assert_allclose(of_t.kl, terms.kl, rtol=1e-6)
    noise_key, r_key = jax.random.split(KEY)
    z = Bent().apply({"params": state.params.encoder}, x, jax.random.normal(noise_key, (5, 2)))
    eight = jax.random.normal(jax.random.key(0), (8, 1, 2))[:, 0]  # the draws behind r's moments
    more = Bent().apply({"params": state.params.encoder}, jnp.zeros((8, 0)), eight)
    mean, std = more.mean(axis=0), more.std(axis=0, ddof=1)
    t, t_of_r = (of_network(state, v) for v in ((z - mean) / std, jax.random.normal(r_key, (5, 2))))
    log_r = stats.norm.logpdf(z, mean, std).sum(axis=1)
    np.testing.assert_allclose(terms.elbo, [gaussian(one) for one in z] - log_r - t, rtol=1e-4)
    np.testing.assert_allclose(of_t.t, t, rtol=1e-4)
    np.testing.assert_allclose(of_t.loss, np.logaddexp(0, -t) + np.logaddexp(0, t_of_r), rtol=1e-4)


def of_network(state, v):
    """T [N] by hand at standardised v [N, 2]: the network's output and |v|^2 / 2."""
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    output = adversary.apply({"params": state.params.adversary}, jnp.zeros((len(v), 0)), v)
    return np.float64(output) + 0.5 * np.square(np.float64(v)).sum(axis=1)


@pytest.mark.slow
def test_a_step_follows_the_bound(bent):
    """The sampler's update is the gradient of the mean bound with T and r's moments held; T's, that of eq. 3.3."""
    x = jnp.zeros((6, 0))
    state = bent.init(KEY, x)
    after, info = jax.jit(bent.train_step)(KEY, state, x)
    noise_key, r_key = jax.random.split(KEY)
    noise, v_of_r = jax.random.normal(noise_key, (6, 2)), jax.random.normal(r_key, (6, 2))
    adversary = networks.InnerProductAdversary(Blank(), networks.MLP((4,)), 3)
    more = Bent().apply(
        {"params": state.params.encoder}, jnp.zeros((8, 0)), jax.random.normal(jax.random.key(0), (8, 1, 2))[:, 0]
    )
    mean, std = more.mean(axis=0), more.std(axis=0, ddof=1)

    def t_of(params, v):
        return adversary.apply({"params": params}, x, v) + 0.5 * jnp.sum(v**2, axis=1)

    def loss(params):
        z = Bent().apply({"params": params}, x, noise)
        log_r = jnp.sum(jax.scipy.stats.norm.logpdf(z, mean, std), axis=1)
        return jnp.mean(t_of(state.params.adversary, (z - mean) / std) + log_r - jax.vmap(gaussian)(z))

    v = (Bent().apply({"params": state.params.encoder}, x, noise) - mean) / std

    def loss_of_t(params):
        return jnp.mean(jax.nn.softplus(-t_of(params, v)) + jax.nn.softplus(t_of(params, v_of_r)))

    np.testing.assert_allclose(-info.elbo.mean(), loss(state.params.encoder), rtol=1e-5)
    np.testing.assert_allclose(info.adversary_loss.mean(), loss_of_t(state.params.adversary), rtol=1e-5)
    gradients = Players(jax.grad(loss)(state.params.encoder), None, jax.grad(loss_of_t)(state.params.adversary))
    expected = jax.tree.map(lambda p, g: p - g, state.params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.params, expected)


@pytest.mark.slow
def test_a_step_of_sivi_follows_its_bound():
    """The gradient of log p~ less the log of the mixture of all draws' conditionals, by hand."""
    sampler = networks.Sampler(2, (4,), gaussian_share=0.2)
    method = inference.semi_implicit_method(gaussian, 2, sampler, optimizers=optax.sgd(1.0), noise_dim=5)
    x = jnp.zeros((6, 0))
    state = method.init(KEY, x)
    after, info = jax.jit(method.train_step)(KEY, state, x)
    noise = jax.random.normal(jax.random.split(KEY)[0], (6, 1, 5))[:, 0]

    def bound(params):
        found = sampler.apply({"params": params}, x, noise)
        mean, std = found.conditional
        log_q = [jax.scipy.stats.norm.logpdf(found.z, mean[k], std[k]).sum(axis=1) for k in range(6)]
        return jax.vmap(gaussian)(found.z) - jax.nn.logsumexp(jnp.stack(log_q), axis=0) + jnp.log(6.0)

    np.testing.assert_allclose(info.elbo, bound(state.params.encoder), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda params: -bound(params).mean())(state.params.encoder)
    expected = jax.tree.map(lambda p, g: p - g, state.params.encoder, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after.params.encoder, expected)
    assert int(after.step) == 1
    np.testing.assert_allclose(method.elbo(KEY, state, x).elbo, info.elbo, rtol=1e-5)
    assert method.sample(KEY, state, 7).shape == (7, 2)
    np.testing.assert_allclose(method.log_joint(state, x, noise[:, :2]), jax.vmap(gaussian)(noise[:, :2]), rtol=1e-6)
    bent = inference.semi_implicit_method(gaussian, 2, Bent(), optimizers=optax.sgd(1.0), noise_dim=2)
    with pytest.raises(UserError, match="is not semi-implicit"):
        bent.train_step(KEY, bent.init(KEY, x), x)


def test_a_step_of_uivi_has_the_gradient_of_log_q():
    """On average that of KL(q, p~) for a linear sampler, whose q is known; the chains begin at their own noise, exactly."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            log_scale = self.param("log_scale", nn.initializers.constant(0.2), ())
            mean, std = jnp.exp(log_scale) * noise[..., 1:], jnp.full(noise[..., 1:].shape, 0.5)
            return Posterior(mean + std * noise[..., :1], conditional=(mean, std))

    options = {"optimizers": optax.sgd(1.0), "noise_dim": 2, "unbiased": True, "burn_in": 20, "step_size": 0.3}
    method = inference.semi_implicit_method(lambda z: -0.5 * jnp.sum(z**2), 1, Linear(), **options)
    x = jnp.zeros((20_000, 0))
    state = method.init(KEY, x)
    after, info = jax.jit(method.train_step)(KEY, state, x)
    variance = np.exp(0.4) + 0.25
    # d/d log_scale of 0.5 E z^2 - 0.5 log(variance)
    expected = np.exp(0.4) * (1 - 1 / variance)
    step = float(state.params.encoder["log_scale"] - after.params.encoder["log_scale"])
    assert abs(step - expected) < 0.06
    assert method.name == "uivi"
    assert np.isfinite(info.elbo).all()
