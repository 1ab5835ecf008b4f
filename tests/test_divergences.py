"""The divergences that an adversary may minimise: each is least at the log ratio, and gives the same ELBO there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax.divergences import DIVERGENCES, GENERATOR_DIVERGENCES, jensen_shannon
from tests.gaussian import POINTS, Game, log_normal

GRID = np.linspace(-6.0, 6.0, 2001)
LOG_Q = np.asarray(log_normal(GRID, 0.7, np.log(0.8)))
LOG_P = np.asarray(log_normal(GRID))


def test_each_divergence_by_hand():
    # T_q = log 3 and T_p = log 2; the formulas of section 5.3 with f's conjugates.
    by_hand = {
        "jensen_shannon": np.log(4 / 3) + np.log(3),
        "kl": 2 - 1 - np.log(3),
        "reverse_kl": np.log(2) - 1 + 1 / 3,
        "pearson": 4 - 1 - 2 * (3 - 1),
        "hellinger": np.sqrt(2) - 1 - (1 - 1 / np.sqrt(3)),
    }
    assert by_hand.keys() == DIVERGENCES.keys()
    for name, loss in DIVERGENCES.items():
        np.testing.assert_allclose(loss(jnp.log(3.0), jnp.log(2.0)), by_hand[name], rtol=1e-5, err_msg=name)


def test_the_logistic_one_does_not_overflow():
    assert np.isfinite(jensen_shannon(jnp.array([-1e4, 1e4]), jnp.array([1e4, -1e4]))).all()


def expected_loss(divergence, t):
    """E_q and E_p of a loss, by quadrature on GRID, for T on the grid."""
    loss, zero = DIVERGENCES[divergence], jnp.zeros_like(t)
    on_q, on_p = loss(t, zero), loss(zero, t)
    cell = GRID[1] - GRID[0]
    return jnp.sum((on_q - loss(0.0, 0.0)) * np.exp(LOG_Q) + on_p * np.exp(LOG_P)) * cell


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_each_is_least_at_the_log_ratio(divergence):
    """T = a + b z + c z^2, which the log ratio of two Gaussians is, fitted from T = 0; and pointwise, by the gradient."""
    exact = LOG_Q - LOG_P
    np.testing.assert_allclose(jax.grad(lambda t: expected_loss(divergence, t))(jnp.asarray(exact)), 0, atol=1e-6)
    features = jnp.stack([jnp.ones_like(GRID), GRID, GRID**2])
    loss = lambda coefficients: expected_loss(divergence, coefficients @ features)  # noqa: E731
    solver = optax.lbfgs()
    coefficients = jnp.zeros(3)
    state, value_and_grad = solver.init(coefficients), optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(coefficients, state):
        value, gradient = value_and_grad(coefficients, state=state)
        update, state = solver.update(gradient, state, coefficients, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(coefficients, update), state

    for _ in range(60):
        coefficients, state = step(coefficients, state)
    expected = np.polynomial.polynomial.polyfit(GRID, exact, 2)
    np.testing.assert_allclose(coefficients, expected, atol=0.02)


@pytest.mark.parametrize(
    "divergence",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "jensen_shannon")) for name in DIVERGENCES],
)
@pytest.mark.slow
def test_elbos_under_each_agree(divergence):
    """In the game whose T can be exact, T trained by each loss from a wrong start gives the ELBO that is known.

    q has a standard deviation of 0.82: under 0.71, p/q has no variance under q, and reverse_kl's gradient none either.
    """
    game = Game(divergence=DIVERGENCES[divergence])
    wider = {"log_s": jnp.full(2, -0.2)}
    encoder, exact = ({**params, **wider} for params in (game.params.encoder, game.params.adversary))
    game.params = game.params._replace(encoder=encoder)
    x = jnp.tile(POINTS, (1000, 1))
    start = {**exact, "offset": jnp.array(0.3), "m": jnp.array([0.7, 0.9])}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 800))

    @jax.jit
    def train(adversary):
        def step(carry, key):
            adversary, opt_state = carry
            draws = game.draw(key, x)
            gradient, _ = jax.grad(game.loss_of_t, has_aux=True)(adversary, draws, game.z(draws))
            update, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(adversary, update), opt_state), None

        return jax.lax.scan(step, (adversary, optimizer.init(adversary)), jax.random.split(jax.random.key(1), 800))[0][0]

    draws = game.draw(jax.random.key(2), x)
    known, off, trained = (game.terms(draws, adversary).elbo.mean() for adversary in (exact, start, train(start)))
    assert abs(off - known) > 0.1
    assert abs(trained - known) < 0.03


# f of each divergence E_model[f(data / model)], as a reader of Poole et al. (2016) has it.
F_OF = {
    "jensen_shannon": lambda u: u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2),
    "kl": lambda u: u * jnp.log(u),
    "reverse_kl": lambda u: -jnp.log(u),
    "pearson": lambda u: (u - 1) ** 2,
    "hellinger": lambda u: (jnp.sqrt(u) - 1) ** 2,
}
F_OF["non_saturating"] = lambda u: F_OF["reverse_kl"](u) - F_OF["jensen_shannon"](u)


@pytest.mark.parametrize("name", GENERATOR_DIVERGENCES)
def test_a_generator_s_objective_has_the_gradient_of_its_divergence(name):
    """By quadrature, of a model N(m, s^2): through its samples with T held fixed, and of the divergence as it is written."""
    model, cell = jnp.array([0.3, np.log(1.1)]), GRID[1] - GRID[0]
    density = lambda z, model: jnp.exp(log_normal(z, model[0], model[1]))  # noqa: E731

    def divergence(model):
        u = jnp.exp(LOG_Q) / density(GRID, model)
        return jnp.sum(density(GRID, model) * F_OF[name](u)) * cell

    def objective(moved):  # of samples m + s eps, weighted by the density of eps
        x = moved[0] + jnp.exp(moved[1]) * GRID
        t = log_normal(x, 0.7, np.log(0.8)) - log_normal(x, model[0], model[1])
        return jnp.sum(jnp.exp(LOG_P) * GENERATOR_DIVERGENCES[name](t)) * cell

    np.testing.assert_allclose(jax.grad(objective)(model), jax.grad(divergence)(model), rtol=2e-3, atol=1e-4)


def test_the_non_saturating_one_does_not_overflow():
    assert np.isfinite(GENERATOR_DIVERGENCES["non_saturating"](jnp.array([-1e4, 1e4]))).all()
