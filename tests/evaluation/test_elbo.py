"""The ELBO against closed forms, under T and with a density."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avb_jax
from avb_jax import Terms, UserError, networks
from avb_jax.distributions import bernoulli, standard_normal
from avb_jax.evaluation import ELBO
from avb_jax.evaluation.elbo import of_kl
from avb_jax.evaluation.run import evaluate
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.common import KEY, over
from tests.ppca import SHIFT, Case


def test_with_the_exact_log_ratio_it_is_the_analytic_one():
    """Over many draws, through AVB's own terms; the errors are those of the draws alone."""
    x = np.array([[0.5, 0.9], [0.1, 0.2]], np.float32)
    terms = over(ELBO(draws=50, chunk=100), game.method(), game.state(offset=0.0), np.repeat(x, 1000, 0))
    for same_x, expected in zip((slice(1000), slice(1000, 2000)), game.elbo(x), strict=True):
        found = terms.elbo[same_x]
        assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(1000)
        own = np.sqrt(np.mean(np.square(terms.standard_error[same_x])))
        np.testing.assert_allclose(own, found.std(), rtol=0.1)
    np.testing.assert_allclose(terms.elbo, -terms.reconstruction - terms.kl, rtol=1e-6)


def test_under_t():
    """With T's offset in it, under T's name, and a note that it bounds nothing."""
    x = game.points(40)
    report = evaluate(game.method(), game.state(), x, [ELBO(draws=100)], quiet=True)
    z, _, log_ratio = game.monte_carlo(x, 2000)
    exact_kl, elbo = game.posterior_kl(x) + game.OFFSET, game.elbo(x) - game.OFFSET
    number = report["elbo", "adversary"]
    reconstruction = np.sum(np.square(x[:, None] - game.W * z), axis=-1) / (2 * game.SIGMA**2)
    error = np.sqrt(np.mean((reconstruction + log_ratio(z)).var(axis=1)) / 100 / 40)
    np.testing.assert_allclose(number.estimator_error, error, rtol=0.1)
    assert number.examples == 40
    assert abs(number.mean - elbo.mean()) < 4 * error
    np.testing.assert_allclose(number.examples_error, elbo.std(ddof=1) / np.sqrt(40), rtol=0.2)
    assert abs(report["kl", "adversary"].mean - exact_kl.mean()) < 4 * np.sqrt(log_ratio(z).var(axis=1).mean() / 4000)
    total = report["reconstruction_error", "adversary"].mean + report["kl", "adversary"].mean
    assert total == pytest.approx(-number.mean, rel=1e-4)
    assert report.notes == ["avb: the ELBO and its KL are T's: estimates that bound nothing"]


def test_with_a_density():
    """Probabilistic PCA: the KL is the Gaussian's closed form, and there is no T to note."""
    case = Case(2, count=30)
    report = evaluate(case.method, case.state, case.x, [ELBO(draws=200)], quiet=True)
    params = jax.tree.map(np.float64, case.state.params)
    mean = (case.x - params["b"]) @ params["a"].T + SHIFT * params["std"]
    kl = 0.5 * np.sum(mean**2 + params["std"] ** 2 - 1 - 2 * np.log(params["std"]), axis=1)
    np.testing.assert_allclose(report["kl", "density"].mean, kl.mean(), rtol=1e-4)
    # log p(x) - KL(q, p(z|x)), of Gaussians with the covariances D = diag std^2 and C, the posterior's.
    precision = np.eye(2) + params["w"].T @ params["w"] / 0.3**2
    gap = 0.5 * (
        np.trace(precision * params["std"] ** 2)
        + SHIFT**2 * params["std"] @ precision @ params["std"]
        - 2
        - np.linalg.slogdet(precision)[1]
        - 2 * np.log(params["std"]).sum()
    )
    number = report["elbo", "density"]
    assert abs(number.mean - (case.log_likelihood.mean() - gap)) < 4 * number.estimator_error + 1e-3
    assert number.estimator_error < 0.05
    assert report.notes == []


def test_where_the_kl_term_comes_from():
    """An encoder's own density, or what its auxiliary variables make of it, or the mixture of a semi-implicit one; else T."""
    common = {"prior": standard_normal(2), "likelihood": bernoulli, "optimizers": optax.sgd(1e-3)}
    trunk, decoder = networks.MLP((3,), input_rank=2), networks.MLPDecoder((2, 2), (3,))
    for make, encoder, noise_dim, expected in (
        (avb_jax.vae, networks.GaussianEncoder, 2, "density"),
        (avb_jax.iwae, networks.AuxiliaryEncoder, 3, "bound"),
        (avb_jax.vae, networks.AuxiliaryEncoder, 3, "bound"),
        (avb_jax.sivi, networks.SemiImplicitEncoder, 3, "bound"),
    ):
        assert of_kl(make(encoder(trunk, 2), decoder, noise_dim=noise_dim, **common)) == expected, encoder
    assert of_kl(game.method()) == "adversary"


def test_one_draw_has_no_spread():
    case = Case(2, count=3)
    terms = over(ELBO(draws=1), case.method, case.state, case.x)
    assert np.isnan(terms.standard_error).all()
    assert ELBO(draws=1).numbers(SubjectOf(case.method), terms)["elbo", "density"].estimator_error is None


class SubjectOf:
    """What `numbers` needs of a subject."""

    def __init__(self, method):
        self.method = method


def test_the_draws_are_separate():
    """Each draw has a key of its own, and the terms are averaged over them."""
    seen = []

    def elbo(key, state, x):
        noise = jax.random.normal(key, (1,))
        jax.debug.callback(lambda value: seen.append(float(value[0])), noise)
        return Terms(noise, 2 * noise)

    method = Case(2, count=1).method._replace(elbo=elbo)
    terms = jax.jit(lambda key, x: ELBO(draws=5)(method, key, None, x))(KEY, jnp.zeros(3))
    jax.effects_barrier()
    assert len(set(seen)) == 5
    np.testing.assert_allclose([terms.reconstruction, terms.kl], [np.mean(seen), 2 * np.mean(seen)], rtol=1e-5)
    np.testing.assert_allclose(terms.standard_error, 3 * np.std(seen, ddof=1) / np.sqrt(5), rtol=1e-5)


def test_what_it_needs():
    for name in ("avb", "vae"):
        assert ELBO().lacks(small_method(name)) == ""
    for name in ("aae", "bigan", "gan", "vaegan"):
        assert ELBO().lacks(small_method(name)) == "has no ELBO"
    for field in ("draws", "chunk", "images"):
        with pytest.raises(UserError, match=f"{field}=0: must be at least 1"):
            ELBO(**{field: 0})
