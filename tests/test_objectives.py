"""Propositions 1 and 2, Algorithm 1 by hand, and the game whose ELBO is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Draws, Players, Posterior, UserError, divergences, networks, objectives, players
from avb_jax.distributions import normal_log_prob
from avb_jax.methods import METHODS, avb
from tests import gaussian
from tests.conftest import small_model

COUNT = 200_000


@pytest.fixture(scope="module")
def game():
    """Model, params and many draws at one fixed x per example (of four)."""
    model = gaussian.model()
    x = jnp.tile(jnp.array([[0.5, -1.0], [1.0, 0.2], [-0.7, 0.4], [0.0, 1.5]]), (COUNT // 4, 1))
    state = players.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), x[:4])
    return model, state, players.draw(jax.random.key(1), model, x)


def _mean_and_error(per_example):
    """Mean over examples and its standard error."""
    return jnp.mean(per_example, axis=0), jnp.std(per_example, axis=0) / np.sqrt(len(per_example))


def _in_parts(draws):
    """The draws as many batches of 1,000 examples."""
    return Draws(draws.x.reshape(-1, 1000, 2), *(a.reshape(-1, 1, 1000, 2) for a in (draws.noise, draws.z_prior)))


def _within(estimates, expected, errors=4.0):
    """Every mean over axis 0 lies within so many standard errors of what is expected."""
    mean, error = _mean_and_error(estimates)
    np.testing.assert_array_less(jnp.abs(mean - expected), errors * error + 1e-6)


def test_logistic_by_hand():
    # T_q = log 3: sigma = 3/4. T_p = 0: sigma = 1/2. Loss = -log(3/4) - log(1 - 1/2) = log(4/3) + log 2 = log(8/3).
    np.testing.assert_allclose(divergences.jensen_shannon(jnp.log(3.0), jnp.array(0.0)), np.log(8 / 3), rtol=1e-6)


def test_a_t_of_zero_is_right_half_of_the_time():
    t = jnp.array([[[0.0, 2.0, -1.0]], [[0.0, 0.0, -3.0]]])
    np.testing.assert_allclose(objectives.judged(t, small_model("avb"))[1].accuracy, [0.5, 0.75, 0.5])


def test_logistic_does_not_overflow():
    assert np.isfinite(divergences.jensen_shannon(jnp.array([-1e4, 1e4]), jnp.array([1e4, -1e4]))).all()


def test_proposition_1_adversary_gradient_vanishes_at_the_log_ratio(game):
    model, state, draws = game
    parts = _in_parts(draws)

    def gradient(part, shift):
        z, _ = players.encode(model, state.params.encoder, {}, part.x, part.noise, train=True)
        adversary = {**state.params.adversary, "offset": jnp.array(shift)}
        return jax.grad(objectives.adversary_loss, has_aux=True)(adversary, state.batch_stats, part, z.z, model=model)[0]

    at_optimum = jax.vmap(lambda p: gradient(p, 0.0))(parts)
    jax.tree.map(lambda g: _within(g, 0.0), at_optimum)
    mean, error = _mean_and_error(jax.vmap(lambda p: gradient(p, 0.3))(parts)["offset"])
    assert mean > 10 * error  # and the check can fail: off the optimum it points back


def test_proposition_2_expected_gradient_of_optimal_t_is_zero(game):
    model, state, draws = game
    z, _ = players.encode(model, state.params.encoder, {}, draws.x, draws.noise, train=True)

    def t_star(q, x, z):  # q: the encoder's params where they occur in T* explicitly
        return model.networks.adversary.apply({"params": {**q, "offset": 0.0}}, x, z)

    gradients = jax.vmap(jax.grad(t_star), in_axes=(None, 0, 0))(state.params.encoder, draws.x, z.z[0])
    jax.tree.map(lambda g: _within(g, 0.0), gradients)


def test_exact_log_ratio_gives_the_analytic_elbo(game):
    model, state, draws = game
    _, (terms, _, _) = objectives.negative_elbo_adversarial(
        state.params, state.params.adversary, state.batch_stats, draws, model=model
    )
    expected = gaussian.analytic_negative_elbo(state.params.encoder, state.params.decoder, draws.x[:4])
    _within(-terms.elbo, expected)


def test_exact_log_ratio_gives_the_gradients_of_the_analytic_elbo(game):
    model, state, draws = game
    parts = _in_parts(draws)

    def gradient(part):
        generative = state.params._replace(adversary=None)
        return jax.grad(objectives.negative_elbo_adversarial, has_aux=True)(
            generative, state.params.adversary, state.batch_stats, part, model=model
        )[0]

    estimates = jax.vmap(gradient)(parts)
    exact = jax.grad(gaussian.analytic_negative_elbo, argnums=(0, 1))(
        state.params.encoder, state.params.decoder, draws.x[:4]
    )
    jax.tree.map(_within, (estimates.encoder, estimates.decoder), exact)


def test_beta_weighs_the_kl_alone(game):
    model, state, draws = game
    arguments = (state.params, state.params.adversary, state.batch_stats, draws)
    loss = [objectives.negative_elbo_adversarial(*arguments, model=model, beta=beta)[0] for beta in (0.0, 1.0, 3.0)]
    _, (terms, _, _) = objectives.negative_elbo_adversarial(*arguments, model=model)
    np.testing.assert_allclose(loss[0], terms.reconstruction.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss[2] - loss[1], 2 * (loss[1] - loss[0]), rtol=1e-4)


def test_a_gaussian_encoder_s_two_kls_agree(images):
    """The VAE's closed form is the mean of log q(z|x) - log p(z) over its draws."""
    model = small_model("vae")
    state = players.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), images)
    x = jnp.broadcast_to(images[:1], (20_000, 6, 6))
    draws = players.draw(jax.random.key(1), model, x)
    _, (terms, z, _) = objectives.negative_elbo(state.params, state.batch_stats, draws, model=model)
    posterior, _ = players.encode(model, state.params.encoder, {}, x, draws.noise, train=False)
    log_q = jnp.sum(normal_log_prob(z, posterior.mean, jnp.log(posterior.std)), axis=-1)
    _within(log_q[0] - model.prior.log_prob(z[0]), terms.kl[0])


class Telling(nn.Module):
    """An encoder of a user's: its moments, with or without the word that it is Gaussian."""

    gaussian: bool
    with_moments: bool = True

    @nn.compact
    def __call__(self, x, noise):
        moments = (jnp.zeros((len(x), 3)), jnp.ones((len(x), 3))) if self.with_moments else ()
        return Posterior(noise, *moments, gaussian=self.gaussian)


def test_moments_alone_are_no_density(images, sgd):
    """A VAE takes the closed form of a Gaussian that is called one; a VAE/GAN needs one, too."""

    def step(method, encoder, noise_dim=3):
        model = small_model(method, noise_dim=noise_dim)
        model = dataclasses.replace(model, networks=model.networks._replace(encoder=encoder))
        state = METHODS[method].init(jax.random.key(0), model, sgd, images)
        return METHODS[method].train_step(jax.random.key(0), state, images, model=model, optimizers=sgd)[1]

    moments = networks.MomentEncoder(networks.MLP((4,), input_rank=2), 3, bases=1)
    for method, needs in (("vae", "a VAE needs a density of q"), ("vaegan", "a VAE/GAN needs an encoder that returns")):
        np.testing.assert_allclose(step(method, Telling(True)).kl, 0, atol=1e-6)
        for encoder, noise_dim in ((Telling(False), 3), (moments, 6)):
            with pytest.raises(UserError, match=f"encoder={type(encoder).__name__}: {needs}"):
                step(method, encoder, noise_dim)
        with pytest.raises(UserError, match=r"Posterior\(gaussian=True\) without mean and std"):
            step(method, Telling(True, with_moments=False))


def test_no_loss_leaks_into_another_player(images, sgd):
    model = small_model("avb")
    state = avb.init(jax.random.key(0), model, sgd, images)
    draws = players.draw(jax.random.key(1), model, images)

    def all_of(loss):  # the gradient with respect to everything the loss could reach
        return jax.grad(loss)((state.params, draws.noise))

    def adversary_side(everything):
        params, noise = everything
        z, _ = players.encode(model, params.encoder, {}, images, noise, train=True)
        return objectives.adversary_loss(params.adversary, state.batch_stats, draws, z.z, model=model)[0]

    gradient, noise_gradient = all_of(adversary_side)
    for leaf in jax.tree.leaves((gradient.encoder, gradient.decoder, noise_gradient)):
        assert not leaf.any()
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient.adversary))

    # A step with the other players' optimisers at rate 0 moves one player alone.
    for moving in Players._fields:
        still = Players(*[optax.sgd(float(name == moving)) for name in Players._fields])
        after, _ = avb.train_step(jax.random.key(2), state, images, model=model, optimizers=still)
        for name in Players._fields:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), getattr(after.params, name), getattr(state.params, name))
            assert all(jax.tree.leaves(same)) == (name != moving), (moving, name)


def test_draws_are_of_the_step_s_own_randomness(images):
    model = small_model("avb")
    one, two = (players.draw(jax.random.key(k), model, images) for k in (0, 1))
    assert isinstance(one, Draws)
    assert not np.allclose(one.noise, two.noise)
    assert not np.allclose(one.noise, one.z_prior)
