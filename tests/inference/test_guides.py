"""NumPyro models: their densities, draws in their own space, and the shape of NumPyro's guides."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from scipy import stats

from avb_jax import Callback, UserError, inference
from avb_jax.inference import guides
from avb_jax.inference.fitting import game

KEY = jax.random.key(11)


@pytest.fixture
def conjugate():
    """A NumPyro model of data y and their scale: a conjugate normal mean, and a rate > 0 of which the data say nothing."""

    def model(y, scale=1.0):
        mean = numpyro.sample("mean", dist.Normal(0, 2))
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
        numpyro.deterministic("double", 2 * rate)
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


Y = np.array([0.2, 0.4, 0.6])


@pytest.mark.slow
def test_the_density_of_a_numpyro_model(conjugate, monkeypatch):
    """Where `fit` sees it: log p(y, mean, rate) + log rate, the Jacobian of rate = exp(u); nothing is left out or added."""
    called, z = {}, np.random.default_rng(0).standard_normal((50, 2))

    def fit(log_density, dim, **options):
        called.update(options, dim=dim, values=jax.vmap(log_density)(jnp.asarray(z, jnp.float32)))
        return inference.Fit(dim, 2, lambda noise: jnp.asarray(z[: len(noise)]), lambda z: z, None)

    monkeypatch.setattr(guides, "fit", fit)
    fitted = inference.fit_numpyro(conjugate, jnp.asarray(Y), model_kwargs={"scale": 2.0}, seed=3, steps=9)
    draws = fitted.sample(KEY, 40)
    assert (called["dim"], called["seed"], called["steps"]) == (2, 3, 9)
    np.testing.assert_array_equal(called["start"], 0)
    mean, rate = z[:, 0], np.exp(z[:, 1])
    expected = stats.norm.logpdf(mean, 0, 2) + stats.gamma.logpdf(rate, 3) + z[:, 1]
    expected += stats.norm.logpdf(Y, mean[:, None], 2).sum(axis=1)
    np.testing.assert_allclose(called["values"], expected, rtol=1e-5)
    for name, values in (("mean", mean), ("rate", rate), ("double", 2 * rate)):
        np.testing.assert_allclose(draws[name], values[:40], rtol=1e-5)


TINY = {"widths": (8,), "adversary_widths": (8,), "batch_size": 16}


@pytest.mark.parametrize("guide", [pytest.param(inference.AutoAVB, marks=pytest.mark.slow), inference.AutoSIVI])
@pytest.mark.slow
def test_a_guide_is_run_as_svi_is(conjugate, guide):
    """Params, a fit and losses; then draws, medians and quantiles of every site without the model's arguments."""
    guide = guide(conjugate, **TINY)
    params, fit, losses = guide.run(KEY, 30, jnp.asarray(Y), scale=2.0, progress_bar=False)
    assert losses.shape == (10,)
    assert np.isfinite(losses).all()
    draws = guide.sample_posterior(KEY, params, sample_shape=(400, 5))
    assert {name: value.shape for name, value in draws.items()} == dict.fromkeys(("mean", "rate", "double"), (400, 5))
    np.testing.assert_allclose(draws["double"], 2 * draws["rate"], rtol=1e-5)
    np.testing.assert_allclose(draws["mean"].mean(), fit.sample(KEY, 2000)["mean"].mean(), atol=0.2)
    median, quantiles = guide.median(params), guide.quantiles(params, [0.1, 0.5, 0.9])
    assert quantiles["rate"].shape == (3,)
    assert quantiles["rate"][0] < median["rate"] == quantiles["rate"][1] < quantiles["rate"][2]
    np.testing.assert_allclose(np.quantile(draws["rate"], 0.9), quantiles["rate"][2], rtol=0.15)
    one = guide.sample_posterior(KEY, params)
    assert one["mean"].shape == ()


def test_what_a_guide_was_given_holds_for_its_runs(conjugate, monkeypatch):
    """And a fit stays that of its own data when the guide is run on others."""
    asked = []

    def fit(log_density, dim, **options):
        asked.append(options)
        state = SimpleNamespace(ema=SimpleNamespace(params=SimpleNamespace(encoder={})))
        return inference.Fit(dim, 1, lambda noise: noise, lambda z: z, None, state=state)

    monkeypatch.setattr(guides, "fit", fit)
    mine = Callback()

    def scaled(y):
        numpyro.deterministic("sum", numpyro.sample("mean", dist.Normal()) + y.sum())

    guide = inference.AutoAVB(scaled, workdir="w", callbacks=[mine], quiet=True)
    _, one, _ = guide.run(KEY, 7, jnp.ones(3))
    _, two, _ = guide.run(KEY, 7, jnp.ones(5), workdir="v")
    assert [(options["workdir"], options["quiet"], options["steps"]) for options in asked] == [("w", True, 7), ("v", True, 7)]
    assert all(options["callbacks"][0] is mine and len(options["callbacks"]) == 2 for options in asked)
    for found, total in ((one, 3.0), (two, 5.0)):
        draws = found.sample(KEY, 4)
        np.testing.assert_allclose(draws["sum"] - draws["mean"], total, rtol=1e-6)
    for name in ("seed", "steps"):
        with pytest.raises(UserError, match=f"^{name}: is for `run`"):
            inference.AutoAVB(scaled, **{name: 3})


@pytest.mark.slow
def test_a_guide_that_has_seen_nothing_draws_with_the_models_arguments(conjugate):
    guide = inference.AutoSIVI(conjugate, **TINY)
    params = guide.run(KEY, 10, jnp.asarray(Y), progress_bar=False).params
    fresh = inference.AutoSIVI(conjugate, **TINY)
    draws = [one.sample_posterior(KEY, params, jnp.asarray(Y), sample_shape=(3,))["rate"] for one in (guide, fresh)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("guide", [inference.AutoAVB, inference.AutoSIVI])
def test_a_guide_draws_by_the_sampler_that_was_fitted(guide):
    """Whose Gaussian share follows from the method, where there are more than three dimensions."""

    def model():
        numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))

    guide = guide(model, widths=(8,))
    played = game(lambda z: -jnp.sum(z**2), 4, method=guide._method, widths=(8,))
    params = played.method.init(KEY, jnp.zeros((1, 0))).params.encoder
    drawn = guide.sample_posterior(KEY, {guide._name: params}, sample_shape=(5,))["z"]
    np.testing.assert_allclose(drawn, played.draw(params, jax.random.normal(KEY, (5, played.noise_dim))), rtol=1e-5)


def test_svi_says_what_to_call(conjugate):
    guide = inference.AutoAVB(conjugate)
    svi = numpyro.infer.SVI(conjugate, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    with pytest.raises(UserError, match=r"AutoAVB: SVI cannot train it.*run\(key, steps"):
        svi.init(KEY, jnp.asarray(Y))


@pytest.mark.slow
def test_sites_for_arviz_and_in_a_file(conjugate, tmp_path):
    fit = inference.fit_numpyro(conjugate, jnp.asarray(Y), method="sivi", steps=10, quiet=True, **TINY)
    fit.save(tmp_path)
    loaded = inference.load(tmp_path).sample(KEY, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), loaded, fit.sample(KEY, 6))
    pytest.importorskip("arviz")
    found = fit.to_inference_data(KEY, draws=7, chains=2)
    assert set(found.posterior.data_vars) == {"mean", "rate", "double"}
    assert found.posterior["rate"].shape == (2, 7)


@pytest.mark.slow
def test_numpyro_models_come_back_in_their_own_space(conjugate):
    """The posterior's moments, and the evidence, of y ~ N(0, 4 I + 4 1 1')."""
    fit = inference.fit_numpyro(conjugate, jnp.asarray(Y), model_kwargs={"scale": 2.0}, steps=1500, quiet=True)
    evidence = stats.multivariate_normal.logpdf(Y, cov=4 * np.eye(3) + 4)
    assert abs(fit.log_evidence - evidence) < 0.02
    assert -0.05 < fit.bound - evidence < 0.02  # of which the bound itself lacks 0.03 of q's ELBO
    draws = fit.sample(KEY, 20_000)
    assert set(draws) == {"mean", "rate", "double"}
    assert draws["mean"].shape == (20_000,)
    variance = 1 / (1 / 4 + 3 / 4)
    np.testing.assert_allclose((draws["mean"].mean(), draws["mean"].std()), (variance * 0.3, np.sqrt(variance)), atol=0.1)
    assert (draws["rate"] > 0).all()
    np.testing.assert_allclose((draws["rate"].mean(), draws["rate"].var()), (3, 3), rtol=0.15)
    np.testing.assert_allclose(draws["double"], 2 * draws["rate"], rtol=1e-5)


def discrete():
    numpyro.sample("which", dist.Categorical(jnp.ones(2) / 2))


def subsampled():
    with numpyro.plate("data", 100, subsample_size=10):
        numpyro.sample("local", dist.Normal())


def with_a_param():
    numpyro.sample("mean", dist.Normal(numpyro.param("location", 0.0), 1.0))


def without_latents():
    numpyro.sample("y", dist.Normal(), obs=jnp.zeros(3))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (discrete, "latent site 'which' is discrete; sum it out"),
        (subsampled, r"plate 'data' is subsampled \(10 of 100\)"),
        (with_a_param, "site 'location' is a param"),
        (without_latents, "has no latent sites"),
    ],
)
def test_models_that_are_refused(model, match):
    with pytest.raises(UserError, match=match):
        inference.fit_numpyro(model, steps=10, quiet=True)
