"""Bounds on a sampler's own density, and what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from avb_jax import UserError
from avb_jax.inference.checks import Diagnostics, Weighed, Weigher, check_finite, summarise

KEY = jax.random.key(7)


def linear(matrix, mean, std):
    """Moments of z given u where q is Gaussian, and q."""

    def conditional(u):
        center = mean + u @ matrix.T
        return center, jnp.broadcast_to(std, center.shape)

    return conditional, stats.multivariate_normal(mean, matrix @ matrix.T + np.diag(np.square(std)))


@pytest.mark.parametrize("size", [2, 30])
@pytest.mark.slow
def test_a_gaussian_is_known(size):
    """Where z is linear in u, Gauss and Newton's method ends after a step, and both bounds are log q in any dimension."""
    generator = np.random.default_rng(0)
    matrix, mean = generator.standard_normal((size, size + 5)), generator.standard_normal(size)
    conditional, q = linear(matrix, mean, np.linspace(0.1, 0.3, size))
    found = Weigher(lambda _, u: conditional(u), lambda z: -0.5 * jnp.sum(z**2), size, size + 5, 64)(None, KEY, 200)
    exact = q.logpdf(np.float64(found.z))
    np.testing.assert_allclose(found.upper, exact, atol=1.0)
    assert abs(np.mean(found.upper - exact)) < 0.03
    assert abs(np.mean(found.lower - exact)) < 0.03
    np.testing.assert_allclose(found.log_density, -0.5 * np.square(found.z).sum(axis=1), rtol=1e-4)
    distance = (np.float64(found.z) - mean) @ np.linalg.inv(q.cov) * (np.float64(found.z) - mean)
    assert abs(distance.sum(axis=1).mean() - size) < 4 * np.sqrt(2 * size / 200)


def bent(u):
    """Z given u for u in two dimensions, of which the second bends z; std depends on u too."""
    return u[:, :1] + jnp.sin(3.0 * u[:, 1:]), 0.1 + 0.05 * jnp.square(u[:, 1:])


def test_a_bent_q_lies_between_its_bounds():
    """Against quadrature over u; few draws of u leave them apart, more bring them together."""
    grid = np.linspace(-5, 5, 401)
    u = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    mean, std = (np.float64(moment)[:, 0] for moment in bent(jnp.asarray(u, jnp.float32)))
    weight = stats.norm.pdf(u).prod(axis=1) * (grid[1] - grid[0]) ** 2
    widths = []
    for inner in (4, 1024):
        found = Weigher(lambda _, u: bent(u), lambda z: 0.0 * z[0], 1, 2, inner)(None, KEY, 1000)
        at = np.sort(np.float64(found.z)[:, 0])[::20]
        exact = np.log(np.sum(weight * stats.norm.pdf(at[:, None], mean, std), axis=1))
        exact = np.interp(np.float64(found.z)[:, 0], at, exact)
        for away in (exact - found.lower, found.upper - exact):
            assert away.mean() > -4 * away.std() / np.sqrt(len(away))
        widths.append(float(np.mean(found.upper - found.lower)))
    assert widths[1] < 0.03 < 0.1 < widths[0]


def test_a_z_that_two_u_make():
    """Of unequal weight: proposals near both are drawn as often as the weights have it."""
    grid, step = np.linspace(-6, 6, 20_001, retstep=True)
    found = Weigher(lambda _, u: (u**2 + u, 0.05 + 0.0 * u), lambda z: 0.0 * z[0], 1, 1, 1024)(None, KEY, 200)
    exact = np.log(stats.norm.pdf(found.z, grid**2 + grid, 0.05) @ stats.norm.pdf(grid) * step)
    assert abs(found.lower - exact).mean() < 0.1


@pytest.mark.parametrize("inner", [16, 64])
@pytest.mark.slow
def test_the_evidence_is_unbiased_however_many_inner_draws(inner):
    """The mean weight is p~'s integral, 3, even where few draws of u bound q."""

    def log_density(z):
        return jax.scipy.stats.norm.logpdf(z[0]) + jnp.log(3.0)

    found = Weigher(lambda _, u: bent(u), log_density, 1, 2, inner)(None, KEY, 5_000)
    weight = np.exp(np.float64(found.log_weight))
    assert abs(weight.mean() - 3) < 4 * weight.std() / np.sqrt(len(weight))
    numbers = summarise(found)
    assert abs(numbers["log_evidence"] - np.log(3)) < 4 * numbers["log_evidence_error"]
    np.testing.assert_allclose(numbers["log_evidence_error"], weight.std() / weight.mean() / np.sqrt(len(weight)), rtol=0.02)
    assert numbers["elbo_lower"] < np.log(3)
    np.testing.assert_allclose(numbers["elbo_error"], found.log_weight.std() / np.sqrt(len(weight)), rtol=0.02)


def test_draws_without_a_density_weigh_nothing():
    """Log evidence with a weight of 0 for them, the ELBO of q without them; over a twentieth of them, no numbers."""
    generator = np.random.default_rng(0)
    log_density, upper = generator.normal(size=(2, 1000))
    lower = upper - 0.1
    log_density[:3] = -np.inf, np.nan, -np.inf
    found = summarise(Weighed(np.zeros((1000, 1)), log_density, upper, lower))
    weight = np.exp(log_density - upper)[3:].sum() / 1000
    np.testing.assert_allclose(found["log_evidence"], np.log(weight), rtol=1e-4)
    # Against the density of q without them, q / 0.997.
    np.testing.assert_allclose(found["elbo_lower"], np.mean((log_density - (upper - np.log(0.997)))[3:]), rtol=1e-6)
    np.testing.assert_allclose(found["elbo_upper"] - found["elbo_lower"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found["outside"], 0.003, rtol=1e-6)
    assert np.isfinite(list(found.values())).all()
    assert "At 0.003 of q's draws" in str(Diagnostics(**found))
    for bad, count in ((-np.inf, 60), (np.inf, 1)):
        found = summarise(Weighed(np.zeros((1000, 1)), np.r_[np.full(count, bad), log_density[count:]], upper, lower))
        assert np.isnan(found["log_evidence"])
        assert "of q's draws the density is not finite" in str(Diagnostics(**found))


@pytest.mark.slow
def test_a_q_that_float32_does_not_resolve_is_not_believed():
    """Its draws coincide with their means, so that the weights would be equal, and a q anywhere would seem to be done."""

    def numbers(std):
        found = Weigher(lambda _, u: (1e3 + 0.0 * u, std + 0.0 * u), lambda z: -z[0], 1, 1, 16)(None, KEY, 100)
        return summarise(found)

    assert np.isfinite(numbers(0.1)["log_evidence"])
    found = numbers(1e-6)
    assert np.isnan(found["log_evidence"])
    assert "narrower than float32" in Diagnostics(**found).doubts[0]


SOUND = Diagnostics(-1.0, -0.98, 0.01, -0.95, 0.01, 0.8, 0.2, -0.97, 0.01, 1.2, 0.6, 0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Nothing speaks against it"),
        ({"elbo_upper": -0.5, "effective_share": 0.09}, "Do not believe it: the bounds on q's own ELBO lie 0.5 nats apart"),
        ({"elbo_upper": -0.5, "pareto_k": 0.9}, "Do not believe it: the bounds on q's own ELBO lie 0.5 nats apart"),
        ({"pareto_k": 0.9}, "Pareto k is 0.90, over 0.7"),
        ({"pareto_k": float("nan")}, "Pareto k is nan"),
        ({"elbo_under_t": -0.5}, "T puts the ELBO 0.48 nats above"),
        ({"elbo_lower": float("nan")}, "the density is not finite"),
        ({"elbo_lower": None}, "which nothing vouches for"),
    ],
)
def test_what_is_said(changes, words):
    found = SOUND._replace(**changes)
    assert words in str(found)
    assert bool(found.doubts) == bool(changes)


def test_even_weights_vouch_for_a_q_sharper_than_its_bounds_resolve():
    """KL(p, q) <= log E_q[(p / q)^2], whose estimate is the log of draws over their effective number."""
    found = SOUND._replace(elbo_lower=-1.8, elbo_upper=-0.9, effective_share=0.5)
    assert not found.doubts
    said = str(found)
    assert "KL(q, p) is 0 to 0.85 nats" in said
    assert "By the weights KL(p, q) is at most 0.69 nats. The bounds on q's own ELBO lie 0.9 nats apart" in said
    assert "Nothing speaks against it" in said


def test_a_point_that_is_not_finite_is_named():
    z = jnp.array([[1.0, 2.0], [-1.0, 3.0]])
    with pytest.raises(UserError, match=r"log_density: at z = \[-1, 3\], here, it is nan \(1 of 2 points\)"):
        check_finite(lambda z: jnp.log(z[0]), z, "here")
    check_finite(lambda z: jnp.sum(z), z, "here")


def test_a_density_may_be_zero_at_few_points_but_not_at_the_first():
    def bounded(z):
        return jnp.where(z[0] > 0, -z[0], -jnp.inf)

    z = jnp.linspace(1.0, 100.0, 100)[:, None]
    check_finite(bounded, z.at[-5:].multiply(-1.0), "here")
    check_finite(bounded, z.at[-50:].multiply(-1.0), "here", without=0.5)
    for bad in (z.at[-6:].multiply(-1.0), z.at[0].multiply(-1.0)):
        with pytest.raises(UserError, match=r"here, it is -inf"):
            check_finite(bounded, bad, "here")
