"""Adversaries of images alone, as GAN and VAE/GAN have them; `test_step` has their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import avb_jax
from avb_jax import distributions, networks
from avb_jax.methods import gan
from tests.conftest import small_networks


def test_all_images_go_through_one_call(images):
    """So that a batch normalisation sees data and generated images together, each of which keeps its place."""
    network = small_networks("gan", batch_norm=True).adversary
    variables = network.init(jax.random.key(0), images, None)
    params = variables.pop("params")
    params["t"]["kernel"] = jnp.ones_like(params["t"]["kernel"])  # T starts at 0
    made = jax.random.uniform(jax.random.key(1), (2, *images.shape))
    output, after = gan.evaluate_images(network, params, variables, images, made)
    together = jnp.concatenate([images, *made])
    expected, expected_after = network.apply({"params": params, **variables}, together, None, train=True)
    np.testing.assert_allclose(output.t, expected.t.reshape(3, 8), rtol=1e-5)
    np.testing.assert_allclose(output.features, expected.features.reshape(3, 8, -1), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, expected_after)


def test_what_it_generates_is_the_likelihood_s_mean(images):
    """With any likelihood; without one said, an image in [0, 1] of a logit per pixel."""
    decoder = networks.MLPDecoder((6, 6), 1, (8,))
    adversary = networks.ImageAdversary(networks.MLP((8,), input_rank=2))
    common = {"prior": distributions.standard_normal(3), "optimizers": optax.sgd(1.0)}
    z = common["prior"].sample(jax.random.key(1), (5,))
    for likelihood, link in (({}, jax.nn.sigmoid), ({"likelihood": distributions.gaussian(0.1)}, lambda a: a)):
        method = avb_jax.gan(decoder, adversary, **common, **likelihood)
        state = method.init(jax.random.key(0), images)
        expected = link(decoder.apply({"params": state.params.decoder}, z)[..., 0])
        np.testing.assert_allclose(method.sample(jax.random.key(1), state, 5), expected, rtol=1e-5)
