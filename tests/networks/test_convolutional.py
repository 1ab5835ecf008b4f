"""The networks of section 4: what they promise beyond their shapes."""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import UserError, networks
from avb_jax.networks import conv, onednn
from avb_jax.networks.dcgan import layer_sizes
from avb_jax.networks.resnet import ResidualUnit


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (64, 64, 3), (5, 9), (2, 2)])
def test_the_conv_family_takes_images_of_any_size(shape):
    """Shapes by abstract evaluation: nothing is computed."""
    x, z, noise = jnp.zeros((3, *shape)), jnp.zeros((3, 7)), jnp.zeros((3, 4))
    key = jax.random.key(0)
    encoder = networks.BlackBoxEncoder(networks.ConvNet(4), 7)
    assert jax.eval_shape(lambda: encoder.init_with_output(key, x, noise)[0]).shape == (3, 7)
    decoder = networks.ConvDecoder(shape, 2, 4)
    assert jax.eval_shape(lambda: decoder.init_with_output(key, z)[0]).shape == (3, *shape, 2)
    adversary = networks.InnerProductAdversary(networks.ConvNet(4), networks.MLP((16,)))
    both = jnp.zeros((2, 3, 7))
    assert jax.eval_shape(lambda: adversary.init_with_output(key, x, both)[0]).shape == (2, 3)
    encoder = networks.BlackBoxEncoder(networks.ResNet(4, units=1), 7)
    assert jax.eval_shape(lambda: encoder.init_with_output(key, x, noise)[0]).shape == (3, 7)
    decoder = networks.GlobalScale(networks.ResNetDecoder(shape, 1, 4, units=1))
    assert jax.eval_shape(lambda: decoder.init_with_output(key, z)[0]).shape == (3, *shape, 2)
    adversary = networks.ConvAdversary(4, z_widths=(16,))
    assert jax.eval_shape(lambda: adversary.init_with_output(key, x, z)[0]).shape == (3,)


def test_layer_sizes():
    assert layer_sizes(64, 64) == [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)]
    assert layer_sizes(28, 28) == [(28, 28), (14, 14), (7, 7), (4, 4), (2, 2)]
    assert layer_sizes(8, 8) == [(8, 8), (4, 4), (2, 2), (2, 2), (2, 2)]


def test_three_units_stand_for_every_hidden_layer():
    """Section 4: four levels of three units in encoder and decoder; z and noise enter each level."""
    x, z, noise = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 5)), jnp.zeros((1, 5))

    def names(module, *inputs):
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
        return [name for name, _ in flax.traverse_util.flatten_dict(params, sep="/").items()]

    encoder, decoder = names(networks.ResNet(4), x, noise), names(networks.ResNetDecoder((64, 64, 3), 1, 4), z)
    for params in (encoder, decoder):
        assert len({name.split("/")[0] for name in params if name.startswith("ResidualUnit")}) == 12
    assert sum(name.endswith("shift/kernel") for name in encoder) == 4
    adversary = names(networks.ConvAdversary(4, z_widths=(8, 8)), x, z)
    assert sum(name.startswith("z_") and name.endswith("kernel") for name in adversary) == 4 + 2


def test_residual_units_start_near_the_identity():
    h = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
    out, _ = ResidualUnit().init_with_output(jax.random.key(1), h)
    change = jnp.std(out - h) / jnp.std(h)
    assert 0.01 < change < 0.3


def test_one_scale_for_all_pixels():
    decoder = networks.GlobalScale(networks.MLPDecoder((4, 4), 1, (8,)))
    z = jax.random.normal(jax.random.key(0), (3, 5))
    out, variables = decoder.init_with_output(jax.random.key(1), z)
    assert out.shape == (3, 4, 4, 2)
    np.testing.assert_allclose(out[..., 1], 10.0 * variables["params"]["raw_scale"], rtol=1e-6)
    np.testing.assert_allclose(out[..., 1], 1.0, rtol=1e-6)
    mean = networks.MLPDecoder((4, 4), 1, (8,)).apply({"params": variables["params"]["decoder"]}, z)
    np.testing.assert_array_equal(out[..., :1], mean)


@pytest.mark.parametrize("through", [pytest.param("noise", marks=pytest.mark.slow), "z"])
@pytest.mark.slow
def test_every_level_of_the_celeba_networks_sees(through):
    """With all projections but one at zero, noise (or z) still reaches the output."""
    x, vector = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3)), jax.random.normal(jax.random.key(1), (4, 5))
    module = networks.ResNet(2, units=1) if through == "noise" else networks.ConvAdversary(2, 3, (4,))
    variables = module.init(jax.random.key(2), x, vector)
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    if through == "z":
        flat["t/kernel"] = jnp.ones_like(flat["t/kernel"])  # at 0, where T starts, nothing would show
    mark = "shift/kernel" if through == "noise" else "z_"
    projections = [name for name in flat if mark in name and name.endswith("kernel")]
    assert len(projections) == (4 if through == "noise" else 5)
    for kept in projections:
        alone = {name: w * (name == kept) if name in projections else w for name, w in flat.items()}
        params = flax.traverse_util.unflatten_dict(alone, sep="/")
        one, two = (module.apply({**variables, "params": params}, x, s * vector) for s in (1.0, -1.0))
        assert not np.allclose(one, two), kept


def test_noise_enters_every_hidden_layer_through_its_own_projection():
    trunk = networks.ConvNet(channels=2, kernel_size=3)
    x, noise = jax.random.uniform(jax.random.key(0), (4, 8, 8)), jax.random.normal(jax.random.key(1), (4, 5))
    variables = trunk.init(jax.random.key(2), x, noise)
    projections = [name for name in variables["params"] if name.startswith("noise_")]
    assert len(projections) == 4
    for name in projections:  # with the others at zero, each alone still carries the noise to the output
        silent = {n: jax.tree.map(lambda w, keep=(n == name): w * keep, variables["params"][n]) for n in projections}
        params = {**variables["params"], **silent}
        one, two = (trunk.apply({**variables, "params": params}, x, s * noise) for s in (1.0, -1.0))
        assert not np.allclose(one, two), name


def test_batch_normalisation_is_where_the_paper_has_it_and_can_be_turned_off():
    def statistics(module, *inputs):
        return "batch_stats" in jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))

    x, z, noise = jnp.zeros((2, 8, 8)), jnp.zeros((2, 3)), jnp.zeros((2, 5))
    assert statistics(networks.ConvNet(2), x, noise)
    assert not statistics(networks.ConvNet(2, batch_norm=False), x, noise)
    assert not statistics(networks.ConvDecoder((8, 8), 1, 2), z)
    assert statistics(networks.ConvDecoder((8, 8), 1, 2, batch_norm=True), z)


@pytest.mark.parametrize(
    ("module", "second"),
    [
        (networks.ConvNet(2, 3), 5),
        (networks.ConvDecoder((8, 8), 1, 2, 3, batch_norm=True), None),
        (networks.ConvAdversary(2, 3, (4,)), 5),
        (networks.ResNetDecoder((8, 8), 1, 2, units=1, batch_norm=True), None),
    ],
)
@pytest.mark.slow
def test_batch_normalisation_trains_on_the_batch_and_evaluates_by_running_statistics(module, second):
    """In training it reads none and moves them by a hundredth of the way; in evaluation it is they that count."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    inputs = [jnp.asarray(rng.random((4, 8, 8) if second else (4, 3)), jnp.float32)]
    inputs += [jnp.asarray(rng.standard_normal((4, second)), jnp.float32)] if second else []
    variables = module.init(key, *inputs)
    if "t" in variables["params"]:  # T starts at 0
        variables["params"]["t"]["kernel"] = jnp.ones_like(variables["params"]["t"]["kernel"])
    broken = {**variables, "batch_stats": jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), variables["batch_stats"])}
    trained, _ = module.apply(broken, *inputs, train=True, mutable=["batch_stats"])
    assert np.isfinite(trained).all()
    assert not np.isfinite(module.apply(broken, *inputs)).any()
    _, moved = module.apply(variables, *inputs, train=True, mutable=["batch_stats"])
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, from_zero = module.apply({**variables, "batch_stats": zero}, *inputs, train=True, mutable=["batch_stats"])
    kept = jax.tree.map(lambda a: 0.99 * a, variables["batch_stats"])
    difference = jax.tree.map(lambda a, b: a - b, moved["batch_stats"], from_zero["batch_stats"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), difference, kept)


@pytest.mark.parametrize("module", [networks.ConvNet(2, 3, batch_norm=False), networks.ResNet(2, units=1, batch_norm=False)])
def test_pixels_are_centred_and_spread(module):
    """[0, 1] becomes [-1, 1]: at the start, without biases, a grey image is nothing, and black the negative of white."""
    grey = jnp.full((1, 8, 8), 0.5)
    variables = module.init(jax.random.key(0), grey)
    assert not module.apply(variables, grey).any()
    linear = module.clone(activation=lambda h: h)
    black, white = (linear.apply(variables, jnp.full((1, 8, 8), value)) for value in (0.0, 1.0))
    np.testing.assert_allclose(black, -white, rtol=1e-4, atol=1e-6)
    assert np.abs(white).max() > 1e-3


@pytest.mark.parametrize(("name", "batch", "parts"), [("conv", 12, 3), ("conv_transpose", 12, 3), ("conv", 7, 7)])
@pytest.mark.slow
def test_patches_are_made_of_a_few_examples_at_a_time(name, batch, parts, monkeypatch):
    """As many as fit, of a power of two that divides the batch: the same values and gradients; in one go on several devices."""
    function = getattr(conv, name)
    x, kernel = jax.random.normal(jax.random.key(0), (batch, 5, 6, 2)), jax.random.normal(jax.random.key(1), (3, 3, 2, 4))

    def value_and_gradients(x, kernel):
        def loss(x, kernel):
            y = function(x, kernel, 2, "patches")
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, kernel)

    whole = value_and_gradients(x, kernel)
    of_one = 4 * {"conv": 3 * 3, "conv_transpose": 5 * 6}[name] * 2 * {"conv": 9, "conv_transpose": 4}[name]
    monkeypatch.setattr(conv, "WHOLE", of_one)
    monkeypatch.setattr(conv, "CACHE", 7 * of_one)
    assert "scan" not in str(jax.make_jaxpr(lambda *given: value_and_gradients(*given))(x, kernel))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    chex.assert_trees_all_close(whole, value_and_gradients(x, kernel), rtol=1e-5, atol=1e-5)
    assert f"length={parts}" in str(jax.make_jaxpr(lambda *given: value_and_gradients(*given))(x, kernel))


@pytest.mark.parametrize("installed", [False, True])
def test_formulations_by_shape(monkeypatch, installed):
    monkeypatch.setattr(onednn, "dtypes", lambda: (jnp.float32,) * installed)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    of, wide = functools.partial(conv.formulation_of, "auto", jnp.float32, size=1000), "onednn" if installed else "patches"
    assert of(14, 3, 1, 4) == of(4, 5, 2, 128) == "rows"
    assert of(28, 5, 2, 16) == of(32, 3, 1, 16) == of(8, 2, 2, 4) == wide
    assert conv.formulation_of("auto", jnp.float64, 28, 5, 2, 16, 1000) == "patches"
    assert conv.formulation_of("lax", jnp.float32, 28, 5, 2, 16, 1000) == "lax"
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # a call of oneDNN's cannot be split
    assert of(28, 5, 2, 16) == "patches"
    with pytest.raises(UserError, match="formulation='fft': must be one of auto, lax, onednn, rows, patches"):
        conv.formulation_of("fft", jnp.float32, 28, 5, 2, 16, 1000)


def test_small_images_are_matrix_products_on_gpus_too(monkeypatch):
    seen, formulation_of = [], conv.formulation_of
    monkeypatch.setattr(conv, "formulation_of", lambda *given: seen.append(formulation_of(*given)) or "lax")

    def chosen(backend, function, shape, kernel):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        jax.eval_shape(functools.partial(function, stride=2), jnp.zeros(shape), jnp.zeros(kernel))
        return seen[-1]

    assert chosen("gpu", conv.conv, (128, 28, 28, 1), (5, 5, 1, 16)) == "patches"
    assert chosen("gpu", conv.conv_transpose, (128, 14, 14, 16), (5, 5, 16, 1)) == "rows"
    assert chosen("gpu", conv.conv, (128, 64, 64, 64), (5, 5, 64, 64)) == "lax"
    assert chosen("gpu", conv.conv_transpose, (1024, 14, 14, 64), (5, 5, 64, 64)) == "lax"
    assert chosen("tpu", conv.conv, (128, 28, 28, 1), (5, 5, 1, 16)) == "lax"
