"""Per-example estimators on a model whose log p(x) is known: with one key they all see the same binary images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Method, Posterior, State, Terms
from avb_jax.distributions import bernoulli, standard_normal
from avb_jax.evaluation import AIS, ELBO, ImportanceSampling, Quadrature
from avb_jax.evaluation.examples import map_examples
from tests.evaluation.common import over

KEY = jax.random.key(3)
LOGITS = np.random.default_rng(0).choice([-3.0, 3.0], (6, 6)).astype(np.float32)
GREY = np.full((6, 6, 6), 0.5, np.float32)  # which binarises to log-likelihoods that are nats apart
STATE = State(jnp.zeros((), jnp.int32), {}, None, None)


def constant() -> Method:
    """The same pixels whatever z, and q(z|x) = p(z) = N(0, 1)."""
    prior = standard_normal(1)

    def encode(key, state, x, draws=None):
        z = jax.random.normal(key, (len(x), 1) if draws is None else (draws, len(x), 1))
        return Posterior(z, jnp.zeros((len(x), 1)), jnp.ones((len(x), 1)), gaussian=True)

    def decode(state, z):
        return bernoulli(jnp.broadcast_to(jnp.asarray(LOGITS), (len(z), 6, 6))[..., None])

    def log_joint(state, x, z):
        return decode(state, z).log_prob(x) + prior.log_prob(z)

    def elbo(key, state, x):
        return Terms(-decode(state, encode(key, state, x).z).log_prob(x), jnp.zeros(len(x)))

    return Method("constant", None, None, None, prior, encode, decode, log_joint, elbo)


def log_p(images):
    """Log p(x) of binary images, by NumPy."""
    return -np.sum(np.logaddexp(0, np.where(images > 0.5, -LOGITS, LOGITS)), axis=(1, 2))


@pytest.mark.slow
def test_all_estimators_see_the_same_binary_images():
    x = np.asarray(map_examples("looking", lambda key, x: x, KEY, GREY, None, "dynamic", 3))
    assert len(np.unique(x, axis=0)) == len(x)
    estimators = {
        "elbo": ELBO(),
        "log_likelihood": Quadrature(points=200),
        "ais": AIS(inflation=1.0, chains=2, temperatures=3),
        "importance": ImportanceSampling(inflation=1.0, samples=4),
    }
    for name, estimator in estimators.items():
        found = over(estimator, constant(), STATE, GREY, key=KEY, binarize="dynamic")
        found = found.elbo if name == "elbo" else found.log_likelihood
        np.testing.assert_allclose(found, log_p(x), atol=2e-3, err_msg=name)


def uniform(name, key=KEY, **options):
    """A number of each example's own randomness."""
    arguments = {"images": GREY, "numbers": None, "binarize": "none", "chunk": 4, **options}
    return np.asarray(map_examples(name, lambda key, x: jax.random.uniform(key), key, **arguments))


def test_an_example_s_randomness_is_its_number_s_and_its_estimator_s():
    one = uniform("one")
    assert len(np.unique(np.concatenate([one, uniform("two"), uniform("one", jax.random.key(4))]))) == 18
    np.testing.assert_array_equal(uniform("one", images=GREY[:2], numbers=jnp.array([4, 1])), one[[4, 1]])


@pytest.mark.parametrize("chunk", [1, 3, 6, 100])
def test_chunks_change_nothing(chunk):
    np.testing.assert_array_equal(uniform("one", chunk=chunk), uniform("one"))


def test_images_are_as_the_data_set_stores_them():
    bytes_ = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10
    x = map_examples("looking", lambda key, x: x, KEY, bytes_, None, "none", 2)
    np.testing.assert_allclose(x, bytes_ / 255.0, rtol=1e-6)
    x = map_examples("looking", lambda key, x: x, KEY, bytes_, None, "threshold", 2)
    np.testing.assert_array_equal(x, bytes_ >= 128)
