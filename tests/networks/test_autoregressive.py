"""Autoregressive networks of images: what a pixel sees, probabilities that sum to one, draws that are the model's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import distributions, models, networks
from avb_jax.models import Autoregressive
from avb_jax.networks import onednn
from avb_jax.networks.conv import conv

KINDS = {"pixelcnn": networks.GatedPixelCNN, "row_lstm": networks.RowLSTM}
SHAPES = [(5, 4), (4, 5, 3)]


def scattered(module, *inputs, scale=0.3):
    """Variables with noise on every array, so that nothing is at its start."""
    variables = jax.jit(module.init)(jax.random.key(2), *inputs)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(structure, [a + scale * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


@pytest.fixture(params=itertools.product(KINDS, SHAPES, (False, True)), ids=str)
def case(request):
    """A network of two numbers per pixel, its variables, images, and features where it has some."""
    kind, shape, conditional = request.param
    net = KINDS[kind](shape, 2, channels=6, layers=3, kernel_size=5)
    x = jax.random.uniform(jax.random.key(0), (2, *shape))
    features = jax.random.normal(jax.random.key(1), (2, *shape[:2], 3)) if conditional else None
    return kind, net, scattered(net, x, features), x, features


def test_a_pixel_sees_those_before_it(case):
    """By gradients: never itself or a later one; a gated PixelCNN all that are within its reach, without a blind spot."""
    kind, net, variables, x, features = case
    height, width = net.x_shape[:2]

    def outputs(x):
        return net.apply(variables, x, features).reshape(2, height, width, -1).sum(axis=(0, -1))

    of_all = np.moveaxis(np.abs(jax.jit(jax.jacobian(outputs))(x)), 2, -1)  # of either image
    seen = of_all.reshape(height, width, height, width, -1).sum(axis=-1) > 0
    by_order = seen.reshape(height * width, height * width)
    assert not np.triu(by_order).any()
    if kind == "pixelcnn":  # whose reach is the whole of so small an image
        assert by_order.sum() == height * width * (height * width - 1) // 2
    else:  # a triangle of the rows above, which grows by a pixel to either side with each, and its own row
        rows, columns = np.arange(height)[:, None], np.arange(width)
        for i, j in np.ndindex(height, width):
            triangle = (rows < i) & (np.abs(columns - j) <= 3 * (i - rows) + 15)
            assert not seen[i, j][~triangle & (rows != i)].any()


@pytest.mark.slow
def test_pixels_are_drawn_from_what_teacher_forcing_says_of_them(case):
    """One by one with cached activations, in the place of the whole image: the same outputs."""
    _, net, variables, _, features = case

    def draw(key, output):
        return jax.nn.sigmoid(output[..., 0]) + 0.1 * jax.random.normal(key, output.shape[:-1])

    def drawn(seed, draw):
        return jax.jit(lambda: net.apply(variables, jax.random.key(seed), 2, features, draw, method="draw"))()

    forced = jax.jit(lambda x: net.apply(variables, x, features))
    x = drawn(5, draw)
    again = forced(x)
    noise = np.asarray(x - jax.nn.sigmoid(again[..., 0]))
    assert x.shape == (2, *net.x_shape)
    assert 0.05 < noise.std() < 0.2
    kept = drawn(6, lambda key, output: output[..., 0])
    np.testing.assert_allclose(kept, forced(kept)[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formulation", ["rows", "patches", "onednn"])
@pytest.mark.parametrize(
    ("kernel", "pads"), [((2, 3), ((1, 0), (1, 1))), ((1, 4), ((0, 0), (3, 0))), ((3, 3), ((0, 0), (0, 0)))]
)
@pytest.mark.slow
def test_convolutions_that_look_one_way(formulation, kernel, pads):
    """Each formulation, with any padding and a kernel that is no square, and its gradients, as XLA's own."""
    if formulation == "onednn" and not onednn.available():
        pytest.skip("oneDNN is not installed")
    x, w = jax.random.normal(jax.random.key(0), (2, 6, 7, 3)), jax.random.normal(jax.random.key(1), (*kernel, 3, 5))

    def of(formulation):
        f = lambda x, w: jnp.sum(jnp.sin(conv(x, w, formulation=formulation, pads=pads)))  # noqa: E731
        return conv(x, w, formulation=formulation, pads=pads), *jax.grad(f, argnums=(0, 1))(x, w)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), of(formulation), of("lax"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_probabilities_of_all_images_sum_to_one(kind):
    """Of 3x3 binary ones; and draws come as often as they should."""
    net = KINDS[kind]((3, 3), 1, channels=4, layers=2, kernel_size=3)
    x = jnp.array(list(itertools.product((0.0, 1.0), repeat=9))).reshape(-1, 3, 3)
    variables = scattered(net, x)
    of_x = Autoregressive(net, distributions.bernoulli, jnp.zeros((1, 3, 3, 0)), variables)
    log_p = jax.jit(of_x.log_prob)(x)
    np.testing.assert_allclose(jax.nn.logsumexp(log_p), 0.0, atol=1e-5)
    drawn = jax.jit(lambda key: of_x.sample(key, (20_000,)))(jax.random.key(0))
    assert drawn.shape == (20_000, 1, 3, 3)
    which = np.asarray(drawn.reshape(-1, 9)) @ 2 ** np.arange(8, -1, -1)
    counts, expected = np.bincount(which.astype(int), minlength=512), 20_000 * np.exp(log_p)
    common = expected > 20
    assert np.abs((counts - expected) / np.sqrt(expected))[common].max() < 5


def test_256_levels():
    """A discretised logistic per pixel: the probabilities of a pixel's values sum to one, given the others."""
    net = networks.GatedPixelCNN((2, 2), 2, channels=4, layers=2, kernel_size=3)
    x = jnp.full((256, 2, 2), 0.2).at[:, 1, 1].set(jnp.arange(256) / 255)
    variables = scattered(net, x)
    likelihood = models.autoregressive(net, distributions.discretized_logistic())
    of_x = likelihood(networks.model_decoder.Conditioned(jnp.zeros((1, 2, 2, 0)), variables))
    log_prob = jax.jit(of_x.log_prob)
    first = log_prob(x.at[:, 1, 1].set(0.0))
    rest = jax.nn.logsumexp(log_prob(x))
    alone = jax.jit(lambda x: distributions.discretized_logistic()(net.apply(variables, x, None)).base_dist.log_prob(x))(x)
    np.testing.assert_allclose(rest, alone[0].at[1, 1].set(0.0).sum(), rtol=1e-4)
    assert bool(of_x.support(jax.jit(of_x.sample)(jax.random.key(0))).all())
    assert np.isfinite(first).all()


@pytest.mark.slow
def test_a_decoder_with_a_model_of_x():
    """p(x|z) depends on z through the trunk's features, and its params are the decoder's."""
    net = networks.GatedPixelCNN((4, 4), 1, channels=4, layers=2, kernel_size=3)
    module = networks.ModelDecoder(networks.MLPDecoder((4, 4), 3, (8,)), net)
    z, x = jax.random.normal(jax.random.key(0), (2, 5)), jnp.zeros((2, 4, 4))
    variables = scattered(module, z)
    output = module.apply(variables, z)
    assert output.features.shape == (2, 4, 4, 3)
    assert variables["params"].keys() == {"trunk", "model"}
    of_x = models.autoregressive(net, distributions.bernoulli)(output)
    assert of_x.batch_shape == (2,)
    log_p = of_x.log_prob(x)
    assert abs(log_p[0] - log_p[1]) > 1e-3
    with_features = net.apply({"params": variables["params"]["model"]}, x, output.features)
    np.testing.assert_allclose(log_p, distributions.bernoulli(with_features).log_prob(x), rtol=1e-5)
