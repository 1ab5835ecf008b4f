"""Cubature and grids against closed forms, wherever the mass is; what they cannot resolve is said."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from avb_jax import Method, State, UserError
from avb_jax.distributions import normal, standard_normal
from avb_jax.evaluation import Quadrature, quadrature
from avb_jax.evaluation.run import evaluate
from tests.conftest import small_method
from tests.evaluation.common import over
from tests.ppca import Case

SHIFT = -3.0  # log p(x) of every example of `of_joint`


def log_normal(z, mean=0.0, std=1.0):
    """Log N(z; mean, std^2), element by element."""
    return -0.5 * jnp.square((z - mean) / std) - jnp.log(std) - 0.5 * np.log(2 * np.pi)


def log_integral(log_prob, x, prior, points=None, chunk=20_000):
    """`quadrature.log_integral`, compiled."""
    return jax.jit(lambda x: quadrature.log_integral(log_prob, x, prior, points, chunk))(x)


def of_joint(log_joint, prior):
    """A log p(x|z) for `log_integral` with log p(z) p(x|z) = log_joint(z [G, 1, Z], x [N, ...]) + SHIFT."""
    return lambda z, x: log_joint(z[:, None], x) + SHIFT - prior.log_prob(z)[:, None]


def linear_gaussian(dim, x, w=0.9, s=0.5):
    """The estimate for p(x|z) = N(w z, s^2) in each dimension, and log p(x) = log N(0, w^2 + s^2)."""
    log_prob = lambda z, x: jnp.sum(log_normal(x, w * z[:, None], s), axis=-1)  # noqa: E731
    expected = jnp.sum(log_normal(x, 0.0, np.hypot(w, s)), axis=-1)
    return log_integral(log_prob, x, standard_normal(dim)), expected


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_linear_gaussian_model(dim):
    """Also where x = 8.3 pulls the posterior to mean 7, which a grid over the prior alone would not hold."""
    w, s = 0.9, 0.5
    x = jnp.concatenate([jax.random.normal(jax.random.key(0), (5, dim)), jnp.full((1, dim), 0.1).at[0, 0].set(8.3)])
    estimate, expected = linear_gaussian(dim, x, w, s)
    np.testing.assert_allclose(estimate.log_likelihood, expected, atol=1e-4)
    assert np.all(estimate.error <= 1.1 * quadrature.TOLERANCE)
    assert np.all(estimate.boundary_share < 1e-6)
    assert quadrature.doubts(estimate) == []
    if dim < 3:  # where the first cells' halves are narrow enough: a half's share at the posterior's peak
        peak = 0.5 * 12.0 / quadrature.POINTS[dim] / (s / np.hypot(w, s) * np.sqrt(2 * np.pi))
        assert np.all(estimate.largest_share[:5] <= 1.001 * peak**dim)
        assert np.all(estimate.largest_share[:5] > 0.8 * peak**dim)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.slow
def test_posteriors_of_any_place_and_width(dim):
    at, std = np.array([0.3, 7.0, 0.0, -16.0]), np.array([1e-3, 0.29, 1.0, 0.05])
    mean = np.full((4, dim), 0.123)
    mean[:, -1] = at
    x = jnp.asarray(np.concatenate([mean, std[:, None]], axis=1), jnp.float32)
    log_joint = lambda z, x: jnp.sum(log_normal(z, x[:, :-1], x[:, -1:]), axis=-1)  # noqa: E731
    estimate = log_integral(of_joint(log_joint, standard_normal(dim)), x, standard_normal(dim))
    np.testing.assert_allclose(estimate.log_likelihood, SHIFT, atol=3e-4)
    assert quadrature.doubts(estimate) == []
    assert np.all(estimate.boundary_share < 1e-6)


def test_several_narrow_modes_far_apart():
    """Five in the plane of std 0.01 with weights 1 to 5, the last one of std 0.05."""
    modes = jnp.asarray(2.5 * np.random.default_rng(0).standard_normal((3, 5, 2)), jnp.float32)
    std = jnp.array([0.01, 0.01, 0.01, 0.01, 0.05])[:, None]

    def log_joint(z, modes):
        each = jnp.sum(log_normal(z[:, :, None], modes, std), axis=-1)
        return jax.nn.logsumexp(each, axis=-1, b=jnp.arange(1, 6))

    estimate = log_integral(of_joint(log_joint, standard_normal(2)), modes, standard_normal(2))
    np.testing.assert_allclose(estimate.log_likelihood, SHIFT + np.log(15), atol=3e-4)
    assert quadrature.doubts(estimate) == []


def winding(turns, std, points=None):
    """The estimate for z_1 ~ N(0, 0.5^2), z_2 ~ N(sin(turns z_1), std^2): an integral of 1, times e^SHIFT."""

    def log_joint(z, x):
        return x + log_normal(z[..., 0], 0.0, 0.5) + log_normal(z[..., 1], jnp.sin(turns * z[..., 0]), std)

    return log_integral(of_joint(log_joint, standard_normal(2)), jnp.zeros(1), standard_normal(2), points)


def test_a_winding_posterior_and_one_that_winds_too_much():
    estimate = winding(2.0, 0.05)
    np.testing.assert_allclose(estimate.log_likelihood, SHIFT, atol=1e-3)
    assert quadrature.doubts(estimate) == []
    beyond = winding(20.0, 1e-4, points=10)
    assert abs(beyond.log_likelihood - SHIFT) > 0.01
    assert beyond.error > quadrature.LARGEST_ERROR
    assert beyond.largest_share < quadrature.LARGEST_SHARE  # which does not show it
    assert "1 examples is too narrow or winding" in quadrature.doubts(beyond)[0]


def test_a_posterior_beyond_the_grid_is_reported():
    log_joint = lambda z, x: log_normal(z[..., 0], x, 0.5)  # noqa: E731
    estimate = log_integral(of_joint(log_joint, standard_normal(1)), jnp.array([0.0, 60.0]), standard_normal(1))
    np.testing.assert_allclose(estimate.log_likelihood[0], SHIFT, atol=1e-4)
    assert estimate.log_likelihood[1] < -100
    np.testing.assert_allclose(estimate.boundary_share, [0, 1], atol=1e-3)
    assert "1 examples is so far from 0" in quadrature.doubts(estimate)[-1]


def test_what_the_estimate_says_of_itself_by_hand(monkeypatch):
    """Of N(0.7, 1) and N(20, 15^2) in one dimension, split once: every cell in NumPy, by the Gauss rule that NumPy knows."""
    monkeypatch.setattr(quadrature, "TOLERANCE", 1.0)
    gauss, weights = np.polynomial.legendre.leggauss(2)
    log_joint = lambda z, x: log_normal(z[..., 0], x[:, 0], x[:, 1])  # noqa: E731
    x = np.array([[0.7, 1.0], [20.0, 15.0]])
    estimate = log_integral(of_joint(log_joint, standard_normal(1)), jnp.asarray(x), standard_normal(1), points=8)
    edges = np.concatenate([[-51, -27, -15, -9], np.arange(-6, 6.1, 1.5), [9, 15, 27, 51]])
    for i, (mean, std) in enumerate(x):

        def integral(low, high, mean=mean, std=std):
            z = (low + high) / 2 + (high - low) / 2 * gauss
            return np.sum(weights * stats.norm.pdf(z, mean, std)) * (high - low) / 2

        cells = list(itertools.pairwise(edges))
        halves = np.array([[integral(a, (a + b) / 2), integral((a + b) / 2, b)] for a, b in cells])
        wholes = np.array([integral(a, b) for a, b in cells])
        total = halves.sum()
        np.testing.assert_allclose(estimate.log_likelihood[i], np.log(total) + SHIFT, rtol=1e-5)
        np.testing.assert_allclose(estimate.error[i], np.sum(np.abs(halves.sum(axis=1) - wholes)) / total, rtol=5e-3)
        np.testing.assert_allclose(estimate.largest_share[i], halves.max() / total, rtol=1e-4)
        np.testing.assert_allclose(estimate.boundary_share[i], halves[[0, -1]].sum() / total, rtol=1e-4, atol=1e-30)
    assert estimate.boundary_share[1] > 0.1


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_first_grid_fills_a_cube(dim):
    centre, width, edge = quadrature.first_grid(dim)
    ends = np.abs(np.asarray(centre)) + np.asarray(width) / 2
    np.testing.assert_allclose(np.sum(np.prod(np.asarray(width, np.float64), axis=1)), (2 * ends.max()) ** dim, rtol=1e-5)
    assert ends.max() >= quadrature.REACH
    outermost = np.abs(np.asarray(centre[:, 0])) > edge
    np.testing.assert_allclose(ends[outermost, 0], ends.max(), rtol=1e-5)
    assert np.all(ends[~outermost, 0] < 0.9 * ends.max())
    assert len(np.unique(np.asarray(centre), axis=0)) == len(centre)


def test_it_does_not_depend_on_the_chunk():
    x = jnp.ones((3, 2))
    log_prob = lambda z, x: jnp.sum(log_normal(x, z[:, None], np.exp(-3.0)), axis=-1)  # noqa: E731
    one, two = (log_integral(log_prob, x, standard_normal(2), points=10, chunk=c) for c in (100, 3600))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, two)


@pytest.mark.parametrize("sigma", [0.3, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_probabilistic_pca(sigma):
    """784 pixels, a posterior's standard deviation of 0.11 and 0.036; one example alone has the same estimate."""
    case = Case(2, sigma, count=4)
    estimate = over(Quadrature(), case.method, case.state, case.x)
    assert estimate.largest_share.max() < 0.3
    np.testing.assert_allclose(estimate.log_likelihood, case.log_likelihood, atol=2e-2)
    assert quadrature.doubts(estimate) == []
    one = jax.jit(lambda x: Quadrature()(case.method, None, case.state, x))(case.x[2])
    np.testing.assert_allclose(one.log_likelihood, estimate.log_likelihood[2], rtol=1e-6)


def test_many_latents_are_refused():
    for refused in (
        lambda: quadrature.log_integral(lambda z, x: z, jnp.zeros(1), standard_normal(4)),
        lambda: quadrature.mixture_kl(jnp.zeros((1, 4)), jnp.ones((1, 4)), standard_normal(4)),
    ):
        with pytest.raises(UserError, match="latent_dim=4: quadrature serves 1 to 3"):
            refused()


GOOD = quadrature.QuadratureEstimate(np.zeros(4), np.full(4, 1e-3), np.full(4, 0.2), np.zeros(4))
ONE = np.arange(4) == 1


def test_doubts():
    assert quadrature.doubts(GOOD) == []
    (coarse,) = quadrature.doubts(GOOD._replace(largest_share=np.where(ONE, 0.4, 0.2)))
    (inexact,) = quadrature.doubts(GOOD._replace(error=np.where(ONE, 0.02, 1e-3)))
    (unknown,) = quadrature.doubts(GOOD._replace(error=np.where(ONE, np.nan, 1e-3)))
    assert coarse == inexact == unknown
    both = GOOD._replace(largest_share=np.where(ONE, 0.4, 0.2), boundary_share=np.where(ONE, 0.0, 0.01))
    assert [line.split(" examples")[0] for line in quadrature.doubts(both)] == ["the posterior of 1", "the posterior of 3"]


class Doubtful(Quadrature):
    """One with results that are given."""

    def over(self, method, key, state, images, numbers, binarize):
        return jax.tree.map(
            lambda a: jnp.asarray(a)[numbers % 4],
            GOOD._replace(largest_share=np.where(ONE, 0.4, 0.2), boundary_share=0.1 * ONE),
        )


def test_a_report_has_the_doubts():
    case = Case(2, count=4)
    report = evaluate(case.method, case.state, case.x, [Doubtful()], quiet=True)
    number = report["log_likelihood", "quadrature"]
    assert (number.mean, number.examples, number.estimator_error) == (0, 4, None)
    assert [note.split(";")[0] for note in report.notes] == [
        "vae: quadrature: the posterior of 1 examples is too narrow or winding for the grid",
        f"vae: quadrature: the posterior of 1 examples is so far from 0 that part of it may lie beyond the grid's end at "
        f"{quadrature.REACH:g}",
    ]


def test_what_it_needs():
    assert Quadrature().lacks(small_method("avb")) == ""
    assert Quadrature().lacks(small_method("bigan")) == "has no likelihood p(x|z)"
    assert Quadrature().lacks(Case(4, count=1).method) == "quadrature serves 1 to 3 latents; use an estimator that samples"
    for field in ("points", "chunk", "images"):
        with pytest.raises(UserError, match=f"{field}=0: must be at least 1"):
            Quadrature(**{field: 0})


def test_points_are_those_of_the_first_grid():
    """From 8 cells and from 200 the last splits differ, and the integrals agree."""
    prior = standard_normal(1)

    def decode(state, z):
        return normal(z, 0.05)

    method = Method("line", None, None, None, prior, decode=decode, log_joint=decode)
    state, x = State(jnp.zeros((), jnp.int32), {}, None, None), np.array([[0.3]], np.float32)
    few, more = (over(Quadrature(points=points), method, state, x) for points in (8, 200))
    np.testing.assert_allclose(
        [few.log_likelihood, more.log_likelihood], stats.norm.logpdf(0.3, 0, np.hypot(1, 0.05)), atol=5e-3
    )
    assert few.error != more.error


def gaussian_kl(mean, std):
    """KL(N(mean, diag std^2), N(0, I))."""
    return 0.5 * np.sum(np.square(mean) + np.square(std) - 1 - 2 * np.log(std), axis=-1)


@pytest.mark.parametrize(("mean", "std"), [([0.5, -1.0], [0.4, 1.2]), ([1.0, 2.0], [0.005, 0.005]), ([9.0, 0.0], [0.3, 0.4])])
def test_mixture_kl_of_one_gaussian_is_the_closed_form(mean, std):
    kl = quadrature.mixture_kl(jnp.array([mean]), jnp.array([std]), standard_normal(2))
    np.testing.assert_allclose(kl, gaussian_kl(np.array(mean), np.array(std)), rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_mixture_kl_of_far_components_by_hand(dim):
    # Components that do not overlap: KL = mean of the components' KLs - log n.
    mean = np.zeros((3, dim))
    mean[:, -1] = [-3.0, 3.0, 12.0]
    std = np.array([0.3, 0.3, 0.004])[:, None] * np.ones(dim)
    kl = quadrature.mixture_kl(mean, std, standard_normal(dim))
    np.testing.assert_allclose(kl, gaussian_kl(mean, std).mean() - np.log(3), rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 2])
def test_mixture_kl_of_components_inside_each_other(dim):
    """Against an integrator of SciPy's, in any order of the components; further latents alike and independent."""
    mean, std = np.array([0.1, 0.0, 0.12, -0.4]), np.array([0.01, 1.0, 0.002, 0.3])

    def integrand(z):
        log_q = special.logsumexp(-0.5 * ((z - mean) / std) ** 2 - np.log(std)) - np.log(4 * np.sqrt(2 * np.pi))
        return np.exp(log_q) * (log_q + 0.5 * z**2 + 0.5 * np.log(2 * np.pi))

    breaks = np.unique(np.concatenate([mean + k * std for k in (-8, -4, -2, -1, 0, 1, 2, 4, 8)]))
    exact = sum(integrate.quad(integrand, a, b, epsabs=1e-10)[0] for a, b in itertools.pairwise(breaks))
    exact += (dim - 1) * gaussian_kl(np.array([0.7]), np.array([0.2]))
    means, stds = (np.stack([a] + [np.full(4, b)] * (dim - 1), axis=1) for a, b in ((mean, 0.7), (std, 0.2)))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        kl = quadrature.mixture_kl(means[order], stds[order], standard_normal(dim))
        np.testing.assert_allclose(kl, exact, atol=1e-4)
    np.testing.assert_allclose(quadrature.mixture_kl(means, stds, standard_normal(dim), chunk=100), exact, atol=1e-4)


def test_mixture_kl_of_crossing_components(monkeypatch):
    """Wide in one latent and narrow in the other: against a plain grid in NumPy, and refused where grids do not suffice."""
    axis = (np.arange(1200) + 0.5) / 100 - 6
    log_n = [-0.5 * (axis / s) ** 2 - np.log(s * np.sqrt(2 * np.pi)) for s in (1.0, 0.1)]
    log_q = np.logaddexp(log_n[0][:, None] + log_n[1], log_n[1][:, None] + log_n[0]) - np.log(2)
    exact = np.sum(np.exp(log_q) * (log_q - log_n[0][:, None] - log_n[0])) * 1e-4
    kl = quadrature.mixture_kl(np.zeros((2, 2)), np.array([[1, 0.1], [0.1, 1]]), standard_normal(2))
    np.testing.assert_allclose(kl, exact, atol=2e-4)
    monkeypatch.setattr(quadrature, "FINEST", 48**2)
    with pytest.raises(UserError, match="two grids of 48 points per latent differ by"):
        quadrature.mixture_kl(np.zeros((2, 2)), np.array([[1, 0.1], [0.1, 1]]), standard_normal(2))


@pytest.mark.parametrize(("mean", "std"), [(np.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, np.inf)])
def test_mixture_kl_refuses_what_is_no_gaussian(mean, std):
    with pytest.raises(UserError, match="must be finite, and std positive"):
        quadrature.mixture_kl(jnp.array([[mean], [0.0]]), jnp.array([[1.0], [std]]), standard_normal(1))
