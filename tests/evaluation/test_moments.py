"""Moments of q(z|x), active units, and draws for other estimators."""

import numpy as np
import pytest
from numpyro import distributions as dist

from avb_jax import UserError
from avb_jax.evaluation import Moments, moments
from avb_jax.evaluation.moments import Draws
from avb_jax.evaluation.run import evaluate
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.common import over
from tests.ppca import SHIFT, Case


def test_moments_and_active_units():
    """Estimated moments, cleared of their sampling error, against known ones; one latent is idle."""
    x = np.random.default_rng(0).standard_normal((3000, 2)).astype(np.float32)
    x[:, 1] = 0
    estimated = over(Moments(draws=16), game.method(), game.state(), x)
    np.testing.assert_allclose(estimated.variance.mean(axis=0), game.S**2, rtol=0.05)
    np.testing.assert_allclose(estimated.mean_error.mean(axis=0), game.S**2 / 16, rtol=0.05)
    np.testing.assert_allclose(estimated.mean[:, 0], game.M * x[:, 0] + game.C, atol=6 * game.S / 4)
    activity = moments.activity(estimated)
    np.testing.assert_allclose(activity, [game.M**2, 0.0], atol=0.06)
    assert list(activity > moments.ACTIVE) == [True, False]
    assert np.var(estimated.mean, axis=0)[1] > 2 * moments.ACTIVE  # which the raw means would call active


def test_moments_that_the_encoder_gives():
    case = Case(2)
    given = over(Moments(draws=2), case.method, case.state, case.x)
    np.testing.assert_allclose(given.variance, np.broadcast_to(case.posterior_std**2, (20, 2)), rtol=1e-5)
    assert not np.any(given.mean_error)
    params = case.state.params
    mean = (case.x - params["b"]) @ np.asarray(params["a"]).T + SHIFT * np.asarray(params["std"])
    np.testing.assert_allclose(given.mean, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("spread", "active"), [([1.0, 0.05], 1), ([1.0, 1.0], 2)])
def test_numbers_of_a_run(spread, active):
    """One latent of two is active, and both where both pixels move."""
    x = np.float32(np.random.default_rng(0).standard_normal((60, 2)) * spread)
    report = evaluate(game.method(), game.state(), x, [Moments(draws=50)], quiet=True)
    units, variance = report["active_units", "moments"], report["posterior_variance", "moments"]
    assert (units.mean, units.examples, units.standard_error) == (active, None, None)
    assert variance.examples == 60
    assert abs(variance.mean - game.S**2) < 4 * variance.examples_error
    np.testing.assert_allclose(variance.examples_error, game.S**2 * np.sqrt(1 / 49 / 60), rtol=0.4)  # two variances of 50 draws


def test_one_example_has_no_active_units():
    report = evaluate(game.method(), game.state(), game.points(1), [Moments(draws=5)], quiet=True)
    assert set(report.estimates) == {("posterior_variance", "moments")}
    assert "active units are those that vary over examples" in report.notes[0]


def test_draws_and_their_kl():
    """The KL is exact where the encoder says that q is Gaussian and NumPyro knows it, else it is left out."""
    case = Case(2, count=4)
    found = over(Draws(draws=7), case.method, case.state, case.x)
    assert found.z.shape == (4, 7, 2)
    params = case.state.params
    mean = (case.x - params["b"]) @ np.asarray(params["a"]).T + SHIFT * np.asarray(params["std"])
    expected = 0.5 * np.sum(mean**2 + case.posterior_std**2 - 1 - 2 * np.log(case.posterior_std), axis=1)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4)
    assert over(Draws(draws=7), case.black_box, case.state, case.x).kl is None
    laplace = case.method._replace(prior=dist.Laplace(np.zeros(2), 1.0).to_event(1))
    assert over(Draws(draws=7), laplace, case.state, case.x).kl is None
    assert over(Draws(draws=7), case.method._replace(prior=None), case.state, case.x).kl is None


def test_draws_of_two_streams_are_independent():
    case = Case(2, count=4)
    one, two, again = (over(Draws(draws=7, stream=s), case.method, case.state, case.x).z for s in ("a", "b", "a"))
    np.testing.assert_array_equal(one, again)
    assert not np.isclose(one, two).any()


def test_what_it_needs():
    assert Moments().lacks(small_method("bigan")) == ""
    assert Moments().lacks(small_method("gan")) == "has no encoder"
    with pytest.raises(UserError, match="draws=1: must be at least 2"):
        Moments(draws=1)
    with pytest.raises(UserError, match="images=0: must be at least 1"):
        Moments(images=0)
