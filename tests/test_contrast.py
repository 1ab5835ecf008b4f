"""Adaptive contrast: what T is to learn shrinks, the KL term stays what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from numpyro import distributions as dist

from avb_jax import Posterior, UserError, contrast
from avb_jax.contrast import Adaptive
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
    return Game(encoder, adversary, contrast=Adaptive(**settings))


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
    np.testing.assert_allclose((found.compared.mean(), found.compared.std()), (0, 1), atol=0.01)


def test_the_objective_does_not_depend_on_r_where_t_is_optimal(points):
    """Not even draw by draw: T* + log r - log p is log q - log p for every r, however wrong its moments."""
    exact = Game()
    draws = exact.draw(jax.random.key(1), points[:1000])
    for shift, scale in ((0.0, 1.0), (0.4, 1.0), (0.0, 2.0), (-1.0, 0.7)):
        game = _game(GivesMoments(shift, scale), ExactUnderContrast(shift, scale))
        np.testing.assert_allclose(game.terms(draws).elbo, exact.terms(draws).elbo, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment_gradients", [False, True])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 2.0)])
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
        gradients.append(jax.grad(game.loss, has_aux=True)(game.params, draws)[0].encoder)
    for name in ("m", "c", "log_s"):
        np.testing.assert_allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)


def test_moments_that_the_encoder_does_not_give_are_estimated():
    """Many draws give those of the Gaussian; few give an r of their own, which is still a function of x alone."""
    game, noise = Game(), jax.random.normal(jax.random.key(3), (5, 4, 2))

    def contrasted(draws, noise):
        encoder = game.networks.encoder, game.params.encoder, {}
        return contrast.encode(Adaptive(draws), PRIOR, *encoder, POINTS, noise, train=True)[0]

    drawn = contrasted(100_000, noise)
    mean, std = 0.8 * POINTS - 0.3, jnp.full((4, 2), np.exp(-0.5))
    np.testing.assert_allclose(drawn.compared, (drawn.z - mean) / std, atol=0.02)
    np.testing.assert_allclose(drawn.kl, gaussian_kl(mean, std), atol=0.02)
    np.testing.assert_array_equal(contrasted(3, noise).kl, contrasted(3, -noise).kl)


def test_a_prior_of_any_kind():
    """The KL term is T plus log r - log p at the draws; r's KL has a name of its own only where it has a closed form."""
    prior = dist.StudentT(3.0, jnp.zeros(2), 1.0).to_event(1)
    game, noise = Game(GivesMoments()), jax.random.normal(jax.random.key(3), (5, 4, 2))
    encoder = game.networks.encoder, game.params.encoder, {}
    drawn, _ = contrast.encode(Adaptive(), prior, *encoder, POINTS, noise, train=True)
    log_r = log_normal(drawn.z, 0.8 * POINTS - 0.3, -0.5).sum(axis=-1)
    np.testing.assert_allclose(drawn.log_ratio, log_r - prior.log_prob(drawn.z), rtol=1e-4, atol=1e-5)
    assert drawn.kl is None


def test_an_encoder_that_ignores_its_noise_has_finite_moment_gradients():
    class Constant(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return self.param("m", nn.initializers.ones, (2,)) * x

    game = _game(Constant(), Zero(), moment_gradients=True)
    gradient, _ = jax.grad(game.loss, has_aux=True)(game.params, game.draw(jax.random.key(1), jnp.ones((4, 2))))
    assert np.isfinite(gradient.encoder["m"]).all()


def test_slips_are_named(images):
    with pytest.raises(UserError, match="moment_draws=1: must be at least 2"):
        Adaptive(moment_draws=1)

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return Posterior(noise, jnp.zeros(2), jnp.ones(2))

    method = small_method("avb", encoder=lambda trunk, latents: Wrong())
    with pytest.raises(UserError, match=r"encoder's moments: returned shape \(2,\), expected \(8, 3\)"):
        method.train_step(jax.random.key(1), method.init(jax.random.key(0), images), images)
