"""Bounds from both sides of simulated data, against a model in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

from avb_jax import Method, State, UserError
from avb_jax.evaluation import BDMC
from avb_jax.evaluation.bdmc import Sandwich
from avb_jax.evaluation.run import evaluate
from tests.evaluation.common import over
from tests.ppca import Case

QUICK = {"chains": 4, "leapfrog_steps": 5}


@pytest.mark.slow
def test_errors_are_those_of_the_two_sides():
    """Both bounds err about one log p(x), so that their difference has the spread of both errors put together."""
    case = Case(2, 0.3)
    result = over(BDMC(temperatures=5, chains=8), case.method, case.state, None, numbers=jnp.arange(80))
    spread = np.std(result.width, ddof=1)
    reported = np.sqrt(np.mean(np.square(result.lower_error) + np.square(result.upper_error)))
    assert 0.7 < spread / reported < 1.4
    assert result.width.mean() > -4 * spread / np.sqrt(80)


@pytest.mark.slow
def test_of_a_model_in_closed_form():
    """The bounds surround the mean log p(x) of the model's own data, and close as the temperatures rise."""
    case, numbers = Case(8, 0.1), jnp.arange(6)
    wide, narrow = (
        over(BDMC(initial="prior", temperatures=t, **QUICK), case.method, case.state, None, numbers=numbers) for t in (30, 200)
    )
    assert wide.width.mean() > 2 * narrow.width.mean() > 0
    spread = np.sqrt(0.5 * 784 / len(numbers))  # of the mean of log p(x): chi-squared over two
    assert narrow.lower.mean() < case.mean_log_likelihood + 3 * spread
    assert narrow.upper.mean() > case.mean_log_likelihood - 3 * spread
    of_encoder = over(BDMC(temperatures=50, **QUICK), case.method, case.state, None, numbers=numbers)
    assert abs(of_encoder.width.mean()) < 0.1
    assert abs(of_encoder.lower.mean() - case.mean_log_likelihood) < 3 * spread


@pytest.mark.slow
def test_at_the_default_settings():
    case = Case(8, 0.1)
    result = over(BDMC(), case.method, case.state, None, numbers=jnp.arange(40))
    assert abs(result.width.mean()) < 0.05


class Fixed(BDMC):
    """One with results that are given."""

    def over(self, method, key, state, images, numbers, binarize):
        lower, upper = jnp.array([-3.0, -2.0, -4.0])[numbers % 3], jnp.array([-2.0, -2.5, -3.0])[numbers % 3]
        errors = jnp.full(len(numbers), 0.3), jnp.full(len(numbers), 0.4)
        return Sandwich(lower, upper, *errors, jnp.full((len(numbers), 2), 0.5))


def test_numbers_of_a_run():
    """Each bound under its name, the width between them with the errors of both; chains that diverge are noted."""
    case = Case(2, count=2)
    report = evaluate(case.method, case.state, case.x, [Fixed(images=3)], quiet=True)
    lower, upper, width = (report[what, "bdmc"] for what in ("log_likelihood_lower", "log_likelihood_upper", "width"))
    assert (lower.mean, upper.mean, width.mean) == pytest.approx((-3.0, -2.5, 0.5))
    assert (lower.examples, upper.examples, width.examples) == (3, 3, 3)
    np.testing.assert_allclose([lower.estimator_error, upper.estimator_error], [0.3 / np.sqrt(3), 0.4 / np.sqrt(3)], rtol=1e-5)
    np.testing.assert_allclose(width.estimator_error, 0.5 / np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(width.per_example, [1.0, -0.5, 1.0])
    assert [note.split(" diverged")[0] for note in report.notes] == ["vae: bdmc: 6 of 6 chains"]


def test_simulated_examples_have_a_number():
    with pytest.raises(UserError, match="images=None: must be how many examples to simulate"):
        BDMC(images=None)


@pytest.mark.slow
def test_another_prior_and_likelihood():
    """Counts x ~ Poisson(exp(z)), z from a mixture of two: both bounds about E log p(x) by a sum over x and a grid over z."""
    components = dist.Normal(jnp.array([[-0.5], [1.0]]), jnp.array([[0.4], [1.0]])).to_event(1)
    prior = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), components)

    def decode(state, z):
        return dist.Poisson(jnp.exp(z)).to_event(1)

    def log_joint(state, x, z):
        return decode(state, z).log_prob(x) + prior.log_prob(z)

    method = Method("counts", None, None, None, prior, decode=decode, log_joint=log_joint)
    state = State(jnp.zeros((), jnp.int32), {}, None, None)
    result = over(BDMC(initial="prior", temperatures=50, **QUICK), method, state, None, numbers=jnp.arange(200))
    assert abs(result.width.mean()) < 0.1
    z, x = np.linspace(-7, 7, 1401), np.arange(400)
    p_z = 0.3 * stats.norm.pdf(z, -0.5, 0.4) + 0.7 * stats.norm.pdf(z, 1.0, 1.0)
    p_x = np.sum(stats.poisson.pmf(x[:, None], np.exp(z)) * p_z, axis=1) * 0.01
    expected = np.sum(p_x * np.log(p_x))
    for bound in (result.lower, result.upper):
        assert abs(bound.mean() - expected) < 4 * bound.std(ddof=1) / np.sqrt(200)
