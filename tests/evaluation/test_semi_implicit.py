"""Both bounds on the ELBO and the KL of a semi-implicit q that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avb_jax
from avb_jax import UserError, distributions
from avb_jax.evaluation import ELBO, SemiImplicit
from tests.conftest import small_method
from tests.evaluation.common import over
from tests.gaussian import POINTS, PRIOR, SIGMA, LinearDecoder
from tests.methods.test_semi_implicit import LinearSemiImplicit, analytic


@pytest.fixture(scope="module")
def model():
    method = avb_jax.sivi(
        LinearSemiImplicit(),
        LinearDecoder(),
        prior=PRIOR,
        likelihood=distributions.gaussian(SIGMA),
        optimizers=optax.sgd(1.0),
        noise_dim=4,
    )
    return method, method.init(jax.random.key(0), POINTS)


@pytest.mark.slow
def test_the_elbo_and_the_kl_lie_between_their_bounds(model):
    """Over many copies of four points; the width falls as K grows, and the ends stay on their sides."""
    method, state = model
    x = jnp.repeat(POINTS, 100, axis=0)
    elbo = -np.repeat(analytic(state.params, POINTS), 100)
    variance = state.params.encoder["a"] ** 2 + np.exp(-1.0)
    mean = 0.8 * x - 0.3
    kl = np.sum(0.5 * (mean**2 + variance - 1.0 - np.log(variance)), axis=-1)
    widths = []
    for inner in (4, 30, 1000):
        found = over(SemiImplicit(draws=8, inner=inner, inner_chunk=15), method, state, x)
        error = np.std(found.elbo_lower - elbo, ddof=1) / np.sqrt(len(x))
        assert np.mean(found.elbo_lower - elbo) < 3 * error
        assert np.mean(found.elbo_upper - elbo) > -3 * error
        assert np.mean(found.kl_lower - kl) < 3 * error
        assert np.mean(found.kl_upper - kl) > -3 * error
        np.testing.assert_allclose(found.elbo_upper - found.elbo_lower, found.kl_upper - found.kl_lower, atol=1e-4)
        np.testing.assert_allclose(np.mean(found.standard_error), np.std(found.elbo_lower - elbo), rtol=0.3)
        widths.append(np.mean(found.elbo_upper - found.elbo_lower))
        if inner == 4:
            assert np.mean(found.elbo_lower - elbo) < -0.05 < 0.05 < np.mean(found.elbo_upper - elbo)
    assert widths[0] > 10 * widths[1] / 3 > 10 * widths[2]
    assert abs(np.mean(found.elbo_lower - elbo)) < 4 * error


def test_it_reports_both_ends_and_asks_for_what_it_needs(model):
    method, state = model
    estimators = [SemiImplicit(draws=4, inner=20), ELBO(draws=2)]
    report = avb_jax.evaluate(method, state, np.asarray(POINTS), estimators, quiet=True)
    assert ("elbo", "bound") in report  # as SIVI trains it: the name says that it is no more
    ends = [report[f"elbo_{end}", "semi_implicit"].mean for end in ("lower", "upper")]
    np.testing.assert_allclose(report["elbo_width", "semi_implicit"].mean, ends[1] - ends[0], rtol=1e-4)
    assert report["elbo_lower", "semi_implicit"].estimator_error > 0
    assert report["kl_lower", "semi_implicit"].mean < report["kl_upper", "semi_implicit"].mean
    assert SemiImplicit().lacks(small_method("avb")) == "has no encoder that is semi-implicit"
    with pytest.raises(UserError, match="inner=0: must be at least 1"):
        SemiImplicit(inner=0)
