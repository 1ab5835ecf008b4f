"""AVB and SIVI for given densities: what is known of them in closed form or by quadrature."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from avb_jax import UserError, inference
from avb_jax.data.dataset import Dataset
from avb_jax.inference import fitting
from avb_jax.inference.checks import Weighed
from avb_jax.inference.watch import Watch
from avb_jax.networks.encoders import STANDARD_DRAWS
from avb_jax.training.callbacks import Run
from avb_jax.training.loop import initial_state
from tests.inference.densities import gaussian, rosenbrock, torus

KEY, DRAWS = jax.random.key(11), fitting.DRAWS


@pytest.fixture(scope="module")
def gaussian_fit():
    sizes = {"noise_dim": 4, "widths": (32,), "adversary_widths": (64, 64)}
    rates = {"sampler_rate": 1e-3, "adversary_rate": 2e-3}
    return inference.fit(gaussian, 2, steps=2500, batch_size=256, quiet=True, **sizes, **rates)


@pytest.mark.slow
def test_a_gaussian_is_fitted(gaussian_fit):
    """The moments are the density's, and the bound its integral's logarithm, 1.5."""
    mean, covariance = np.array([0.3, -0.2]), np.array([[1.0, 0.9], [0.9, 1.2]])
    z = np.asarray(gaussian_fit.sample(KEY, 20_000))
    np.testing.assert_allclose(z.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.1)
    away, ratio = z.mean(axis=0) - mean, np.linalg.solve(covariance, np.cov(z.T))
    kl = 0.5 * (np.trace(ratio) + away @ np.linalg.solve(covariance, away) - 2 - np.linalg.slogdet(ratio)[1])
    assert kl < 0.02  # nats, from the Gaussian of the draws' moments to the density
    assert -0.08 < gaussian_fit.bound - 1.5 < 0.01
    assert abs(gaussian_fit.log_evidence - 1.5) < 0.02
    assert gaussian_fit.bound_error < 0.01


@pytest.mark.slow
def test_its_adversary_is_the_log_ratio_to_the_contrast(gaussian_fit):
    """For the Gaussian, log q - log r is known: KL(q, r) is -log sqrt(1 - correlation^2)."""
    correlation = 0.9 / np.sqrt(1.2)
    expected = -0.5 * np.log(1 - correlation**2)
    np.testing.assert_allclose(gaussian_fit.diagnostics.kl_contrast, expected, atol=0.1)
    t = gaussian_fit.adversary(gaussian_fit.sample(KEY, 5000))
    assert abs(t.mean() - gaussian_fit.diagnostics.kl_contrast) < 0.05


@pytest.fixture(scope="module")
def untrained():
    """A fit without training, of a sampler and a T that were moved by hand, and what its training was called with."""
    called = {}

    def train(method, dataset, **options):
        state = initial_state(method, dataset, options["seed"], None)
        moved = {"mean": jnp.array([0.05, -0.1]), "log_std": jnp.array([-0.05, 0.03])}  # times the sampler's speed of 10
        t = jax.tree.map(lambda a: a - 1 if a.shape == (1,) else 1.5 * a, state.ema.params.adversary)  # by its last bias
        params = state.ema.params
        params = params._replace(encoder={**params.encoder, **moved}, adversary=t)
        called.update(options, dataset=dataset)
        (watch,) = (callback for callback in options["callbacks"] if isinstance(callback, Watch))
        watch.best = state._replace(ema=state.ema._replace(params=params))

    def density_method(log_density, dim, sampler, adversary, **settings):
        called.update(settings, dim=dim, sampler=sampler)
        return build(log_density, dim, sampler, adversary, **settings)

    options = {"steps": 3, "batch_size": 7, "seed": 5, "noise_dim": 3, "adversary_steps": 2, "gaussian_share": 0.3}
    build = fitting.density_method
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "train", train)
        patch.setattr(fitting, "density_method", density_method)
        fit = inference.fit(
            gaussian, 2, sampler_rate=0.02, adversary_rate=0.04, inflation=1.4, clip=5.0, widths=(16,), **options
        )
    return fit, called


def test_what_a_fit_reports_follows_from_its_draws(untrained):
    """The bounds, their errors, T's diagnostics, and r: by NumPy from draws, T and r as the caller has them."""
    fit, _ = untrained
    z = np.float64(fit.sample(KEY, 50_000))
    mean, std = (np.float64(moment) for moment in fit.contrast)
    error = 1 / np.sqrt(STANDARD_DRAWS)  # of r's moments, in standard deviations
    assert (abs(mean - z.mean(axis=0)) < 4 * error * std).all()
    np.testing.assert_allclose(std, z.std(axis=0), rtol=4 * error)
    assert abs(mean[1] + 1) < 0.3
    assert std[1] > 1.5 * std[0]
    wider = mean + 1.4 * std * np.random.default_rng(0).standard_normal(z.shape)
    t, t_there = (np.float64(fit.adversary(jnp.asarray(draws, jnp.float32))) for draws in (z, wider))
    assert 0.2 < (t > 0).mean() < 0.8  # or else little depends on it
    found = fit.diagnostics
    log_density = np.array(jax.vmap(gaussian)(jnp.asarray(z, jnp.float32)))
    bound = log_density - t - stats.norm.logpdf(z, mean, std).sum(axis=1)
    np.testing.assert_allclose(found.elbo_under_t_error, bound.std() / np.sqrt(DRAWS), rtol=0.1)
    assert abs(found.elbo_under_t - bound.mean()) < 4 * np.hypot(found.elbo_under_t_error, bound.std() / np.sqrt(len(z)))
    logits = []  # T - log s + log r, s being what the wider draws are of
    for draws, of_draws in ((z, t), (wider, t_there)):
        of_r, of_s = (stats.norm.logpdf(draws, mean, scale * std).sum(axis=1) for scale in (1.0, 1.4))
        logits.append(of_draws - of_s + of_r)
    loss = np.logaddexp(0, -logits[0]) + np.logaddexp(0, logits[1])
    accuracy = np.mean([logits[0] > 0, logits[1] < 0], axis=0)
    for value, own in ((found.adversary_loss, loss), (found.adversary_accuracy, accuracy), (found.kl_contrast, t)):
        assert abs(value - own.mean()) < 4 * own.std() * np.sqrt(1 / DRAWS + 1 / len(z))
    far = fit.adversary(jnp.asarray(mean + std * np.outer([100, 200, 300], [1.0, 0.5]), jnp.float32))
    np.testing.assert_allclose(far[0] - 2 * far[1] + far[2], 100**2 * 1.25, rtol=0.01)  # T + log r, its square part, is linear

    # Its own density, of draws that owe nothing to it, on a grid of cells.
    counts, x, y = np.histogram2d(*z.T, bins=[np.linspace(-4, 4, 33), np.linspace(-8, 6, 33)])
    share = counts[counts > 0] / len(z)
    log_q = np.log(share / ((x[1] - x[0]) * (y[1] - y[0])))
    own = fit.diagnostics.elbo_lower - (log_density.mean() - np.sum(share * log_q) / share.sum())
    assert abs(own) < 0.1  # cells are coarse
    assert found.elbo_lower <= found.elbo_upper < found.elbo_lower + 0.05
    assert fit.bound == found.elbo_lower
    assert fit.log_evidence >= fit.bound
    assert "T puts the ELBO" in str(found) or "T says" in str(found)


@pytest.mark.parametrize(("method", "dim", "share"), [("avb", 3, 0.15), ("avb", 4, 0.3), ("sivi", 4, 0.05)])
def test_the_gaussian_share_where_nothing_is_said(method, dim, share):
    assert fitting.game(lambda z: -jnp.sum(z**2), dim, method=method).gaussian_share == share


@pytest.mark.parametrize(("dim", "steps"), [(3, 8000), (4, 4000)])
def test_the_steps_where_nothing_is_said(monkeypatch, dim, steps):
    class Asked(Exception):
        pass

    def train(*_, steps, **options):
        raise Asked(steps)

    monkeypatch.setattr(fitting, "train", train)
    with pytest.raises(Asked, match=f"^{steps}$"):
        inference.fit(lambda z: -jnp.sum(z**2), dim, widths=(8,), gaussian_share=0.0, quiet=True)


def test_how_a_fit_trains(untrained):
    """The sampler, and optimisers that fall to 0 along a cosine over all updates of each player, with clipped gradients."""
    called = untrained[1]
    assert (called["noise_dim"], called["adversary_steps"], called["dim"]) == (2 * 2 + 3, 2, 2)
    assert (called["sampler"].gaussian_share, called["sampler"].widths) == (0.3, (16,))
    assert (called["steps"], called["batch_size"], called["seed"]) == (3, 7, 5)
    assert called["dataset"].train.shape == (7, 0)
    for player, rate, updates in (("encoder", 0.02, 3), ("adversary", 0.04, 6)):
        adam = getattr(called["optimizers"], player)
        state, taken = adam.init(jnp.zeros(())), []
        for _ in range(updates + 1):
            step, state = adam.update(jnp.ones(()), state)
            taken.append(float(step))
        expected = -0.5 * rate * (1 + np.cos(np.pi * np.arange(updates + 1) / updates))
        np.testing.assert_allclose(taken, expected, rtol=1e-3, atol=1e-8)
        state = adam.update(jnp.ones(()), adam.init(jnp.zeros(())))[1]
        step = float(adam.update(jnp.asarray(100.0), state)[0])  # of which 5 are left; b1 = 0.5, b2 = 0.999
        first, second = (0.5 * 0.5 + 0.5 * 5) / 0.75, (0.999 * 0.001 + 0.001 * 25) / (1 - 0.999**2)
        np.testing.assert_allclose(step, expected[1] * first / np.sqrt(second), rtol=1e-3)


@pytest.mark.slow
def test_draws_are_resampled_by_their_weights(untrained):
    """Nearer to the density than q's own; as they are with a factor of 1."""
    fit, _ = untrained
    target = np.array([0.3, -0.2])
    drawn, resampled = (np.asarray(draw(KEY, 1000)).mean(axis=0) - target for draw in (fit.sample, fit.resample))
    assert abs(drawn[1]) > 0.5
    assert (abs(resampled) < 0.35).all()
    once = np.asarray(fit.resample(KEY, 1000, factor=1))
    np.testing.assert_array_equal(once, fit.resample(jax.random.key_data(KEY), 1000, factor=1))
    assert len(np.unique(once[:, 0])) == 1000
    np.testing.assert_allclose(once.mean(axis=0) - target, drawn, atol=0.12)


TINY = {"steps": 20, "batch_size": 16, "widths": (8,), "adversary_widths": (8,), "quiet": True}


@pytest.mark.slow
def test_numbers_that_are_none_are_read_as_such(tmp_path):
    """What is not finite is another thing than what is not known."""
    fit = inference.fit(gaussian, 2, method="sivi", **TINY)
    bad = fit.diagnostics._replace(elbo_lower=np.nan, log_evidence=np.nan, outside=1.0)
    dataclasses.replace(fit, diagnostics=bad).save(tmp_path)
    loaded = inference.load(tmp_path).diagnostics
    assert loaded.elbo_under_t is None
    assert (str(loaded), loaded.doubts) == (str(bad), bad.doubts)
    assert "of q's draws the density is not finite" in loaded.doubts[0]


@pytest.mark.slow
def test_what_a_killed_fit_left_half_written_is_no_matter(tmp_path):
    options = {**TINY, "method": "sivi", "steps": 10, "tolerance": 0, "workdir": tmp_path}
    (tmp_path / "best" / "sivi" / "1.unfinished" / "state").mkdir(parents=True)
    inference.fit(gaussian, 2, **options)
    assert {path.name for path in (tmp_path / "best" / "sivi").iterdir()} == {"9", "10"}


@pytest.mark.parametrize("method", [pytest.param("avb", marks=pytest.mark.slow), "sivi"])
def test_a_fit_is_saved_and_draws_without_its_density(tmp_path, method):
    fit = inference.fit(gaussian, 2, method=method, **TINY)
    fit.save(tmp_path / "fit")
    loaded = inference.load(tmp_path / "fit")
    np.testing.assert_allclose(loaded.sample(KEY, 9), fit.sample(KEY, 9), rtol=1e-5, atol=1e-6)
    assert loaded.diagnostics == fit.diagnostics
    assert (fit.adversary is None) == (method == "sivi")
    with pytest.raises(UserError, match="resample: needs the density"):
        loaded.resample(KEY, 3)
    (tmp_path / "fit" / "sampler.stablehlo").write_bytes(b"no")
    with pytest.raises(UserError, match=r"is not what Fit\.save wrote"):
        inference.load(tmp_path / "fit")
    with pytest.raises(UserError, match="no fit there"):
        inference.load(tmp_path)


def test_a_fit_for_arviz(untrained):
    """Chains and draws, and log densities of the draws themselves."""
    pytest.importorskip("arviz")
    found = untrained[0].to_inference_data(KEY, draws=50, chains=4)
    z, lp, log_q = np.asarray(found.posterior["z"]), np.asarray(found.sample_stats["lp"]), found.sample_stats["log_q"]
    assert (z.shape, lp.shape, log_q.shape) == ((4, 50, 2), (4, 50), (4, 50))
    np.testing.assert_allclose(lp[2, 7], gaussian(jnp.asarray(z[2, 7])), rtol=1e-5)
    assert abs(float((lp - log_q).mean()) - untrained[0].bound) < 5 * untrained[0].bound_error * np.sqrt(DRAWS / 200)


@pytest.mark.slow
def test_seeds_side_by_side():
    """Each has the numbers of its own run; the fit is the one with the largest evidence."""
    fit = inference.fit(gaussian, 2, method="sivi", num_seeds=2, seed=3, **TINY)
    assert len(fit.runs) == 2
    assert fit.log_evidence == max(one.log_evidence for one in fit.runs)
    alone = inference.fit(gaussian, 2, method="sivi", seed=3, **TINY)
    np.testing.assert_allclose(alone.sample(KEY, 5), fit.runs[0].sample(KEY, 5), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_fit_ends_where_its_bounds_have_closed(tmp_path):
    """For N(0, I), where q begins, and for good: the same call does not train on. With a tolerance of 0 it takes all steps."""

    def standard(z):
        return -0.5 * jnp.sum(z**2)

    options = {**TINY, "method": "sivi", "sampler_rate": 1e-6, "steps": 40}
    fits = [inference.fit(standard, 2, tolerance=0.5, workdir=tmp_path, **options) for _ in range(2)]
    assert [int(fit.state.step) for fit in fits] == [4, 4]
    assert fits[0].bound == fits[1].bound
    assert '"step": 8' not in (tmp_path / "metrics.jsonl").read_text()
    assert abs(fits[0].log_evidence - np.log(2 * np.pi)) < 0.02
    assert "Nothing speaks against it" in str(fits[0].diagnostics)
    inference.fit(standard, 2, tolerance=0, workdir=tmp_path / "all", **options)
    assert '"step": 40' in (tmp_path / "all" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_sampler_that_runs_away_is_taken_back():
    """At rates at which it gets worse, the State of the best checkpoint is what counts."""
    fit = inference.fit(gaussian, 2, **{**TINY, "method": "sivi", "sampler_rate": 0.5, "clip": 1e3})
    assert int(fit.state.step) < 20
    assert np.isfinite(fit.bound)


def test_bounds_that_lie_apart_are_drawn_closer():
    """Once more at the end, by more draws of noise; bounds that are close are left as they are."""
    asked, game = [], fitting.game(gaussian, 2, method="sivi", widths=(8,))
    state = game.method.init(KEY, jnp.zeros((4, 0)))

    def weigher(width):
        def weighed(params, key, draws):
            asked.append(width)
            return Weighed(np.zeros((draws, 2)), np.full(draws, -1.0), np.zeros(draws), np.full(draws, -width))

        return weighed

    for first, expected in ((0.5, 0.3), (0.05, 0.05)):
        asked.clear()
        fit = fitting._summarised(game, [weigher(first), weigher(0.3)], state, 0)
        assert asked == list(dict.fromkeys([first, expected]))
        np.testing.assert_allclose(fit.diagnostics.elbo_upper - fit.bound, expected, rtol=1e-6)
        fit.weigh(KEY, 3)
        assert asked[-1] == expected


@pytest.mark.slow
def test_a_torus_is_fitted():
    """All the way round, as thick as it should be, and the bound its integral's logarithm. One to two minutes."""
    fit = inference.fit(torus, 3, steps=4000, quiet=True)
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
    fit = inference.fit(rosenbrock, 2, steps=4000, sampler_rate=5e-4, quiet=True)
    z = np.asarray(fit.sample(KEY, 20_000))
    away = z[:, 1] - z[:, 0] ** 2
    np.testing.assert_allclose(z[:, 0].mean(), 0, atol=0.1)
    np.testing.assert_allclose(z[:, 0].std(), 1, rtol=0.1)
    np.testing.assert_allclose(away.mean(), 0, atol=0.05)
    np.testing.assert_allclose(away.std(), 0.5, rtol=0.12)
    assert abs(np.corrcoef(z[:, 0], away)[0, 1]) < 0.1
    assert np.abs(z).max() < 25  # of 20,000 draws of the density, one is past |z_1| = 5 or z_2 = 25 with a chance of 1%
    assert -0.1 < fit.bound < 0.05


def test_densities_that_are_refused():
    with pytest.raises(UserError, match="must return one number for one z"):
        inference.fit(lambda z: z, 2)
    with pytest.raises(UserError, match=r"at z = \[0\], where q starts, it is -inf \(.* of 1001 points\).*give start"):
        inference.fit(lambda z: jnp.where(z[0] > 0, -z[0], -jnp.inf), 1)
    with pytest.raises(UserError, match=r"at z = \[0\], where q starts, its gradient is not finite"):
        inference.fit(lambda z: -jnp.sqrt(jnp.abs(z[0])), 1)


@pytest.mark.parametrize("method", ["sivi", *(pytest.param(method, marks=pytest.mark.slow) for method in ("avb", "uivi"))])
@pytest.mark.slow
def test_a_density_of_zero_far_away_is_fitted(method):
    """It is not refused, and the draws that fall there end nothing."""

    def bounded(z):
        return jnp.where(jnp.abs(z[0]) > 2.5, -jnp.inf, gaussian(z))

    fit = inference.fit(bounded, 2, method=method, **TINY)
    assert np.isfinite(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(fit.state.params)])).all()
    assert abs(fit.sample(KEY, 500)).max() < 20


@pytest.mark.slow
def test_a_density_that_is_not_finite_far_away():
    """Is named, with a point, where the training has led q there; a few such draws weigh nothing."""

    def rare(z):
        return jnp.where(jnp.abs(z[0]) > 5.5, jnp.nan, -0.125 * z[0] ** 2)

    fit = inference.fit(rare, 1, tolerance=0, **{**TINY, "method": "sivi", "sampler_rate": 0.02, "steps": 200})
    assert 0 < fit.diagnostics.outside < 0.05
    assert abs(fit.log_evidence - 0.5 * np.log(8 * np.pi)) < 0.1
    assert "of q's draws the density is 0 or not a number" in str(fit.diagnostics)

    def density(z):
        return jnp.where(jnp.abs(z[0]) > 6, jnp.nan, z[0])

    with pytest.raises(UserError, match=r"log_density: at z = \[-?[\d.]+\], where q came by in training, it is nan"):
        inference.fit(density, 1, **{**TINY, "sampler_rate": 0.1, "steps": 200})


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
        ("inflation", 0.9, "at least 1"),
        ("clip", 0.0, "above 0"),
        ("gaussian_share", 1.5, r"in \[0, 1\]"),
        ("tolerance", -1, "at least 0"),
        ("method", "nuts", "one of avb, sivi, uivi"),
        ("scale", "wide", "standard deviations, or 'nearest'"),
        ("scale", -1.0, "a positive number, 2 of them, or 'nearest'"),
        ("scale", [1.0], "a positive number, 2 of them, or 'nearest'"),
    ],
)
def test_options_that_are_refused(field, value, remedy):
    options = {"dim": 2, field: value}
    with pytest.raises(UserError, match=f"^{field}={re.escape(repr(value))}: must be {remedy}"):
        inference.fit(gaussian, **options)
    with pytest.raises(UserError, match=r"^wdiths: is no setting of fit; it has adversary_rate, .*widths"):
        inference.fit(gaussian, 2, wdiths=(3,))
    with pytest.raises(UserError, match=r"^start: has shape \(3,\), and z has \[2\]"):
        inference.fit(gaussian, 2, start=np.zeros(3))
    with pytest.raises(UserError, match=r"^gaussian_share=0: sivi"):
        inference.fit(gaussian, 2, method="sivi", gaussian_share=0)


@pytest.mark.slow
def test_without_a_gaussian_share_there_is_only_t():
    fit = inference.fit(gaussian, 2, gaussian_share=0.0, **TINY)
    assert fit.bound == fit.diagnostics.elbo_under_t
    assert fit.log_evidence is None
    assert "which nothing vouches for" in str(fit.diagnostics)


@pytest.mark.slow
def test_a_fit_continues_in_its_workdir(tmp_path, monkeypatch):
    """A finished one is read back; a shorter run is another schedule, and so another fit."""
    options = {"steps": 4, "batch_size": 8, "widths": (4,), "adversary_widths": (4,), "quiet": True, "workdir": tmp_path}
    first, again = (inference.fit(gaussian, 2, **options) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.state, again.state)
    assert first.bound == again.bound
    assert first.method.log_joint is not None
    assert '"step": 4' in (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(Watch, "_numbers", lambda watch, state: {})
    watch, nothing = Watch(None, 0.0), np.zeros((8, 0), np.float32)  # a run that diverges before its next checkpoint
    watch.start(
        Run("avb", first.method, Dataset(nothing, nothing), 8, 4, 8, None, 0, tmp_path)
    )  # which a divergence may follow
    jax.tree.map(np.testing.assert_array_equal, watch.best, first.state)
    assert list((tmp_path / "tensorboard" / "avb").iterdir())
