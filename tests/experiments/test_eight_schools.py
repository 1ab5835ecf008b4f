"""Eight schools: its evidence, its bounds, its table."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments import eight_schools
from experiments.configs import eight_schools as eight_schools_config


def schools_log_joint(z):
    """Log p(y, z) [N] of eight schools at z [N, 10], by SciPy."""
    mu, tau, eta, y, sigma = z[:, :1], z[:, 1:2], z[:, 2:], np.float64(eight_schools.Y), np.float64(eight_schools.SIGMA)
    return stats.norm.logpdf(z).sum(axis=1) + stats.norm.logpdf(y, mu + tau * eta, sigma).sum(axis=1)


def test_eight_schools_evidence():
    """Against the integral over mu and tau of independent y_j ~ N(mu, sigma_j^2 + tau^2), which has no covariance in it."""
    y, sigma = np.float64(eight_schools.Y), np.float64(eight_schools.SIGMA)
    mu, tau = np.meshgrid(*[np.linspace(-8, 8, 801)] * 2)
    log_y = sum(stats.norm.logpdf(y_j, mu, np.hypot(s_j, tau)) for y_j, s_j in zip(y, sigma, strict=True))
    expected = np.logaddexp.reduce(stats.norm.logpdf(mu) + stats.norm.logpdf(tau) + log_y, axis=None) + 2 * np.log(0.02)
    assert eight_schools.log_evidence() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(-12.711, abs=1e-3)


@pytest.mark.parametrize("name", [pytest.param("mean_field", marks=pytest.mark.slow), "full_rank"])
@pytest.mark.slow
def test_eight_schools_bounds_of_gaussians(name):
    """Within the errors reported: E[log p(y, z) - log q(z)] over the draws, with q the Gaussian of their moments."""
    config = eight_schools_config.get_config()
    config.gaussian.update({"steps": 600, "rate": 3e-2})
    config.samples = 20_000
    z, extra = eight_schools._gaussian(name, eight_schools.schools, config, None)
    covariance = np.cov(z.T)
    log_q = stats.multivariate_normal.logpdf(
        z, z.mean(axis=0), covariance if name == "full_rank" else np.diag(np.diag(covariance))
    )
    expected, bound = schools_log_joint(np.float64(z)) - log_q, extra["bound"]
    error = bound["estimator_standard_error"]
    np.testing.assert_allclose(error, expected.std() / np.sqrt(config.gaussian.bound_draws), rtol=0.2)
    assert error < 0.03
    assert abs(bound["mean"] - expected.mean()) < 4 * np.hypot(error, expected.std() / np.sqrt(len(z))) + 0.002  # of moments
    assert bound["mean"] < eight_schools.log_evidence() - np.log(2) + 4 * error  # one mode of two


def test_eight_schools_table():
    number = {"sliced_wasserstein": 0.5, "kl_knn": 1.25, "share_tau_positive": 0.5, "seconds": 7.0}
    row = {quantity: {"mean": value} for quantity, value in number.items()}
    results = {name: {**row, "bound": eight_schools.number(-14.25, 0.0127)} for name in eight_schools.LABELS}
    results |= {"nuts": row, "exact": {"log_evidence": {"mean": -12.711}}}
    lines = eight_schools.table(results).splitlines()
    _, nuts, *methods, exact, _, _ = (" ".join(line.split()) for line in lines)
    assert nuts == "NUTS, against itself 0.500 1.250 50.0% - 7"
    assert methods == [f"{label} 0.500 1.250 50.0% -14.250 +- 0.013 7" for label in eight_schools.LABELS.values()]
    assert exact == "log p(y), quadrature -12.711"
    assert lines[5].index("-12.711") < len(lines[5]) <= lines[2].index("0.013") + len("0.013")  # in the bounds' column
    assert lines[-1].endswith("= -13.404.")


@pytest.mark.slow
def test_eight_schools_end_to_end(tmp_path, capsys):
    eight_schools.main(eight_schools_config.get_config("smoke"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("exact")["log_evidence"]["mean"] == eight_schools.log_evidence()
    assert set(results) == {"nuts", "avb", "mean_field", "full_rank"}
    for name, quantities in results.items():
        assert {"sliced_wasserstein", "kl_knn", "share_tau_positive"} <= set(quantities)
        assert name == "nuts" or 0 < quantities["bound"]["estimator_standard_error"] < 0.5
    assert (tmp_path / "figures" / "eight_schools.png").exists()
    assert "NUTS, against itself" in capsys.readouterr().out
