"""Contrasts: what T is to learn shrinks, the KL term stays what it is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpyro import distributions as dist

from avb_jax import Draws, Posterior, UserError, contrast
from avb_jax.contrast import GaussianContrast
from avb_jax.network import as_network
from tests.conftest import small_method
from tests.gaussian import POINTS, PRIOR, Game, analytic_negative_elbo, log_normal, params_of_q

COUNT = 200_000


class GivesMoments(nn.Module):
    """The Gaussian encoder of the known game, with moments that are off by `shift` and `scale`."""

    shift: float = 0.0
    scale: float = 1.0

    shares_x = True

    @nn.compact
    def __call__(self, x, noise):
        m, c, log_s = params_of_q(self)
        mean, std = m * x + c, jnp.exp(log_s)
        # Params that only the moments depend on: a gradient through these would show.
        extra = self.param("extra", nn.initializers.zeros, (2,))
        moments = mean + self.shift + extra, jnp.broadcast_to(self.scale * std, mean.shape) * jnp.exp(extra)
        return Posterior(mean + std * noise, *moments)


class Zero(nn.Module):
    """T = 0, with a param that does nothing."""

    @nn.compact
    def __call__(self, x, z):
        return self.param("nothing", nn.initializers.zeros, ()) + jnp.zeros(len(x))


class ExactUnderContrast(nn.Module):
    """T* = log q(z|x) - log r(z|x) at z = mean + std z_tilde, for the moments that `GivesMoments` gives."""

    shift: float
    scale: float

    @nn.compact
    def __call__(self, x, z):
        mean, log_s = 0.8 * x - 0.3, -0.5
        std = self.scale * jnp.exp(log_s)
        log_q = log_normal(mean + self.shift + std * z, mean, log_s)
        return jnp.sum(log_q - log_normal(z) + jnp.log(std), axis=-1)


def gaussian_kl(mean, std):
    """KL(N(mean, diag std^2), N(0, I)) over the last axis."""
    return jnp.sum(0.5 * (mean**2 + std**2 - 1) - jnp.log(std), axis=-1)


@pytest.fixture(scope="module")
def points():
    return jnp.tile(POINTS, (COUNT // 4, 1))


def _game(encoder, adversary, **settings):
    return Game(encoder, adversary, contrast=GaussianContrast(**settings))


def _gradients(game, points):
    """Of the encoder's and decoder's loss, of 200 batches of 1,000 examples."""

    def gradient(key, x):
        return jax.grad(game.loss, has_aux=True)(game.params, game.draw(key, x))[0]

    parts = points.reshape(-1, 1000, 2)
    return jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(2), len(parts)), parts)


def test_with_a_gaussian_encoder_nothing_is_left_for_t(points):
    """T* = 0: the ELBO is the analytic one, its T-free part the closed-form KL, and T sees N(0, I)."""
    game = _game(GivesMoments(), Zero())
    _, found = game.loss(game.params, game.draw(jax.random.key(1), points))
    terms, expected = found.terms, analytic_negative_elbo(game.params.encoder, game.params.decoder, POINTS)
    assert abs(terms.elbo.mean() + expected) < 4 * terms.elbo.std() / np.sqrt(COUNT)
    mean = 0.8 * points - 0.3
    np.testing.assert_allclose(terms.kl_contrast, gaussian_kl(mean, jnp.full_like(mean, np.exp(-0.5))), rtol=1e-5)
    assert abs(jnp.mean(terms.kl - terms.kl_contrast)) < 4 * jnp.std(terms.kl - terms.kl_contrast) / np.sqrt(COUNT)
    np.testing.assert_allclose((found.compared.z[0].mean(), found.compared.z[0].std()), (0, 1), atol=0.01)


def test_the_objective_does_not_depend_on_r_where_t_is_optimal(points):
    """Not even draw by draw: T* + log r - log p is log q - log p for every r, however wrong its moments."""
    exact = Game()
    draws = exact.draw(jax.random.key(1), points[:1000])
    for shift, scale in ((0.0, 1.0), (0.4, 1.0), (0.0, 2.0), (-1.0, 0.7)):
        game = _game(GivesMoments(shift, scale), ExactUnderContrast(shift, scale))
        np.testing.assert_allclose(game.terms(draws).elbo, exact.terms(draws).elbo, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment_gradients", [False, True])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 2.0)])
@pytest.mark.slow
def test_its_gradients_are_those_of_the_analytic_elbo_whatever_r(points, shift, scale, moment_gradients):
    """On average, whether or not they flow through the moments, be these off; T is what it then is."""
    adversary = Zero() if (shift, scale) == (0.0, 1.0) else ExactUnderContrast(shift, scale)
    game = _game(GivesMoments(shift, scale), adversary, moment_gradients=moment_gradients)
    got = _gradients(game, points)
    exact = jax.grad(analytic_negative_elbo, argnums=(0, 1))(game.params.encoder, game.params.decoder, POINTS)
    for found, expected in zip(got[:2], exact, strict=True):
        for name in {"m", "c", "log_s", "w"} & found.keys():
            error = found[name].std(axis=0) / np.sqrt(len(found[name]))
            np.testing.assert_array_less(abs(found[name].mean(axis=0) - expected[name]), 4 * error + 1e-5)
    assert bool(got.encoder["extra"].any()) == moment_gradients


def test_with_moment_gradients_t_does_not_move_location_and_scale():
    """Whatever T is, where z is mean + std * v with a v of its own: only v is moved by T."""
    gradients = []
    for adversary in (Zero(), ExactUnderContrast(3.0, 0.2)):
        game = _game(GivesMoments(), adversary, moment_gradients=True)
        draws = game.draw(jax.random.key(1), jnp.tile(POINTS, (25, 1)))
        gradients.append(jax.jit(jax.grad(game.loss, has_aux=True))(game.params, draws)[0].encoder)
    for name in ("m", "c", "log_s"):
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)


def test_moments_that_the_encoder_does_not_give_are_estimated():
    """Many draws give those of the Gaussian; few give an r of their own, which is still a function of x alone."""
    game, noise = Game(), jax.random.normal(jax.random.key(3), (5, 4, 2))

    def contrasted(draws, noise):
        encoder = game.networks.encoder, game.params.encoder, {}
        return contrast.encode(GaussianContrast(draws), PRIOR, *encoder, Draws(POINTS, noise, noise), train=True)[0]

    drawn = contrasted(100_000, noise)
    mean, std = 0.8 * POINTS - 0.3, jnp.full((4, 2), np.exp(-0.5))
    np.testing.assert_allclose(drawn.compared.z[0], (drawn.z - mean) / std, atol=0.02)
    np.testing.assert_allclose(drawn.kl, gaussian_kl(mean, std), atol=0.02)
    np.testing.assert_array_equal(contrasted(3, noise).kl, contrasted(3, -noise).kl)


def test_a_prior_of_any_kind():
    """The KL term is T plus log r - log p at the draws; r's KL has a name of its own only where it has a closed form."""
    prior = dist.StudentT(3.0, jnp.zeros(2), 1.0).to_event(1)
    game, noise = Game(GivesMoments()), jax.random.normal(jax.random.key(3), (5, 4, 2))
    encoder = game.networks.encoder, game.params.encoder, {}
    drawn, _ = contrast.encode(GaussianContrast(), prior, *encoder, Draws(POINTS, noise, noise), train=True)
    log_r = log_normal(drawn.z, 0.8 * POINTS - 0.3, -0.5).sum(axis=-1)
    np.testing.assert_allclose(drawn.log_ratio, log_r - prior.log_prob(drawn.z), rtol=1e-4, atol=1e-5)
    assert drawn.kl is None


class Correlated(nn.Module):
    """z = x + L noise."""

    @nn.compact
    def __call__(self, x, noise):
        return x + self.param("gain", nn.initializers.ones, ()) * noise @ jnp.array([[1.0, 0.8], [0.0, 0.3]])


@pytest.mark.slow
def test_a_full_covariance_leaves_nothing_of_any_gaussian():
    """T sees N(0, I), and the KL term is what the covariance makes it; no gradient flows into r."""
    game, noise = Game(Correlated()), jax.random.normal(jax.random.key(3), (20_000, 4, 2))

    @functools.partial(jax.jit, static_argnums=1)
    def contrasted(params, count=50_000):
        encoder = game.networks.encoder, params, {}
        return contrast.encode(GaussianContrast(count, full=True), PRIOR, *encoder, Draws(POINTS, noise, noise), train=True)[0]

    drawn = contrasted(game.params.encoder)
    np.testing.assert_array_equal(drawn.compared.z[1], noise)
    seen = np.moveaxis(drawn.compared.z[0], 1, 0)
    np.testing.assert_allclose(seen.mean(axis=1), np.zeros((4, 2)), atol=0.03)
    np.testing.assert_allclose([np.cov(one.T) for one in seen], np.broadcast_to(np.eye(2), (4, 2, 2)), atol=0.05)
    covariance = jnp.array([[1.0, 0.8], [0.8, 0.73]])
    log_r = dist.MultivariateNormal(POINTS, covariance).log_prob(drawn.z)
    np.testing.assert_allclose(drawn.log_ratio.mean(), (log_r - PRIOR.log_prob(drawn.z)).mean(), atol=0.02)
    few = jax.random.normal(jax.random.key(0), (5, 2)) @ jnp.array([[1.0, 0.8], [0.0, 0.3]])
    of_few = dist.MultivariateNormal(POINTS + few.mean(axis=0), jnp.cov(few.T) + 1e-6 * jnp.eye(2))

    @jax.jit
    @jax.grad
    def slope(gain):
        z = POINTS + gain * (drawn.z - POINTS)
        return jnp.mean(of_few.log_prob(z) - PRIOR.log_prob(z))

    found = jax.jit(jax.grad(lambda params: contrasted(params, 5).log_ratio.mean()))(game.params.encoder)["gain"]
    np.testing.assert_allclose(found, slope(1.0), rtol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_what_t_sees_does_not_move_with_moments_that_gradients_flow_through(full):
    """Of draws whose moments scale with them; without these gradients it does."""
    encoder, noise = as_network(Correlated()), jax.random.normal(jax.random.key(3), (50, 4, 2))

    def slope(moment_gradients):
        def seen(params):
            of = GaussianContrast(9, moment_gradients, full)
            drawn, _ = contrast.encode(of, PRIOR, encoder, params, {}, Draws(POINTS, noise, noise), train=True)
            return jnp.sum(jnp.square(drawn.compared.z[0]))

        return jax.jit(jax.grad(seen))({"gain": jnp.ones(())})["gain"]

    assert abs(slope(True)) < 1e-3 * abs(slope(False))


class Squared(nn.Module):
    """T = |z|^2 of what it sees."""

    @nn.compact
    def __call__(self, x, z):
        return self.param("nothing", nn.initializers.zeros, ()) + jnp.sum(z**2, axis=-1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow
def test_what_t_is_told_apart_from_may_lie_wider_than_r(full):
    """Draws of s with the density that the loss subtracts, by hand; T, its KL term and r are what they are without s."""
    mean, std, count = np.array([0.4, -0.2]), np.array([0.5, 2.0]), 40_000
    posterior = Posterior(jnp.asarray(mean + std * np.random.default_rng(0).normal(size=(count, 1, 2)), jnp.float32))
    given = posterior.replace(mean=jnp.array([mean]), std=jnp.array([std]))
    few = jax.random.normal(jax.random.key(1), (50, 1, 2)) @ jnp.diag(std) + mean
    root = np.linalg.cholesky(np.cov(few[:, 0].T)) if full else np.diag(std)
    mean = few.mean(axis=(0, 1)) if full else mean
    prior = dist.StudentT(5.0, jnp.zeros(2), 1.0).to_event(1)

    def contrasted(**settings):
        of = GaussianContrast(50, full=full, **settings)
        base = of.base(prior).sample(jax.random.key(4), (count, 1))
        return of(prior, given, lambda count: Posterior(few), base)

    plain, wide = contrasted(), contrasted(inflation=1.5, prior_share=0.25)
    np.testing.assert_array_equal(plain.log_ratio, wide.log_ratio)
    np.testing.assert_array_equal(plain.compared.z[0], wide.compared.z[0])
    assert plain.compared.offset is None
    # At both sides, in z: log s - log r.
    z = mean + wide.compared.z @ root.T
    np.testing.assert_allclose(z[0], posterior.z, atol=1e-4)
    log_r = dist.MultivariateNormal(mean, scale_tril=root).log_prob(z)
    log_wide = dist.MultivariateNormal(mean, scale_tril=1.5 * root).log_prob(z)
    log_s = jnp.logaddexp(np.log(0.25) + prior.log_prob(z), np.log(0.75) + log_wide)
    np.testing.assert_allclose(wide.compared.offset, log_s - log_r, rtol=2e-3, atol=2e-3)
    # And the draws are s's: E_s[w / s] is 1 of any density w.
    for width in (0.3, 1.0):
        weight = np.exp(dist.MultivariateNormal(mean, width * np.eye(2)).log_prob(z[1]) - log_s[1])
        assert abs(weight.mean() - 1.0) < 4 * weight.std() / np.sqrt(count)
    np.testing.assert_allclose(contrasted(inflation=1.5).compared.z[1].std(axis=0), 1.5, rtol=0.02)


def test_the_loss_of_t_subtracts_what_lies_wider(points):
    """T* of a Gaussian encoder is 0 all the same: T off by a constant, a slope, a quadratic or s has a higher loss."""
    game = _game(GivesMoments(), Squared(), inflation=1.5, prior_share=0.5)
    draws = game.draw(jax.random.key(1), points)
    _, found = game.loss(game.params, draws)
    offset = found.compared.offset

    def loss(t):
        logit = t - offset
        return jnp.mean(jax.nn.softplus(-logit[0]) + jax.nn.softplus(logit[1]))

    best, v = loss(jnp.zeros_like(offset)), found.compared.z
    for wrong in (0.3, -0.3, 0.1 * jnp.sum(v**2, axis=-1), 0.2 * v[..., 0], offset):
        assert loss(wrong + jnp.zeros_like(offset)) > best
    got, terms = game.loss_of_t_between(game.params.adversary, draws, found.compared)
    t = jnp.sum(v**2, axis=-1)
    np.testing.assert_allclose(got, loss(t), rtol=1e-5)
    np.testing.assert_allclose(terms.t, t[0].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.terms.kl, (t[0] + _log_ratio(game, draws)).mean(axis=0), rtol=1e-4)


def _log_ratio(game, draws):
    encoder = game.networks.encoder, game.params.encoder, {}
    return contrast.encode(game.contrast, PRIOR, *encoder, draws, train=True)[0].log_ratio


def test_an_encoder_that_ignores_its_noise_has_finite_moment_gradients():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return self.param("m", nn.initializers.ones, (2,)) * x

    game = _game(Constant(), Zero(), moment_gradients=True)
    gradient, _ = jax.grad(game.loss, has_aux=True)(game.params, game.draw(jax.random.key(1), jnp.ones((4, 2))))
    assert np.isfinite(gradient.encoder["m"]).all()


def test_slips_are_named(images):
    for settings, message in (
        ({"moment_draws": 1}, "moment_draws=1: must be at least 2"),
        ({"inflation": 0.9}, "inflation=0.9: must be at least 1"),
        ({"prior_share": 1.0}, "prior_share=1.0: must be at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            GaussianContrast(**settings)
    with pytest.raises(UserError, match="moment_draws=3: must be more than z's 3 dimensions"):
        small_method("avb", contrast=GaussianContrast(3, full=True))

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return Posterior(noise, jnp.zeros(2), jnp.ones(2))

    method = small_method("avb", encoder=lambda trunk, latents: Wrong())
    with pytest.raises(UserError, match=r"encoder's moments: returned shape \(2,\), expected \(8, 3\)"):
        method.train_step(jax.random.key(1), method.init(jax.random.key(0), images), images)
