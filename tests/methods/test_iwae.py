"""The importance weighted bound: by hand, where it is exact, and with T in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import avb_jax
from avb_jax import Players, Posterior, UserError, distributions, networks, players
from avb_jax.contrast import GaussianContrast, PriorContrast
from avb_jax.methods.iwae import negative_importance_bound
from avb_jax.network import as_network
from tests.gaussian import POINTS, PRIOR, SIGMA, ExactLogRatio, Game, LinearDecoder, log_normal, params_of_q


class Gaussian(nn.Module):
    """The known game's encoder, which says its density."""

    @nn.compact
    def __call__(self, x, noise):
        m, c, log_s = params_of_q(self)
        mean, std = m * x + c, jnp.broadcast_to(jnp.exp(log_s), x.shape)
        return Posterior(mean + std * noise, mean, std, gaussian=True)


METHOD = {"prior": PRIOR, "likelihood": distributions.gaussian(SIGMA), "optimizers": optax.sgd(1.0), "noise_dim": 2}


def loss(params, draws, **settings):
    """Of the known game with these params."""
    game = Players(as_network(Gaussian()), as_network(LinearDecoder()))
    common = {"networks": game, "prior": PRIOR, "likelihood": distributions.gaussian(SIGMA)}
    return negative_importance_bound(params, Players({}, {}, {}), draws, **common, **settings)


def start():
    return avb_jax.iwae(Gaussian(), LinearDecoder(), **METHOD).init(jax.random.key(0), POINTS).params


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_by_hand(beta):
    """Three draws for each of four points: every draw is decoded and meets its own x; the terms are the ELBO's."""
    params, draws = start(), players.draw(jax.random.key(1), POINTS, None, 2, 3)
    found, generative = loss(params, draws, beta=beta)
    x, noise, w = np.asarray(POINTS, np.float64), np.asarray(draws.noise, np.float64), 0.9
    z = 0.8 * x - 0.3 + np.exp(-0.5) * noise
    log_likelihood = log_normal(x, w * z, np.log(SIGMA)).sum(-1)
    kl = (log_normal(noise) + 0.5 - log_normal(z)).sum(-1)
    bound = np.log(np.mean(np.exp(log_likelihood - beta * kl), axis=0))
    np.testing.assert_allclose(found, -np.mean(bound), rtol=1e-5)
    np.testing.assert_allclose(generative.terms.reconstruction, -np.mean(log_likelihood, axis=0), rtol=1e-5)
    np.testing.assert_allclose(generative.terms.kl, np.mean(kl, axis=0), rtol=1e-4)


def test_with_the_exact_posterior_every_weight_is_p_of_x():
    params = start()
    w = float(params.decoder["w"][0])
    variance = 1 / (1 + (w / SIGMA) ** 2)
    exact = {"m": variance * w / SIGMA**2, "c": 0.0, "log_s": 0.5 * np.log(variance)}
    encoder = {name: jnp.full(2, value) for name, value in exact.items()}
    found, _ = loss(params._replace(encoder=encoder), players.draw(jax.random.key(1), POINTS, None, 2, 2))
    np.testing.assert_allclose(found, -np.mean(log_normal(POINTS, 0.0, 0.5 * np.log(w**2 + SIGMA**2)).sum(-1)), rtol=1e-5)


def test_more_draws_close_the_bound():
    """From the ELBO, at one draw, to log p(x)."""
    params, x = start(), jnp.tile(POINTS, (500, 1))
    bounds = [-jax.jit(loss)(params, players.draw(jax.random.key(2), x, None, 2, count))[0] for count in (1, 4, 100)]
    log_p = np.mean(log_normal(POINTS, 0.0, 0.5 * np.log(0.9**2 + SIGMA**2)).sum(-1))
    assert bounds[0] + 0.1 < bounds[1] < bounds[2] - 0.05
    assert log_p - 0.02 < bounds[2] < log_p + 0.01


class Zero(nn.Module):
    """T* where q is r."""

    @nn.compact
    def __call__(self, x, z):
        return self.param("t", nn.initializers.zeros, ()) + jnp.zeros(len(z))


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("contrast", [PriorContrast(), GaussianContrast(), GaussianContrast(moment_gradients=True)])
@pytest.mark.slow
def test_with_an_exact_t_it_is_iwae(contrast, beta):
    """Its value draw by draw, and on average its gradients: of encoder and decoder, though T is held fixed."""
    adversary = ExactLogRatio() if isinstance(contrast, PriorContrast) else Zero()
    game = Game(Gaussian(), adversary, contrast=contrast, importance_weighted=True)
    x, params = jnp.tile(POINTS, (25, 1)), game.params._replace(adversary=None)

    @jax.jit
    def gradients(key):
        draws = game.draw(key, x, 3)
        exact = jax.value_and_grad(lambda params: loss(params, draws, beta=beta)[0])
        value, of_iwae = exact(params)
        own, of_avb = jax.value_and_grad(lambda params: game.loss(params, draws, beta=beta)[0])(params)
        return value, own, of_iwae, of_avb

    keys = jax.random.split(jax.random.key(3), 400)
    values, own, of_iwae, of_avb = jax.lax.map(gradients, keys)
    np.testing.assert_allclose(values, own, rtol=1e-5)
    difference = jax.tree.map(lambda a, b: a - b, of_iwae, of_avb)
    for leaf in jax.tree.leaves(difference):
        error = leaf.std(axis=0) / np.sqrt(len(keys))
        assert (abs(leaf.mean(axis=0)) <= 4 * error + 1e-5).all()
        assert (error < 0.01).all()
    if isinstance(contrast, GaussianContrast) and contrast.moment_gradients:  # Burda et al.'s own form
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-4), difference)


def test_weights_and_moments_that_are_estimated_do_not_go_together():
    game = Game(contrast=GaussianContrast(moment_gradients=True), adversary=Zero(), importance_weighted=True)
    with pytest.raises(UserError, match="importance_weighted=True: with moment_gradients, encoder=LinearEncoder has to give"):
        game.loss(game.params, game.draw(jax.random.key(0), POINTS, 2))


def test_it_trains_and_an_encoder_without_a_density_is_named(images):
    trunk, decoder = networks.MLP((8,), input_rank=2), networks.MLPDecoder((6, 6), 1, (8,))
    settings = {**METHOD, "prior": distributions.standard_normal(3), "likelihood": distributions.bernoulli, "noise_dim": 3}
    method = avb_jax.iwae(networks.IAFEncoder(trunk, 3, 2, (8,)), decoder, noise_draws=2, **settings)
    state = method.init(jax.random.key(0), images)
    after, info = jax.jit(method.train_step)(jax.random.key(1), state, images)
    assert np.isfinite(info.elbo).all()
    for player in ("encoder", "decoder"):
        pairs = zip(*(jax.tree.leaves(getattr(s.params, player)) for s in (state, after)), strict=True)
        assert any(not np.allclose(*pair) for pair in pairs)
    black_box = avb_jax.iwae(networks.BlackBoxEncoder(trunk, 3), decoder, **settings)
    with pytest.raises(UserError, match="encoder=BlackBoxEncoder: a VAE needs a density"):
        jax.eval_shape(black_box.train_step, jax.random.key(1), black_box.init(jax.random.key(0), images), images)
