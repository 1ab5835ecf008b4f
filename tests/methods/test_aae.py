"""The adversarial autoencoder: T sees z alone, and says nothing of one example's KL."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import avb_jax
from avb_jax import distributions, networks
from tests.conftest import small_method

SEES_X = networks.InnerProductAdversary(networks.MLP((8,), input_rank=2), networks.MLP((8,)), 5)


def test_t_sees_no_x_whatever_its_network(images):
    """In training, in what T says of examples, and in a fresh one's training."""
    modules = networks.BlackBoxEncoder(networks.MLP((8,), input_rank=2), 3), networks.MLPDecoder((6, 6), 1, (8,))
    method = avb_jax.aae(
        *modules,
        SEES_X,
        prior=distributions.standard_normal(3),
        likelihood=distributions.bernoulli,
        optimizers=optax.sgd(1.0),
        noise_dim=3,
    )
    start = method.init(jax.random.key(0), images)
    state, info = jax.jit(method.train_step)(jax.random.key(1), start, images)
    kernel = lambda state: state.params.adversary["x_net"]["Dense_0"]["kernel"]  # noqa: E731
    assert (kernel(start) == kernel(state)).all()  # it was given zeros
    fresh = method.fresh_adversary(optax.sgd(1.0), state)
    began = fresh.init(jax.random.key(2), images)
    after, _ = jax.jit(fresh.train_step)(jax.random.key(3), began, images)
    assert (kernel(began) == kernel(after)).all()
    assert (after.params.adversary["f"]["bias"] != began.params.adversary["f"]["bias"]).any()
    z = method.encode(jax.random.split(jax.random.key(1))[0], start, images).z
    t = SEES_X.apply({"params": start.params.adversary}, jnp.zeros_like(images), z)
    np.testing.assert_allclose(info.kl_aggregated_posterior, t, rtol=1e-4, atol=1e-6)


def test_there_is_no_kl_of_an_example_nor_a_contrast(images):
    """Also of a fresh adversary: T estimates the KL of the aggregated posterior alone."""
    method = small_method("aae")
    state = method.init(jax.random.key(0), images)
    fresh = method.fresh_adversary(optax.adam(1e-3), state)
    for trained in (method, fresh):
        assert trained.adversary(jax.random.key(1), state, images).kl is None
        assert trained.elbo is None
    assert not {"contrast", "minus_log_prior"} & inspect.signature(avb_jax.aae).parameters.keys()
