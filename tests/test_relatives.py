"""The paper's relatives: what each method's losses are, by hand, and the divergences that an adversary may minimise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import (
    Judgement,
    Model,
    Players,
    Posterior,
    StandardNormal,
    UserError,
    distributions,
    networks,
    objectives,
    players,
)
from avb_jax.divergences import DIVERGENCES
from avb_jax.methods import METHODS, aae, avb, vae, vaegan
from tests import gaussian
from tests.conftest import small_model

GRID = np.linspace(-6.0, 6.0, 2001)
LOG_Q = np.asarray(distributions.normal_log_prob(GRID, 0.7, np.log(0.8)))
LOG_P = np.asarray(distributions.normal_log_prob(GRID))


def expected_loss(divergence, t):
    """E_q and E_p of a loss, by quadrature on GRID, for T on the grid."""
    on_q, on_p = (DIVERGENCES[divergence](t, jnp.zeros_like(t)), DIVERGENCES[divergence](jnp.zeros_like(t), t))
    constant = DIVERGENCES[divergence](jnp.zeros(()), jnp.zeros(()))
    cell = GRID[1] - GRID[0]
    return jnp.sum((on_q - constant) * np.exp(LOG_Q) + on_p * np.exp(LOG_P)) * cell


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_divergence_is_least_at_the_log_ratio(divergence):
    """T = a + b z + c z^2, which the log ratio of two Gaussians is, fitted from T = 0; and pointwise, by the gradient."""
    exact = LOG_Q - LOG_P
    np.testing.assert_allclose(jax.grad(lambda t: expected_loss(divergence, t))(jnp.asarray(exact)), 0, atol=1e-6)
    features = jnp.stack([jnp.ones_like(GRID), GRID, GRID**2])
    loss = lambda coefficients: expected_loss(divergence, coefficients @ features)  # noqa: E731
    solver = optax.lbfgs()
    coefficients = jnp.zeros(3)
    state, value_and_grad = solver.init(coefficients), optax.value_and_grad_from_state(loss)
    step = jax.jit(lambda c, s: _lbfgs(solver, loss, value_and_grad, c, s))
    for _ in range(60):
        coefficients, state = step(coefficients, state)
    expected = np.polynomial.polynomial.polyfit(GRID, exact, 2)
    np.testing.assert_allclose(coefficients, expected, atol=0.02)


def _lbfgs(solver, loss, value_and_grad, coefficients, state):
    value, gradient = value_and_grad(coefficients, state=state)
    update, state = solver.update(gradient, state, coefficients, value=value, grad=gradient, value_fn=loss)
    return optax.apply_updates(coefficients, update), state


def test_each_divergence_by_hand():
    # T_q = log 3 and T_p = log 2; the formulas of section 5.3 with f's conjugates.
    by_hand = {
        "jensen_shannon": np.log(4 / 3) + np.log(3), "kl": 2 - 1 - np.log(3), "reverse_kl": np.log(2) - 1 + 1 / 3,
        "pearson": 4 - 1 - 2 * (3 - 1), "hellinger": np.sqrt(2) - 1 - (1 - 1 / np.sqrt(3)),
    }  # fmt: skip
    for name, loss in DIVERGENCES.items():
        np.testing.assert_allclose(loss(jnp.log(3.0), jnp.log(2.0)), by_hand[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_elbos_under_each_divergence_agree(divergence):
    """In the game whose T can be exact, T trained by each loss from a wrong start gives the ELBO that is known.

    q has a standard deviation of 0.82: under 0.71, p/q has no variance under q, and reverse_kl's gradient none either.
    """
    game = gaussian.model(divergence=divergence)
    x = jnp.tile(jnp.array([[0.5, -1.0], [1.0, 0.2], [-0.7, 0.4], [0.0, 1.5]]), (1000, 1))
    state = players.init(jax.random.key(0), game, Players(*[optax.identity()] * 3), x[:4])
    params = state.params
    params = params._replace(
        encoder={**params.encoder, "log_s": jnp.full(2, -0.2)}, adversary={**params.adversary, "log_s": jnp.full(2, -0.2)}
    )
    state = state._replace(params=params)
    start = {**state.params.adversary, "offset": jnp.array(0.3), "m": jnp.array([0.7, 0.9])}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 800))

    @jax.jit
    def train(adversary):
        def step(carry, key):
            adversary, opt_state = carry
            draws = players.draw(key, game, x)
            z, _ = players.encode(game, state.params.encoder, {}, x, draws.noise, train=True)
            gradient = jax.grad(objectives.adversary_loss, has_aux=True)(
                adversary, state.batch_stats, draws, z.z, model=game
            )[0]
            update, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(adversary, update), opt_state), None

        return jax.lax.scan(step, (adversary, optimizer.init(adversary)), jax.random.split(jax.random.key(1), 800))[0][0]

    trained = state._replace(params=state.params._replace(adversary=train(start)))
    elbos = [avb.elbo_terms(jax.random.key(2), s, x, model=game).elbo.mean() for s in (state, trained)]
    off = avb.elbo_terms(
        jax.random.key(2), state._replace(params=state.params._replace(adversary=start)), x, model=game
    ).elbo.mean()
    assert abs(off - elbos[0]) > 0.1
    assert abs(elbos[1] - elbos[0]) < 0.03


def test_the_zero_sum_form_is_the_loss_of_kl():
    """Eqs. 5.9 and 5.10: E_q[T] cancels in the sum of both players' losses, which leaves no part of T to the encoder."""
    game = gaussian.model(divergence="kl")
    x = jnp.array([[0.5, -1.0], [1.0, 0.2]])
    state = players.init(jax.random.key(0), game, Players(*[optax.identity()] * 3), x)
    draws = players.draw(jax.random.key(1), game, x)
    negative_elbo, (terms, z, _) = objectives.negative_elbo_adversarial(
        state.params, state.params.adversary, state.batch_stats, draws, model=game
    )
    loss, _ = objectives.adversary_loss(state.params.adversary, state.batch_stats, draws, z, model=game)
    t_prior = players.discriminate(game, state.params.adversary, {}, x, draws.z_prior, train=True)[0]
    np.testing.assert_allclose(
        negative_elbo + loss, jnp.mean(terms.reconstruction + jnp.exp(t_prior[0]) - 1), rtol=1e-5
    )


def test_unknown_divergence():
    with pytest.raises(UserError, match="divergence='js': must be one of jensen_shannon, kl"):
        gaussian.model(divergence="js")


def test_an_adversarial_autoencoder_has_no_contrast(images, sgd):
    model = small_model("aae", contrast="adaptive")
    state = aae.init(jax.random.key(0), model, sgd, images)
    with pytest.raises(UserError, match="contrast='adaptive': the T of an adversarial autoencoder sees no x"):
        aae.train_step(jax.random.key(3), state, images, model=model, optimizers=sgd)


def test_what_a_vae_gan_needs_is_named(images, sgd):
    model = small_model("vaegan")
    no_features = dataclasses.replace(model, networks=model.networks._replace(adversary=networks.LatentAdversary((3,))))
    no_moments = small_model("vaegan", encoder=networks.BlackBoxEncoder)
    for broken, message in ((no_features, "needs features"), (no_moments, "needs an encoder that returns")):
        state = vaegan.init(jax.random.key(0), broken, sgd, images)
        with pytest.raises(UserError, match=message):
            vaegan.train_step(jax.random.key(1), state, images, model=broken, optimizers=sgd)


class KnownDensity(nn.Module):
    """The Gaussian encoder of the known game, telling its density in the place of its moments, too high by `extra` nats."""

    extra: float = 0.0

    @nn.compact
    def __call__(self, x, noise):
        z = gaussian.LinearEncoder(name="q")(x, noise)
        log_q = distributions.normal_log_prob(noise).sum(-1) - 2 * self.variables["params"]["q"]["log_s"].mean()
        return Posterior(z, log_q=log_q + self.extra)


def test_a_vae_takes_any_density():
    """Its KL term is log q - log p at the draws, for a Gaussian the closed form on average; what is told too high costs."""
    x = jnp.tile(jnp.array([[0.5, -1.0], [1.0, 0.2]]), (50_000, 1))
    elbos = []
    for extra in (0.0, 0.5):
        model = Model(Players(KnownDensity(extra), gaussian.LinearDecoder()), StandardNormal(2), gaussian.model().likelihood, 2)
        state = vae.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), x[:4])
        elbos.append(vae.elbo_terms(jax.random.key(1), state, x, model=model).elbo)
    exact = -gaussian.analytic_negative_elbo(state.params.encoder["q"], state.params.decoder, x[:2])
    assert abs(elbos[0].mean() - exact) < 4 * elbos[0].std() / np.sqrt(len(x))
    np.testing.assert_allclose(elbos[0] - elbos[1], 0.5, atol=1e-4)


def test_a_wrong_log_q_is_named(images, sgd):
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return Posterior(noise, log_q=jnp.zeros((3, 3)))

    model = small_model("vae")
    model = dataclasses.replace(model, networks=model.networks._replace(encoder=Wrong()))
    state = vae.init(jax.random.key(0), model, sgd, images)
    with pytest.raises(UserError, match=r"encoder's log_q: returned shape \(3, 3\), expected \(8,\)"):
        vae.train_step(jax.random.key(1), state, images, model=model, optimizers=sgd)


def test_a_judgement_is_as_good_as_a_number(images):
    """An adversary of pairs may tell its features as well."""

    class Telling(nn.Module):
        @nn.compact
        def __call__(self, x, z):
            h = jnp.concatenate([x.reshape(len(x), -1), z], -1)
            return Judgement(nn.Dense(1)(h)[:, 0], h)

    model = small_model("avb")
    model = dataclasses.replace(model, networks=model.networks._replace(adversary=Telling()))
    state = avb.init(jax.random.key(0), model, Players(*[optax.sgd(0.1)] * 3), images)
    state, info = avb.train_step(jax.random.key(1), state, images, model=model, optimizers=Players(*[optax.sgd(0.1)] * 3))
    assert np.isfinite(info.adversary_loss).all()


def test_every_kind_of_player_is_known():
    for functions in METHODS.values():
        assert functions.PLAYERS.encoder in ("implicit", "black_box", "gaussian", "density", None)
        assert functions.PLAYERS.decoder in ("likelihood", "deterministic")
        assert functions.PLAYERS.adversary in ("pairs", "latents", "images", None)
