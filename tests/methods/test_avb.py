"""Propositions 1 and 2, Algorithm 1 by hand, the game whose ELBO is known in closed form, and T as it is evaluated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Draws, contrast, distributions, divergences, networks, players
from avb_jax.methods import avb
from tests.conftest import small_method, small_modules, small_networks
from tests.gaussian import POINTS, ExactLogRatio, Game, analytic_negative_elbo

COUNT = 200_000


@pytest.fixture(scope="module")
def game():
    """The game, and many draws at one fixed x per example (of four)."""
    game = Game()
    return game, game.draw(jax.random.key(1), jnp.tile(POINTS, (COUNT // 4, 1)))


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


def test_a_t_of_zero_is_right_half_of_the_time():
    t = jnp.array([[[0.0, 2.0, -1.0]], [[0.0, 0.0, -3.0]]])
    np.testing.assert_allclose(avb.adversary_terms(t, divergences.kl)[1].accuracy, [0.5, 0.75, 0.5])


def test_proposition_1_adversary_gradient_vanishes_at_the_log_ratio(game):
    game, draws = game
    parts = _in_parts(draws)

    def gradient(part, shift):
        adversary = {**game.params.adversary, "offset": jnp.array(shift)}
        return jax.grad(game.loss_of_t, has_aux=True)(adversary, part, game.z(part))[0]

    at_optimum = jax.vmap(lambda p: gradient(p, 0.0))(parts)
    jax.tree.map(lambda g: _within(g, 0.0), at_optimum)
    mean, error = _mean_and_error(jax.vmap(lambda p: gradient(p, 0.3))(parts)["offset"])
    assert mean > 10 * error  # and the check can fail: off the optimum it points back


def test_proposition_2_expected_gradient_of_optimal_t_is_zero(game):
    game, draws = game

    def t_star(q, x, z):  # q: the encoder's params where they occur in T* explicitly
        return ExactLogRatio().apply({"params": {**q, "offset": 0.0}}, x, z)

    gradients = jax.vmap(jax.grad(t_star), in_axes=(None, 0, 0))(game.params.encoder, draws.x, game.z(draws)[0])
    jax.tree.map(lambda g: _within(g, 0.0), gradients)


def test_exact_log_ratio_gives_the_analytic_elbo(game):
    game, draws = game
    expected = analytic_negative_elbo(game.params.encoder, game.params.decoder, POINTS)
    _within(-game.terms(draws).elbo, expected)


def test_exact_log_ratio_gives_the_gradients_of_the_analytic_elbo(game):
    game, draws = game
    params = game.params._replace(adversary=None)
    estimates = jax.vmap(lambda part: jax.grad(game.loss, has_aux=True)(params, part)[0])(_in_parts(draws))
    exact = jax.grad(analytic_negative_elbo, argnums=(0, 1))(params.encoder, params.decoder, POINTS)
    jax.tree.map(_within, (estimates.encoder, estimates.decoder), exact)


def test_beta_weighs_the_kl_alone(game):
    game, draws = game
    loss = [game.loss(game.params, draws, beta=beta)[0] for beta in (0.0, 1.0, 3.0)]
    np.testing.assert_allclose(loss[0], game.terms(draws).reconstruction.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss[2] - loss[1], 2 * (loss[1] - loss[0]), rtol=1e-4)


def test_no_loss_leaks_into_another_player(images):
    nets = small_networks("avb")
    state = small_method("avb").init(jax.random.key(0), images)
    prior = distributions.standard_normal(3)
    draws = players.draw(jax.random.key(1), images, prior, 3)

    def of_t(params, noise):  # of everything that the adversary's loss could reach
        z, _ = players.encode(nets.encoder, params.encoder, {}, images, noise, 3, train=True)
        compared = contrast.Compared(jnp.stack([z.z, draws.z_prior]))
        return avb.adversary_loss(params.adversary, state.collections, draws, compared, networks=nets, prior=prior)[0]

    gradient, noise_gradient = jax.jit(jax.grad(of_t, argnums=(0, 1)))(state.params, draws.noise)
    for leaf in jax.tree.leaves((gradient.encoder, gradient.decoder, noise_gradient)):
        assert not leaf.any()
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient.adversary))

    def of_others(params):
        options = {"networks": nets, "prior": prior, "likelihood": distributions.bernoulli}
        return avb.negative_elbo_adversarial(params, state.params.adversary, state.collections, draws, **options)[0]

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(of_others))(state.params).adversary))


def test_draws_are_of_the_step_s_own_randomness(images):
    prior = distributions.standard_normal(3)
    one, two = (players.draw(jax.random.key(k), images, prior, 3, 2) for k in (0, 1))
    assert one.noise.shape == one.z_prior.shape == (2, 8, 3)
    assert not np.allclose(one.noise, two.noise)
    assert not np.allclose(one.noise, one.z_prior)
    assert not np.allclose(one.noise[0], one.noise[1])


def test_several_draws_are_the_mean_of_single_ones(images):
    """The KL term and T's loss over S draws are those of each draw; the first one is decoded."""
    prior, nets = distributions.standard_normal(3), small_networks("avb")
    params, collections = small_method("avb").init(jax.random.key(0), images)[1:4:2]

    def both(draws):
        of_t = {"networks": nets, "prior": prior}
        _, found = avb.negative_elbo_adversarial(
            params, params.adversary, collections, draws, likelihood=distributions.bernoulli, **of_t
        )
        return found.terms, avb.adversary_loss(params.adversary, collections, draws, found.compared, **of_t)[1][0]

    draws = players.draw(jax.random.key(1), images, prior, 3, 4)
    terms, of_adversary = both(draws)
    singles = [both(Draws(draws.x, draws.noise[s : s + 1], draws.z_prior[s : s + 1])) for s in range(4)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(terms.kl, np.mean([term.kl for term, _ in singles], axis=0))
    close(terms.reconstruction, singles[0][0].reconstruction)
    mean = jax.tree.map(lambda *a: np.mean(a, axis=0), *(said for _, said in singles))
    jax.tree.map(close, of_adversary, mean)


@pytest.mark.parametrize("floor", [0.0, 0.5, 3.0])
def test_a_floor_under_t_costs_at_most_its_exponential(game, floor):
    """Under the optimal T, the KL rises, by no more than e^-c; where T is off it is -c at least, and without a gradient."""
    exact, draws = game
    floored = Game(adversary_floor=floor)
    rise = floored.terms(draws).kl - exact.terms(draws).kl
    assert (rise >= 0).all()
    assert 0 < rise.mean() < np.exp(-floor)
    off = {**exact.params.adversary, "offset": jnp.array(-1e3)}
    few = exact.draw(jax.random.key(1), POINTS)
    np.testing.assert_array_equal(floored.terms(few, off).kl, -floor)
    gradient = jax.grad(lambda params: floored.loss(params, few, off)[1].terms.kl.sum())(exact.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient.encoder))


def test_saturation_is_the_share_of_large_t():
    game = Game()
    draws = game.draw(jax.random.key(1), jnp.zeros((50, 2)))
    z = 2 * draws.z_prior
    far = {**game.params.adversary, "offset": jnp.array(1e3)}
    np.testing.assert_array_equal(game.loss_of_t(far, draws, z)[1].saturation, 1.0)
    t = jnp.stack([ExactLogRatio().apply({"params": game.params.adversary}, draws.x, a[0]) for a in (z, draws.z_prior)])
    expected = np.mean(abs(t) > avb.SATURATED, axis=0)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(game.loss_of_t(game.params.adversary, draws, z)[1].saturation, expected)


def test_the_zero_sum_form_is_the_loss_of_kl():
    """Eqs. 5.9 and 5.10: E_q[T] cancels in the sum of both players' losses, which leaves no part of T to the encoder."""
    game = Game(divergence=divergences.kl)
    draws = game.draw(jax.random.key(1), POINTS)
    negative_elbo, found = game.loss(game.params, draws)
    loss, _ = game.loss_of_t_between(game.params.adversary, draws, found.compared)
    t_prior = ExactLogRatio().apply({"params": game.params.adversary}, POINTS, draws.z_prior[0])
    np.testing.assert_allclose(negative_elbo + loss, jnp.mean(found.terms.reconstruction + jnp.exp(t_prior) - 1), rtol=1e-5)


@pytest.mark.parametrize("prior", ["standard", "other"])
def test_minus_log_prior_leaves_log_q_to_the_network(images, prior):
    """T = network - log p(z) up to a constant that makes it the network's own at the mode; |z|^2 / 2 for N(0, I)."""
    mean, std = (0.0, 1.0) if prior == "standard" else (0.5, 2.0)
    prior = distributions.normal(jnp.full(3, mean), jnp.full(3, std))
    nets, state = small_networks("avb"), small_method("avb").init(jax.random.key(0), images)
    z = jax.random.normal(jax.random.key(1), (2, 8, 3))
    both = [
        avb.evaluate_t(
            state.params.adversary,
            state.collections,
            images,
            z,
            networks=nets,
            prior=prior,
            contrast=settings[0],
            minus_log_prior=settings[1],
            train=False,
        )[0]
        for settings in (
            (contrast.PriorContrast(), False),
            (contrast.PriorContrast(), True),
            (contrast.GaussianContrast(), True),
        )
    ]
    np.testing.assert_allclose(both[1] - both[0], 0.5 * (((z - mean) / std) ** 2).sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[2] - both[0], 0.5 * (z**2).sum(-1), rtol=1e-4, atol=1e-5)


FROZEN = {"batch_norm": True, "noise_draws": 2}


@pytest.mark.parametrize("adaptive", [contrast.PriorContrast(), contrast.GaussianContrast(3)])
@pytest.mark.slow
def test_a_fresh_adversary_s_step_is_eq_3_3_s(images, adaptive):
    """T alone, at standardised z under contrast, with an encoder in evaluation mode; written out. T starts anew."""
    method = small_method("avb", contrast=adaptive, minus_log_prior=True, **FROZEN)
    modules, key = small_modules("avb", batch_norm=True), jax.random.key(5)
    trained, x = method.init(jax.random.key(0), images), images[:2]
    step = jax.jit(method.train_step)
    for i in range(2):  # so that the running statistics are no longer those at the start
        trained, _ = step(jax.random.key(i), trained, images)
    fresh = method.fresh_adversary(optax.sgd(0.1), trained)
    state = fresh.init(key, x)
    anew = method.init(key, x)
    for part in ("params", "collections"):
        expected = getattr(trained, part)._replace(adversary=getattr(anew, part).adversary)
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), expected)
    after, info = jax.jit(fresh.train_step)(key, state, x)
    noise_key, prior_key = jax.random.split(key)
    variables = {"params": trained.params.encoder, **trained.collections.encoder}

    def z_of(noise):
        return jnp.stack([modules.encoder.apply(variables, x, each) for each in noise])

    z, z_prior = z_of(jax.random.normal(noise_key, (2, 2, 3))), jax.random.normal(prior_key, (2, 2, 3))
    if isinstance(adaptive, contrast.GaussianContrast):
        fixed = z_of(jnp.repeat(jax.random.normal(jax.random.key(0), (3, 1, 3)), 2, axis=1))
        z = (z - fixed.mean(axis=0)) / fixed.std(axis=0, ddof=1)

    def loss(psi):
        pairs = jnp.concatenate([x] * 4), jnp.concatenate([*z, *z_prior])
        variables = {"params": psi, **state.collections.adversary}
        t, stats = modules.adversary.apply(variables, *pairs, train=True, mutable=["batch_stats"])
        t = t + jnp.sum(pairs[1] ** 2, axis=-1) / 2
        return jnp.mean(jnp.logaddexp(0, -t[:4]) + jnp.logaddexp(0, t[4:])), stats

    gradient, stats = jax.grad(loss, has_aux=True)(state.params.adversary)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params.adversary, gradient)
    assert int(after.step) == 1
    jax.tree.map(close, after.params, trained.params._replace(adversary=expected))
    jax.tree.map(close, after.collections, trained.collections._replace(adversary=stats))
    close(jnp.mean(info.adversary_loss), loss(state.params.adversary)[0])


@pytest.mark.parametrize("adaptive", [contrast.PriorContrast(), contrast.GaussianContrast(3)])
def test_what_t_says_of_an_example_is_what_its_losses_say(images, adaptive):
    """Under either contrast, on the same draws in evaluation mode: each example's loss, accuracy, saturation, T and KL."""
    options = {"batch_norm": True, "encoder": networks.GaussianEncoder}
    method, nets = small_method("avb", contrast=adaptive, **options), small_networks("avb", **options)
    state, prior = method.init(jax.random.key(0), images), method.prior
    found = method.adversary(jax.random.key(1), state, images, 5)
    draws = players.draw(jax.random.key(1), images, prior, 3, 5)
    of_t = {"networks": nets, "prior": prior, "contrast": adaptive, "train": False}
    variables = state.params.adversary, state.collections, draws
    _, generative = avb.negative_elbo_adversarial(state.params, *variables, likelihood=distributions.bernoulli, **of_t)
    _, (expected, _) = avb.adversary_loss(*variables, generative.compared, **of_t)
    for name, value in expected._replace(kl=generative.terms.kl)._asdict().items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-4, atol=1e-5, err_msg=name)
    t = nets.adversary.apply(
        {"params": state.params.adversary, **state.collections.adversary}, images, generative.compared.z[0, 0], train=False
    )[0]
    alone = draws._replace(noise=draws.noise[:1], z_prior=draws.z_prior[:1])
    _, (one, _) = avb.adversary_loss(*variables[:2], alone, jax.tree.map(lambda a: a[:, :1], generative.compared), **of_t)
    np.testing.assert_allclose(one.t, t, rtol=1e-4, atol=1e-5)  # at the encoder's z, not at the prior's
