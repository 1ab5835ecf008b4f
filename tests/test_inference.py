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


@pytest.fixture(scope="module")
def fits():
    """Each density's fit, made when a test first asks for it."""
    cache = {}

    def fitted(density, dim, steps):
        if density not in cache:
            cache[density] = inference.fit(density, dim, steps=steps, quiet=True)
        return cache[density]

    return fitted


def test_a_gaussian_is_fitted(fits):
    """The moments are the density's, and the bound its integral's logarithm, 1.5."""
    fit = fits(gaussian, 2, 3000)
    z = np.asarray(fit.sample(KEY, 20_000))
    np.testing.assert_allclose(z.mean(axis=0), [0.3, -0.2], atol=0.1)
    np.testing.assert_allclose(np.cov(z.T), [[1.0, 0.9], [0.9, 1.2]], atol=0.15)
    assert abs(fit.bound - 1.5) < 0.1
    assert fit.bound_error < 0.01


def test_its_adversary_is_the_log_ratio_to_the_contrast(fits):
    """For the Gaussian, log q - log r is known: KL(q, r) is -log sqrt(1 - correlation^2)."""
    fit = fits(gaussian, 2, 3000)
    correlation = 0.9 / np.sqrt(1.2)
    expected = -0.5 * np.log(1 - correlation**2)
    np.testing.assert_allclose(fit.diagnostics.kl_contrast, expected, atol=0.1)
    t = fit.adversary(fit.sample(KEY, 5000))
    assert abs(t.mean() - fit.diagnostics.kl_contrast) < 0.05


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


def test_what_is_refused():
    with pytest.raises(UserError, match="dim=0: must be at least 1"):
        inference.fit(gaussian, 0)
    with pytest.raises(UserError, match="must return one number for one z"):
        inference.fit(lambda z: z, 2)
    with pytest.raises(UserError, match="not finite at z = 0"):
        inference.fit(lambda z: jnp.log(z[0]), 1)


def test_discrete_sites_are_refused():
    numpyro = pytest.importorskip("numpyro")

    def model():
        numpyro.sample("which", numpyro.distributions.Categorical(jnp.ones(2) / 2))

    with pytest.raises(UserError, match="latent site 'which' is discrete"):
        inference.fit_numpyro(model, steps=10, quiet=True)
