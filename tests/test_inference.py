"""AVB for given densities: what is known of them in closed form or by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import UserError, inference

KEY = jax.random.key(11)


def gaussian(z):
    """N((0.3, -0.2), [[1, .9], [.9, 1.2]]), times e^1.5."""
    d, precision = z - jnp.array([0.3, -0.2]), np.linalg.inv([[1.0, 0.9], [0.9, 1.2]])
    return 1.5 - 0.5 * d @ precision @ d - np.log(2 * np.pi) - 0.5 * np.log(1.2 - 0.81)


def torus(z):
    """A tube about the circle of radius 2: angle uniform, density of the radius r * exp(-((r - 2) / 0.3)^2 / 2), z_3 normal."""
    radius = jnp.sqrt(z[0] ** 2 + z[1] ** 2 + 1e-12)
    return -0.5 * ((radius - 2) / 0.3) ** 2 - 0.5 * (z[2] / 0.3) ** 2


def rosenbrock(z):
    """z_1 ~ N(0, 1) and z_2 - z_1^2 ~ N(0, 0.5^2), independent; its integral is 1."""
    return -0.5 * z[0] ** 2 - 0.5 * ((z[1] - z[0] ** 2) / 0.5) ** 2 - np.log(2 * np.pi * 0.5)


CURVED = {"steps": 4000, "sampler_rate": 5e-4}


@pytest.fixture(scope="module")
def gaussian_fit():
    return inference.fit(gaussian, 2, steps=4000, quiet=True)


def test_a_gaussian_is_fitted(gaussian_fit):
    """The moments are the density's, and the bound its integral's logarithm, 1.5."""
    mean, covariance = np.array([0.3, -0.2]), np.array([[1.0, 0.9], [0.9, 1.2]])
    z = np.asarray(gaussian_fit.sample(KEY, 20_000))
    np.testing.assert_allclose(z.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.1)
    away, ratio = z.mean(axis=0) - mean, np.linalg.solve(covariance, np.cov(z.T))
    kl = 0.5 * (np.trace(ratio) + away @ np.linalg.solve(covariance, away) - 2 - np.linalg.slogdet(ratio)[1])
    assert kl < 0.02  # nats, from the Gaussian of the draws' moments to the density
    assert abs(gaussian_fit.bound - 1.5) < 0.05
    assert gaussian_fit.bound_error < 0.01


def test_its_adversary_is_the_log_ratio_to_the_contrast(gaussian_fit):
    """For the Gaussian, log q - log r is known: KL(q, r) is -log sqrt(1 - correlation^2)."""
    correlation = 0.9 / np.sqrt(1.2)
    expected = -0.5 * np.log(1 - correlation**2)
    np.testing.assert_allclose(gaussian_fit.diagnostics.kl_contrast, expected, atol=0.1)
    t = gaussian_fit.adversary(gaussian_fit.sample(KEY, 5000))
    assert abs(t.mean() - gaussian_fit.diagnostics.kl_contrast) < 0.05


@pytest.mark.slow
def test_a_torus_is_fitted():
    """All the way round, as thick as it should be, and the bound its integral's logarithm. One to two minutes."""
    fit = inference.fit(torus, 3, quiet=True, **CURVED)
    z = np.asarray(fit.sample(KEY, 20_000))
    sectors = np.histogram(np.arctan2(z[:, 1], z[:, 0]), 8, (-np.pi, np.pi))[0] / len(z)
    np.testing.assert_allclose(sectors, 1 / 8, rtol=0.1)  # sampling alone: 2%, one standard error

    r, step = np.linspace(0, 5, 100_001, retstep=True)
    density = r * np.exp(-0.5 * ((r - 2) / 0.3) ** 2)
    mass = density.sum() * step
    mean = (r * density).sum() * step / mass
    std = np.sqrt(((r - mean) ** 2 * density).sum() * step / mass)
    radius = np.hypot(z[:, 0], z[:, 1])
    np.testing.assert_allclose(radius.mean(), mean, atol=0.03)
    np.testing.assert_allclose(radius.std(), std, rtol=0.12)
    np.testing.assert_allclose(z[:, 2].mean(), 0, atol=0.03)
    np.testing.assert_allclose(z[:, 2].std(), 0.3, rtol=0.06)
    gap = fit.bound - np.log(2 * np.pi * mass * 0.3 * np.sqrt(2 * np.pi))
    assert -0.1 < gap < 0.05


@pytest.mark.slow
def test_a_rosenbrock_density_is_fitted():
    """Both arms of the banana, none of them too long, and the bound its integral's logarithm, 0. One to two minutes."""
    fit = inference.fit(rosenbrock, 2, quiet=True, **CURVED)
    z = np.asarray(fit.sample(KEY, 20_000))
    away = z[:, 1] - z[:, 0] ** 2
    np.testing.assert_allclose(z[:, 0].mean(), 0, atol=0.1)
    np.testing.assert_allclose(z[:, 0].std(), 1, rtol=0.1)
    np.testing.assert_allclose(away.mean(), 0, atol=0.05)
    np.testing.assert_allclose(away.std(), 0.5, rtol=0.12)
    assert abs(np.corrcoef(z[:, 0], away)[0, 1]) < 0.1
    assert np.abs(z).max() < 25  # of 20,000 draws of the density, one is past |z_1| = 5 or z_2 = 25 with a chance of 1%
    assert -0.1 < fit.bound < 0.05


def test_numpyro_models_come_back_in_their_own_space():
    """Conjugate normal mean with a positive scale held by a deterministic site; both spaces agree."""
    numpyro = pytest.importorskip("numpyro")
    dist = numpyro.distributions

    def model(y, scale=1.0):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
        numpyro.deterministic("double", 2 * rate)
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)

    y = jnp.array([0.2, 0.4, 0.6])
    fit = inference.fit_numpyro(model, y, model_kwargs={"scale": 2.0}, steps=1500, sampler_rate=2e-3, quiet=True)
    draws = fit.sample(KEY, 20_000)
    assert set(draws) == {"mean", "rate", "double"}
    assert draws["mean"].shape == (20_000,)
    variance = 1 / (1 / 4 + 3 / 4)
    np.testing.assert_allclose((draws["mean"].mean(), draws["mean"].std()), (variance * 0.3, np.sqrt(variance)), atol=0.1)
    assert (draws["rate"] > 0).all()
    np.testing.assert_allclose((draws["rate"].mean(), draws["rate"].var()), (3, 3), rtol=0.15)
    np.testing.assert_allclose(draws["double"], 2 * draws["rate"], rtol=1e-5)


def test_densities_that_are_refused():
    with pytest.raises(UserError, match="must return one number for one z"):
        inference.fit(lambda z: z, 2)
    with pytest.raises(UserError, match="not finite at z = 0"):
        inference.fit(lambda z: jnp.log(z[0]), 1)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("dim", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("adversary_steps", 0, "at least 1"),
        ("noise_dim", -1, "at least 0"),
        ("sampler_rate", 0.0, "above 0"),
        ("adversary_rate", -1e-3, "above 0"),
        ("clip", 0.0, "above 0"),
        ("gaussian_share", 1.5, r"in \[0, 1\]"),
    ],
)
def test_options_that_are_refused(field, value, remedy):
    options = {"dim": 2, field: value}
    with pytest.raises(UserError, match=f"^{field}={value}: must be {remedy}"):
        inference.fit(gaussian, **options)


def test_discrete_sites_are_refused():
    numpyro = pytest.importorskip("numpyro")

    def model():
        numpyro.sample("which", numpyro.distributions.Categorical(jnp.ones(2) / 2))

    with pytest.raises(UserError, match="latent site 'which' is discrete"):
        inference.fit_numpyro(model, steps=10, quiet=True)
