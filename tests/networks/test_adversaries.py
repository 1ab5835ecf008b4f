"""Adversaries: T as one function of each (x, z)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import AdversaryOutput, networks

NETS = networks.MLP((8,), input_rank=2), networks.MLP((8,))


def test_an_inner_product_by_hand():
    """<f(x), g(z)> / sqrt(features), with f and g linear in what the two networks make of x and z."""
    x, z = jax.random.uniform(jax.random.key(0), (4, 2, 2)), jax.random.normal(jax.random.key(1), (3, 4, 3))
    adversary = networks.InnerProductAdversary(*NETS, features=5)
    params = adversary.init(jax.random.key(2), x, z)["params"]
    of_x, of_z = (net.apply({"params": params[name]}, a) for net, name, a in zip(NETS, ("x_net", "z_net"), (x, z), strict=True))
    f, g = (h @ params[name]["kernel"] + params[name]["bias"] for h, name in ((of_x, "f"), (of_z, "g")))
    expected = jnp.einsum("bf,sbf->sb", f, g) / np.sqrt(5)
    np.testing.assert_allclose(adversary.apply({"params": params}, x, z), expected, rtol=1e-4, atol=1e-6)


def test_an_inner_product_can_start_at_zero():
    """And is trained from there: its gradient does not vanish."""
    x, z = jnp.ones((4, 2, 2)), jax.random.normal(jax.random.key(1), (4, 3))
    adversary = networks.InnerProductAdversary(*NETS, features=5, starts_at_zero=True)
    params = adversary.init(jax.random.key(2), x, z)
    assert not adversary.apply(params, x, z).any()
    gradient = jax.grad(lambda params: adversary.apply(params, x, z)[0])(params)
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_joint_adversary_starts_at_zero_and_sees_products_sums_and_waves():
    """By hand, from params away from their start."""
    x, z = jax.random.uniform(jax.random.key(0), (4, 2, 2)), jax.random.normal(jax.random.key(1), (3, 4, 3))
    adversary = networks.JointAdversary(*NETS, features=5, widths=(6,), frequencies=(2.0, 5.0))
    params = adversary.init(jax.random.key(2), x, z)["params"]
    assert not adversary.apply({"params": params}, x, z).any()
    params["t"]["kernel"] = jax.random.normal(jax.random.key(3), (6, 1))
    waves = [z, *(wave(frequency * z) for frequency in (2.0, 5.0) for wave in (jnp.sin, jnp.cos))]
    of_x = NETS[0].apply({"params": params["x_net"]}, x)
    of_z = NETS[1].apply({"params": params["z_net"]}, jnp.concatenate(waves, axis=-1))
    f, g = (h @ params[name]["kernel"] + params[name]["bias"] for h, name in ((of_x, "f"), (of_z, "g")))
    (layer,) = params["joint"].values()
    h = jax.nn.silu(jnp.concatenate([f * g, f + g], axis=-1) @ layer["kernel"] + layer["bias"])
    expected = (h @ params["t"]["kernel"] + params["t"]["bias"])[..., 0]
    np.testing.assert_allclose(adversary.apply({"params": params}, x, z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["joint", "mixture"])
def test_an_adversary_s_mixture_is_a_density_of_z(kind):
    """Its exponential has one integral at every x, that of a normalised mixture up to T's constant."""
    x = 0.3 * jax.random.uniform(jax.random.key(0), (4, 2, 2))  # with features small enough for a grid
    adversary = networks.JointAdversary(*NETS, features=5, widths=(6,), components=3)
    adversary = networks.MixtureAdversary(NETS[0], components=3) if kind == "mixture" else adversary
    points = jnp.linspace(-40.0, 40.0, 401)
    z = jnp.stack(jnp.meshgrid(points, points), axis=-1).reshape(-1, 1, 2)
    variables = adversary.init(jax.random.key(2), x, jnp.zeros((4, 2)))
    t = jax.lax.map(
        lambda part: adversary.apply(variables, x, jnp.broadcast_to(part, (len(part), 4, 2))), z.reshape(401, 401, 1, 2)
    )
    integral = jax.nn.logsumexp(t.reshape(-1, 4), axis=0) + 2 * np.log(0.2)
    np.testing.assert_allclose(integral, np.log(2 * np.pi), atol=0.01)
    assert np.std(t[200, 190]) > 0.01  # and depends on x


@pytest.mark.parametrize("x_net", [NETS[0], networks.ConvNet(channels=2, kernel_size=3)])
def test_an_inner_product_treats_each_z_alike(x_net):
    adversary = networks.InnerProductAdversary(x_net, NETS[1], 5)
    x, z = jax.random.uniform(jax.random.key(0), (4, 6, 6)), jax.random.normal(jax.random.key(1), (2, 4, 3))
    apply = jax.jit(adversary.apply)
    variables = jax.jit(adversary.init)(jax.random.key(2), x, z[0])
    together = apply(variables, x, z)
    apart = jnp.stack([apply(variables, x, part) for part in z])
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-6)


def test_an_adversary_of_images_has_features_that_its_t_is_linear_in():
    """And one of codes sees no x; both start at 0."""
    x, z = jax.random.uniform(jax.random.key(0), (4, 6, 6)), jax.random.normal(jax.random.key(1), (4, 3))
    of_images, of_codes = networks.ImageAdversary(NETS[0]), networks.LatentAdversary((8,))
    output, variables = of_images.init_with_output(jax.random.key(2), x)
    assert isinstance(output, AdversaryOutput)
    assert not output.t.any()
    np.testing.assert_array_equal(output.features, NETS[0].apply({"params": variables["params"]["trunk"]}, x))
    variables["params"]["t"]["kernel"] = jnp.ones((8, 1))
    np.testing.assert_allclose(of_images.apply(variables, x).t, output.features.sum(axis=-1), rtol=1e-5)
    t, variables = of_codes.init_with_output(jax.random.key(3), x, z)
    assert not t.any()
    variables["params"]["t"]["kernel"] = jnp.ones((8, 1))
    assert of_codes.apply(variables, x, z).any()
    np.testing.assert_array_equal(of_codes.apply(variables, x, z), of_codes.apply(variables, 0 * x, z))
