"""oneDNN's convolutions: derivatives and batches of any kind are lax.conv's; without oneDNN or a compiler all else goes on."""

import functools
from importlib import metadata

import chex
import jax
import jax.numpy as jnp
import pytest

from avb_jax import UserError
from avb_jax.networks import onednn
from avb_jax.networks.conv import conv, conv_transpose

X = jax.random.normal(jax.random.key(0), (5, 7, 4, 3))  # five examples: threads get parts of different sizes
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
LAYERS = pytest.mark.parametrize("layer", [functools.partial(conv, stride=2), conv_transpose], ids=["conv", "transposed"])


@pytest.fixture
def installed():
    if not onednn.available():
        pytest.skip("oneDNN is not installed: pip install 'avb_jax[onednn]'")


@LAYERS
def test_derivatives_of_any_order_and_many_of_anything(installed, layer):
    def everything(formulation):
        f = lambda x, w: jnp.sum(jnp.sin(layer(x, w, formulation=formulation)))  # noqa: E731
        gradients = jax.grad(f, (0, 1))
        xs, kernels = jnp.stack([X, 2.0 * X]), jnp.stack([KERNEL, -KERNEL], axis=-1)
        return {
            "value": layer(X, KERNEL, formulation=formulation),
            "curvature": jax.jvp(gradients, (X, KERNEL), (jnp.cos(X), jnp.sin(KERNEL)))[1],
            "second order": jax.grad(lambda x: jnp.sum(gradients(x, KERNEL)[0] ** 2))(X),
            "images": jax.vmap(gradients, (0, None))(xs, KERNEL),
            "kernels": jax.vmap(gradients, (None, -1))(X, kernels),
            "both": jax.vmap(gradients, (0, -1))(xs, kernels),
        }

    expected = jax.jit(lambda: everything("lax"))()
    chex.assert_trees_all_close(jax.jit(lambda: everything("onednn"))(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layer", [conv, conv_transpose])
def test_a_kernel_of_one_pixel_has_no_stride(installed, layer):
    """Where oneDNN's gradient of the kernel would end the process, or not, by what lies behind its memory."""
    loss = lambda x, w: jnp.sum(layer(x, w, 2, "onednn") ** 2)  # noqa: E731
    written = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(X, KERNEL[:1, :1]))
    assert written.count(onednn.TARGET) == written.count("stride=1") == 3


@LAYERS
def test_bfloat16_to_its_precision(installed, layer):
    if jnp.bfloat16 not in onednn.dtypes():
        pytest.skip("oneDNN does not convolve bfloat16 on this processor")
    x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    y, backward = jax.vjp(functools.partial(layer, formulation="onednn"), x, kernel)
    exact, exact_backward = jax.vjp(layer, x.astype(jnp.float32), kernel.astype(jnp.float32))
    found, expected = (y, *backward(jnp.ones_like(y))), (exact, *exact_backward(jnp.ones_like(exact)))
    chex.assert_type(found, jnp.bfloat16)
    for value, of_float32 in zip(found, expected, strict=True):
        assert jnp.abs(value - of_float32).max() <= 2**-7 * jnp.abs(of_float32).max()


@LAYERS
def test_no_images_and_types_that_it_does_not_have(installed, layer):
    none = layer(X[:0], KERNEL, formulation="onednn")
    assert none.shape == layer(X, KERNEL)[:0].shape
    with pytest.raises(UserError, match="float16"):
        layer(X.astype(jnp.float16), KERNEL, formulation="onednn")


@LAYERS
def test_a_processor_without_bfloat16_convolves_it_otherwise(monkeypatch, layer):
    monkeypatch.setattr(onednn, "dtypes", lambda: (jnp.float32,))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = jnp.zeros((2, 28, 28, 16)), jnp.zeros((5, 5, 16, 32))
    for dtype, taken in ((jnp.float32, True), (jnp.bfloat16, False)):
        assert (onednn.TARGET in str(jax.make_jaxpr(layer)(x.astype(dtype), kernel.astype(dtype)))) == taken
    with pytest.raises(UserError, match=r"bfloat16: needs .* a processor that has it"):
        layer(X.astype(jnp.bfloat16), KERNEL, formulation="onednn")


@pytest.fixture
def again():
    onednn.dtypes.cache_clear()
    yield
    onednn.dtypes.cache_clear()


def test_without_it_a_line_says_what_it_needs(monkeypatch, again):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(
        UserError, match=r"formulation='onednn', float32: needs a CPU, .* C\+\+ compiler and pip install 'avb_jax\[onednn\]'"
    ):
        conv(X, KERNEL, formulation="onednn")
    chex.assert_shape(conv(X, KERNEL), (5, 7, 4, 4))


@pytest.mark.parametrize(
    ("compiler", "library", "expected"),
    [("false", True, "false: it failed"), ("no-such-compiler", True, "no-such-compiler"), ("", False, "not enough values")],
)
def test_what_cannot_be_used_is_said_once(monkeypatch, tmp_path, again, compiler, library, expected):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = metadata.PackagePath(onednn.LIBRARY)
    path.dist = metadata.PathDistribution(tmp_path / "package")
    if library:
        (tmp_path / onednn.LIBRARY).write_text("not a library")
    monkeypatch.setattr(metadata, "distribution", lambda name: type("Installed", (), {"files": [path]}))
    with pytest.warns(RuntimeWarning, match=f"is installed but cannot be used .*{expected}.*convolutions run without it"):
        assert not onednn.available()
    assert not onednn.available()
    assert not [*tmp_path.glob("avb_jax/onednn/*")]
