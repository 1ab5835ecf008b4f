"""Per-example estimators on a model whose log p(x) is known: with one key they all see the same binary images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from avb_jax import Bernoulli, Model, Players, Posterior, StandardNormal, State
from avb_jax.evaluation import ais, elbo, held_out, importance, quadrature
from avb_jax.evaluation.examples import map_examples
from avb_jax.methods import vae

KEY = jax.random.key(3)
LOGITS = np.random.default_rng(0).choice([-3.0, 3.0], (6, 6)).astype(np.float32)
GREY = np.full((6, 6, 6), 0.5, np.float32)  # which binarises to log-likelihoods that are nats apart


class Prior(nn.Module):
    """Q(z|x) = p(z)."""

    def __call__(self, x, noise):
        return Posterior(noise, jnp.zeros((len(x), 1)), jnp.ones((len(x), 1)), gaussian=True)


class Constant(nn.Module):
    """The same pixels whatever z."""

    def __call__(self, z):
        return jnp.broadcast_to(jnp.asarray(LOGITS), (len(z), 6, 6))[..., None]


MODEL = Model(Players(Prior(), Constant(), None), StandardNormal(1), Bernoulli(), 1)
STATE = State(jnp.zeros((), jnp.int32), Players({}, {}), Players(), Players({}, {}, {}), None)


def log_p(images):
    return -np.sum(np.logaddexp(0, np.where(images > 0.5, -LOGITS, LOGITS)), axis=(1, 2))


def test_all_estimators_see_the_same_binary_images():
    x = np.asarray(map_examples("looking", lambda key, x: x, KEY, GREY, None, "dynamic", 3))
    assert len(np.unique(x, axis=0)) == len(x)
    shared = {"model": MODEL, "binarize": "dynamic"}
    found = {
        "elbo": elbo.elbo_terms(KEY, STATE, GREY, method=vae, **shared).elbo,
        "quadrature": quadrature.log_likelihood(KEY, STATE, GREY, **shared, points=200).log_likelihood,
        "ais": ais.log_likelihood(KEY, STATE, GREY, **shared, inflation=1.0, chains=2, temperatures=3).log_likelihood,
        "importance": importance.log_likelihood(KEY, STATE, GREY, **shared, inflation=1.0, samples=4).log_likelihood,
    }
    for name, estimate in found.items():
        np.testing.assert_allclose(estimate, log_p(x), atol=2e-3, err_msg=name)


def test_the_held_out_bound_is_on_the_images_of_the_elbo():
    """Here both are log p(x), image by image, but for what weighing 128 draws of a proposal 1.2 times as wide leaves."""
    result = held_out.compare(KEY, STATE, GREY, method=vae, model=MODEL, binarize="dynamic")
    assert result.excess_error < 0.03
    assert abs(result.excess) < 4 * result.excess_error + 0.01
    assert not result.parted
    with_other_images = held_out.compare(jax.random.key(4), STATE, GREY, method=vae, model=MODEL, binarize="dynamic")
    assert abs(with_other_images.elbo - result.elbo) > 0.5


@pytest.mark.parametrize(("excess", "error", "parted"), [(1.01, 0.3, True), (0.99, 0.1, False), (2.0, 0.7, False)])
def test_when_an_elbo_stands_too_high(excess, error, parted):
    """By more than a nat and than three standard errors."""
    assert held_out.HeldOut(0.0, 0.0, excess, error, 1.0).parted == parted


def test_an_example_s_randomness_is_its_number_s_and_its_estimator_s():
    def uniform(name, key=KEY, **options):
        arguments = {"images": GREY, "numbers": None, "binarize": "none", "chunk": 4, **options}
        return np.asarray(map_examples(name, lambda key, x: jax.random.uniform(key), key, **arguments))

    one = uniform("one")
    assert len(np.unique(np.concatenate([one, uniform("two"), uniform("one", jax.random.key(4))]))) == 18
    np.testing.assert_array_equal(uniform("one", images=GREY[:2], numbers=jnp.array([4, 1])), one[[4, 1]])
