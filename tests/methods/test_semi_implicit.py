"""SIVI, UIVI and IWHVI on a semi-implicit q whose density, KL and gradients are known: z = m x + c + a u + exp(log_s) n."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import avb_jax
from avb_jax import Posterior, UserError, distributions, networks
from avb_jax.semi_implicit import log_conditional
from tests.conftest import small_method
from tests.gaussian import POINTS, PRIOR, SIGMA, LinearDecoder, log_normal, params_of_q

A = (0.9, -0.6)
SETTINGS = {"prior": PRIOR, "likelihood": distributions.gaussian(SIGMA), "optimizers": optax.sgd(1.0), "noise_dim": 4}


class LinearSemiImplicit(nn.Module):
    """Elementwise in x and in u, both [2]: q(z|x) = N(m x + c, diag(a^2 + s^2)). Noise is n, then u."""

    shares_x, semi_implicit = True, True

    @nn.compact
    def __call__(self, x, noise):
        m, c, log_s = params_of_q(self)
        a = self.param("a", lambda key, shape: jnp.array(A), (2,))
        mean = m * x + c + a * noise[..., 2:]
        std = jnp.broadcast_to(jnp.exp(log_s), mean.shape)
        return Posterior(mean + std * noise[..., :2], conditional=(mean, std))


class Reverse(nn.Module):
    """The exact posterior of the noise given z: of u, a Gaussian; of n, which z's conditional has integrated out, the prior."""

    exact: bool = True

    @nn.compact
    def __call__(self, x, z):
        m, c, log_s = params_of_q(self)
        a, variance = jnp.array(A), jnp.exp(2 * log_s)
        of_u = a * (z - m * x - c) / (a**2 + variance), jnp.sqrt(variance / (a**2 + variance))
        shift = 0.0 if self.exact else 0.7
        mean = jnp.concatenate([jnp.zeros_like(z), of_u[0] + shift], axis=-1)
        return mean, jnp.broadcast_to(jnp.concatenate([jnp.ones(2), of_u[1]]), mean.shape)


def analytic(params, x):
    """The negative ELBO [B] in closed form."""
    p, w = params.encoder, params.decoder["w"]
    mean, variance = p["m"] * x + p["c"], p["a"] ** 2 + jnp.exp(2 * p["log_s"])
    square = (x - w * mean) ** 2 + w**2 * variance
    reconstruction = jnp.sum(0.5 * square / SIGMA**2 + jnp.log(SIGMA) + 0.5 * jnp.log(2 * jnp.pi), axis=-1)
    return reconstruction + jnp.sum(0.5 * (mean**2 + variance - 1.0 - jnp.log(variance)), axis=-1)


def estimates(method, repeats, keys=40):
    """Negative ELBOs [keys, 4], and gradients stacked over keys, of the four points each many times in a batch."""
    x = jnp.repeat(POINTS, repeats, axis=0)
    state = method.init(jax.random.key(0), x)

    @jax.jit
    def one(key):
        after, info = method.train_step(key, state, x)
        return -info.elbo.reshape(4, -1).mean(axis=1), jax.tree.map(jnp.subtract, state.params, after.params)

    values, gradients = jax.lax.map(one, jax.random.split(jax.random.key(1), keys))
    return state.params, values, gradients


def assert_mean(found, expected, sigmas=4.5):
    error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - expected), sigmas * error + 1e-6)


def of_encoder_and_decoder(params):
    return {**params.encoder, **params.decoder}


@pytest.mark.slow
def test_uivi_has_the_gradient_of_the_elbo_and_observes_no_less_than_the_negative_elbo():
    method = avb_jax.uivi(LinearSemiImplicit(), LinearDecoder(), burn_in=15, leapfrog_steps=3, step_size=0.4, **SETTINGS)
    params, values, gradients = estimates(method, 500)
    expected = jax.grad(lambda params: jnp.mean(analytic(params, POINTS)))(params)
    for name, gradient in of_encoder_and_decoder(gradients).items():
        assert_mean(gradient, of_encoder_and_decoder(expected)[name])
    assert np.all(np.mean(values, axis=0) > analytic(params, POINTS))


@pytest.mark.slow
def test_sivi_approaches_the_elbo_from_below_as_its_draws_grow():
    distance = {}
    for draws in (1, 15, 127):
        method = avb_jax.sivi(LinearSemiImplicit(), LinearDecoder(), inner_draws=draws, **SETTINGS)
        params, values, gradients = estimates(method, 10, keys=20)
        distance[draws] = np.mean(values - analytic(params, POINTS))
    error = np.std(np.mean(values, axis=1)) / np.sqrt(len(values))
    assert distance[1] > distance[15] > distance[127] > -4 * error
    assert distance[127] < 0.03 < 0.1 < distance[1] < np.log(2)
    expected = jax.grad(lambda params: jnp.mean(analytic(params, POINTS)))(params)
    for name, gradient in of_encoder_and_decoder(gradients).items():
        np.testing.assert_allclose(np.mean(gradient, axis=0), of_encoder_and_decoder(expected)[name], atol=0.1)


def test_sivi_by_hand():
    """One example, two draws: each scored by the mean of both densities."""
    method = avb_jax.sivi(LinearSemiImplicit(), LinearDecoder(), inner_draws=1, **SETTINGS)
    x = POINTS[:1]
    state, key = jax.jit(method.init)(jax.random.key(0), x), jax.random.key(5)
    noise = np.asarray(avb_jax.players.draw(key, x, PRIOR, 4, 2).noise[:, 0], np.float64)
    s = np.exp(-0.5)
    mean = 0.8 * np.asarray(x[0]) - 0.3 + np.asarray(A) * noise[:, 2:]
    z = mean + s * noise[:, :2]
    density = np.exp([[np.sum(log_normal(z[i], mean[k], -0.5)) for k in range(2)] for i in range(2)]).mean(axis=1)
    kl = np.mean([np.log(density[i]) - np.sum(log_normal(z[i])) for i in range(2)])
    terms = jax.jit(method.elbo)(key, state, x)
    np.testing.assert_allclose(terms.kl[0], kl, rtol=1e-5)
    np.testing.assert_allclose(terms.reconstruction[0], -np.sum(log_normal(x[0], 0.9 * z[0], np.log(SIGMA))), rtol=1e-5)


def test_iwhvi_is_exact_under_the_exact_reverse_model_and_a_bound_under_another():
    """Of q(z|x) at the z that it has drawn, whichever noise it then takes."""
    x = jnp.repeat(POINTS, 400, axis=0)
    noise = avb_jax.players.draw(jax.random.key(3), x, PRIOR, 4, 4).noise
    mean, log_std = 0.8 * x - 0.3, 0.5 * np.log(np.asarray(A) ** 2 + np.exp(-1.0))
    z = mean + np.asarray(A) * noise[0, :, 2:] + np.exp(-0.5) * noise[1, :, :2]
    expected = np.sum(log_normal(z, mean, log_std) - log_normal(z), axis=-1)
    for exact in (True, False):
        method = avb_jax.iwhvi(LinearSemiImplicit(), LinearDecoder(), Reverse(exact), inner_draws=2, **SETTINGS)
        state = method.init(jax.random.key(0), x)
        kl = jax.jit(method.elbo)(jax.random.key(3), state, x).kl
        if exact:
            np.testing.assert_allclose(kl, expected, atol=1e-4)
        else:
            assert 0.05 < np.mean(kl - expected) < 1.0


def test_the_first_moments_are_those_of_the_draw_s_own_noise(images):
    encoder = networks.SemiImplicitEncoder(networks.MLP((8,), input_rank=2), 3, widths=(8, 8), smallest_std=0.2)
    noise = jax.random.normal(jax.random.key(0), (5, 8, 3 + 2))
    params = encoder.init(jax.random.key(1), images, noise)
    posterior = encoder.apply(params, images, noise)
    mean, std = posterior.conditional
    np.testing.assert_allclose(posterior.z, mean + std * noise[..., :3], rtol=1e-6)
    silent = encoder.apply(params, images, noise.at[..., :3].set(0.0))
    np.testing.assert_array_equal(silent.conditional[0], mean)  # which the Gaussian part has no share in
    without = networks.SemiImplicitEncoder(networks.MLP((8,), input_rank=2), 3, widths=(8, 8))
    np.testing.assert_allclose(std, np.sqrt(without.apply(params, images, noise).conditional[1] ** 2 + 0.2**2), rtol=1e-5)
    assert not np.allclose(mean[0], mean[1])
    with pytest.raises(UserError, match=r"noise_dim=3: SemiImplicitEncoder needs latent_dim=3 .* set it to 4 or more"):
        encoder.init(jax.random.key(1), images, noise[..., :3])


@pytest.mark.parametrize("kind", ["moment", "sampler"])
def test_the_other_encoders_with_a_gaussian_share_are_semi_implicit(kind, images):
    share = 0.3
    if kind == "moment":
        encoder, dim = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, 2, (8,), share), 3 + 2 * 4
        without = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, 2, (8,), 0.0)
    else:
        encoder, dim = networks.Sampler(3, (8,), share), 3 + 5
        without = networks.Sampler(3, (8,), 0.0)
    noise = jax.random.normal(jax.random.key(0), (5, 8, dim))
    params = encoder.init(jax.random.key(1), images, noise)
    posterior = encoder.apply(params, images, noise)
    mean, std = posterior.conditional
    np.testing.assert_allclose(posterior.z, mean + std * noise[..., :3], rtol=1e-5, atol=1e-6)
    if kind == "moment":
        np.testing.assert_allclose(std[0], np.sqrt(share) * posterior.std, rtol=1e-5)
    assert encoder.semi_implicit
    assert not without.semi_implicit
    assert without.apply(params, images, noise).conditional is None


@pytest.mark.parametrize("name", ["sivi", "uivi", "iwhvi"])
def test_an_encoder_that_is_not_semi_implicit_is_named(name, images):
    modules = [networks.BlackBoxEncoder(networks.MLP((8,), input_rank=2), 3), networks.MLPDecoder((6, 6), 1, (8,))]
    if name == "iwhvi":
        modules.append(networks.ReverseModel(networks.MLP((8,), input_rank=2), 5, (8,)))
    settings = {**SETTINGS, "prior": distributions.standard_normal(3), "likelihood": distributions.bernoulli, "noise_dim": 5}
    method = getattr(avb_jax, name)(*modules, **settings)
    state = method.init(jax.random.key(0), images)
    with pytest.raises(UserError, match="encoder=BlackBoxEncoder: is not semi-implicit"):
        jax.eval_shape(method.train_step, jax.random.key(0), state, images)
    assert not small_method("avb").semi_implicit


def test_log_conditional_pairs_every_draw_with_every_noise():
    z, mean = jnp.arange(6.0).reshape(2, 1, 3), jnp.arange(9.0).reshape(3, 1, 3)
    found = log_conditional(z, (mean, jnp.full_like(mean, 2.0)))
    assert found.shape == (2, 3, 1)
    expected = np.sum(log_normal(z[1, 0], mean[2, 0], np.log(2.0)))
    np.testing.assert_allclose(found[1, 2, 0], expected, rtol=1e-6)
