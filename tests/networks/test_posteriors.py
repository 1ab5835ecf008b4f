"""Encoders with a known density: what they say of q(z|x) is so."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from avb_jax import Posterior, UserError
from avb_jax.networks import MLP, GaussianEncoder
from avb_jax.networks.posteriors import AuxiliaryEncoder, FullCovarianceEncoder, IAFEncoder, PlanarFlowEncoder, RealNVPEncoder

COUNT = 200_000
# Per encoder, the spread of the params `_away` from the initial ones: as far from Gaussian as the estimates below bear.
INVERTIBLE = {FullCovarianceEncoder: 0.4, PlanarFlowEncoder: 0.5, IAFEncoder: 0.7, RealNVPEncoder: 0.4}
ALL = {**INVERTIBLE, AuxiliaryEncoder: 0.3}
X = jax.random.normal(jax.random.key(0), (4, 3))


def _noise_dim(kind, dim):
    return dim + (kind is AuxiliaryEncoder)


@functools.cache
def _away(kind, dim, **options):
    """An encoder, and normal random numbers for its params: far from its initial ones, which are mostly Gaussian."""
    small = {"widths": (7,)} if "widths" in kind.__dataclass_fields__ else {}
    encoder = kind(MLP((8,), jnp.tanh), dim, **small, **options)
    shapes = jax.eval_shape(encoder.init, jax.random.key(1), X, jnp.zeros((4, _noise_dim(kind, dim))))["params"]
    rng = np.random.default_rng(2)
    return encoder, jax.tree.map(lambda p: ALL[kind] * rng.standard_normal(p.shape, np.float32), shapes)


def _apply(kind, dim, x, noise, **options):
    encoder, params = _away(kind, dim, **options)
    return jax.tree.map(np.asarray, jax.jit(encoder.apply)({"params": params}, x, noise))


def _jacobians(kind, dim, noise, **options):
    """Of z in the noise [..., B, Z, Z], at the examples X, and log_q [..., B]."""
    encoder, params = _away(kind, dim, **options)

    def one(x, e):
        posterior = encoder.apply({"params": params}, x[None], e[None])
        return posterior.z[0], posterior.log_q[0]

    return jax.jit(jax.vmap(jax.vmap(jax.jacfwd(one, argnums=1, has_aux=True)), (None, 0)))(X, noise)


@pytest.mark.parametrize(
    ("kind", "dim"), [pair for pair in itertools.product(INVERTIBLE, (1, 2, 5)) if pair != (RealNVPEncoder, 1)]
)
def test_the_density_is_the_one_of_autodiff(kind, dim):
    noise = 2 * jax.random.normal(jax.random.key(3), (16, 4, dim))
    jacobians, log_q = _jacobians(kind, dim, noise)
    log_volume = np.linalg.slogdet(jacobians).logabsdet
    np.testing.assert_allclose(log_q, stats.norm.logpdf(noise).sum(-1) - log_volume, rtol=1e-4, atol=1e-4)
    if kind is not FullCovarianceEncoder and dim > 1:
        assert (log_volume.std(axis=0) > 0.02).all(), "the maps have to be far from affine for this to say anything"


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_the_density_integrates_to_one_where_the_draws_are(kind):
    """E_q[g / q] = 1 for any density g within q's support, here Gaussians: so of maps that are invertible globally alone."""
    posterior = _apply(kind, 2, X[3:], jax.random.normal(jax.random.key(4), (COUNT, 1, 2)))
    z, log_q = np.float64(posterior.z[:, 0]), np.float64(posterior.log_q[:, 0])
    for centre, width in itertools.product(z[log_q > np.median(log_q)][:4], (0.1, 0.3)):
        ratio = np.exp(stats.norm.logpdf(z, centre, width * z.std(axis=0)).sum(-1) - log_q)
        error = ratio.std() / np.sqrt(COUNT)
        assert error < 0.05
        assert abs(ratio.mean() - 1) < 4 * error


def test_the_planar_maps_meet_the_case_that_the_constraint_is_for():
    """Some w.u of the networks are below -1, where z + u tanh(w.z + b) alone would not be invertible."""
    encoder, params = _away(PlanarFlowEncoder, 2)
    features = encoder.trunk.apply({"params": params["trunk"]}, X[3:])
    u, w = ((features @ params[name]["kernel"] + params[name]["bias"]).reshape(8, 2) for name in "uw")
    assert (jnp.sum(u * w, axis=-1) < -1).any()


def test_the_auxiliary_draws_and_their_density_against_quadrature():
    """Over a grid of a's noise: draws fill cells as q(z|x) says; r is a density; log_q bounds log q(z|x), on average."""
    grid = np.linspace(-12, 12, 1601)
    at = lambda eps: _apply(AuxiliaryEncoder, 2, X[3:], np.c_[np.full((1601, 2), eps), grid][:, None])  # noqa: E731
    mean, log_weights = at(0.0).z[:, 0], stats.norm.logpdf(grid) + np.log(grid[1] - grid[0])
    std = at(1.0).z[:, 0] - mean
    z = _apply(AuxiliaryEncoder, 2, X[3:], jax.random.normal(jax.random.key(5), (COUNT, 1, 3))).z[:, 0]
    cells, mass = [], []
    for i in range(2):
        edges = np.quantile(z[:, i], np.linspace(0, 1, 7)[1:-1])
        cells.append(np.searchsorted(edges, z[:, i]))
        mass.append(np.diff(stats.norm.cdf(np.r_[-np.inf, edges, np.inf][:, None], mean[:, i], std[:, i]), axis=0))
    expected = COUNT * np.einsum("ia,ja,a->ij", *mass, np.exp(log_weights))
    counts = np.bincount(6 * cells[0] + cells[1], minlength=36).reshape(6, 6)
    np.testing.assert_allclose(expected.sum(), COUNT, rtol=1e-4)
    np.testing.assert_array_less(abs(counts - expected), 4.5 * np.sqrt(expected) + 1)

    eps = np.concatenate([(z[:20, None] - mean) / std, np.broadcast_to(grid[:, None], (20, 1601, 1))], axis=-1)
    log_q = _apply(AuxiliaryEncoder, 2, X[3:], eps[:, :, None]).log_q[:, :, 0]  # at 20 draws of z, whichever a they came with
    log_joint = log_weights + (stats.norm.logpdf(eps[..., :2]) - np.log(std)).sum(-1)  # q(a, z|x), times the grid's step
    np.testing.assert_allclose(special.logsumexp(log_joint - log_q, axis=1), 0, atol=1e-5)  # the integral of r(a|z, x)
    gap = (special.softmax(log_joint, axis=1) * log_q).sum(axis=1) - special.logsumexp(log_joint, axis=1)
    assert (gap > 0).all()  # KL(q(a|z, x), r(a|z, x))
    assert gap.mean() > 0.1


def test_with_the_exact_r_the_auxiliary_density_is_exact():
    """Linear-Gaussian: a ~ N(m, s^2), z = k a + c + t eps; then a given z is Gaussian and linear in z as well."""
    encoder = AuxiliaryEncoder(MLP((8,)), 2, widths=())
    noise = jax.random.normal(jax.random.key(6), (50, 4, 3))
    m, s, k, c, t = 0.4, 0.8, np.array([1.5, -0.7]), np.array([0.3, -1.0]), np.array([0.5, 0.9])
    variance = 1 / (1 / s**2 + np.sum(k**2 / t**2))
    shapes = jax.eval_shape(encoder.init, jax.random.key(1), X, noise)["params"]
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes)
    params["mean"]["bias"][:], params["log_std"]["bias"][:] = m, np.log(s)
    params["z_given_a"]["kernel_0"][:, :2] = k
    params["z_given_a"]["features_0"]["bias"][:] = [*c, *np.log(t)]
    params["a_given_z"]["kernel_0"][:, 0] = variance * k / t**2
    params["a_given_z"]["features_0"]["bias"][:] = variance * (m / s**2 - np.sum(k * c / t**2)), 0.5 * np.log(variance)
    posterior = jax.jit(encoder.apply)({"params": params}, X, noise)
    covariance = s**2 * np.outer(k, k) + np.diag(t**2)
    exact = stats.multivariate_normal.logpdf(posterior.z, c + k * m, covariance)
    np.testing.assert_allclose(posterior.log_q, exact, rtol=1e-4, atol=1e-4)


def test_the_full_covariance_is_the_one_of_its_draws():
    noise = jax.random.normal(jax.random.key(7), (COUNT, 4, 3))
    posterior = _apply(FullCovarianceEncoder, 3, X, noise)
    z, mean, std = map(np.float64, (posterior.z, posterior.mean, posterior.std))
    cholesky = _jacobians(FullCovarianceEncoder, 3, noise[:1])[0][0]
    np.testing.assert_array_equal(cholesky, jnp.tril(cholesky))
    np.testing.assert_array_less(abs(z.mean(axis=0) - mean) / std, 4 / np.sqrt(COUNT))
    np.testing.assert_allclose(z.std(axis=0) / std, 1, atol=4 / np.sqrt(2 * COUNT))
    covariance = cholesky @ cholesky.mT / (std[:, None] * std[:, :, None])
    assert abs(covariance - jnp.eye(3)).max() > 0.3
    for example, expected in enumerate(covariance):
        np.testing.assert_allclose(np.corrcoef(z[:, example].T), expected, atol=4 / np.sqrt(COUNT))


def test_a_step_of_iaf_is_autoregressive_and_alternating_steps_mix_all_latents():
    noise = jax.random.normal(jax.random.key(8), (3, 4, 5))
    seen = lambda kind, flows: (_jacobians(kind, 5, noise, flows=flows)[0] != 0).any(axis=(0, 1))  # noqa: E731
    np.testing.assert_array_equal(seen(IAFEncoder, 1), np.tri(5))
    assert all(seen(kind, flows).all() for kind, flows in ((IAFEncoder, 2), (RealNVPEncoder, 3)))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.slow
def test_every_draw_is_its_own_and_every_example(kind):
    noise = jax.random.normal(jax.random.key(9), (3, 4, _noise_dim(kind, 5)))
    together = _apply(kind, 5, X, noise)
    assert together.z.shape == (3, 4, 5)
    assert (together.mean is None) == (together.std is None) == (kind is not FullCovarianceEncoder)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for s, e in enumerate(noise):
        jax.tree.map(close, together.replace(z=together.z[s], log_q=together.log_q[s]), _apply(kind, 5, X, e))
    part = _apply(kind, 5, X[2:3], noise[:, 2:3])
    take = lambda moment: None if moment is None else moment[2:3]  # noqa: E731
    whole = Posterior(together.z[:, 2:3], take(together.mean), take(together.std), together.log_q[:, 2:3])
    jax.tree.map(close, whole, part)


@pytest.mark.parametrize("kind", ALL)
def test_where_q_starts(kind):
    """All near the prior and finite, the invertible ones at the Gaussian encoder's draws, which IAF's gates shrink.

    One example's features are all 0, and with them a planar map's w.
    """
    x, noise = X.at[0].set(0.0), jax.random.normal(jax.random.key(10), (6, 4, _noise_dim(kind, 5)))
    encoder = kind(MLP((8,)), 5, head_scale=0.01)
    params = encoder.init(jax.random.key(11), x, noise)["params"]

    def total(params):
        posterior = encoder.apply({"params": params}, x, noise)
        return posterior.log_q.sum() + posterior.z.sum(), posterior

    gradient, posterior = jax.jit(jax.grad(total, has_aux=True))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if kind is not AuxiliaryEncoder:
        z = GaussianEncoder(MLP((8,)), 5).apply({"params": params}, x, noise).z
        shrunk = special.expit(2.0) ** 4 if kind is IAFEncoder else 1.0
        np.testing.assert_allclose(posterior.z, shrunk * z, rtol=1e-5, atol=1e-6)
    log_ratio = posterior.log_q - stats.norm.logpdf(posterior.z).sum(-1)
    assert abs(log_ratio).max() < (6 if kind is IAFEncoder else 3)


@pytest.mark.parametrize(
    ("kind", "dim", "noise_dim", "message"),
    [
        (RealNVPEncoder, 1, 1, "latent_dim=1: RealNVPEncoder couples two halves; use 2 or more"),
        (AuxiliaryEncoder, 3, 3, "noise_dim=3: AuxiliaryEncoder needs latent_dim=3 plus 1 or more"),
        *((kind, 3, 1, f"noise_dim=1: {kind.__name__} needs as many as latents; set it to 3") for kind in INVERTIBLE),
    ],
)
def test_slips_are_named(kind, dim, noise_dim, message):
    with pytest.raises(UserError, match=message):
        kind(MLP((8,)), dim).init(jax.random.key(0), X, jnp.zeros((4, noise_dim)))
