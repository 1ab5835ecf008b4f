"""The CelebA networks of section 4: every hidden layer of the DC-GAN family replaced by three ResNet units (He et al. 2015).

`channels` counts the first level's features; each level halves the resolution and doubles the features up to 8 times, as in
`dcgan`. The adversary is one deep convolutional network on x, to every hidden layer of which a projection of z is added.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from avb_jax.networks.conv import Conv
from avb_jax.networks.dcgan import DEPTH, layer_sizes, normalise
from avb_jax.types import Array


class ResidualUnit(nn.Module):
    """h + scale * conv(act(conv(act(h)))), pre-activated (He et al. 2016); the learned scale starts at 0.1."""

    kernel_size: int = 3
    activation: Callable[[Array], Array] = nn.leaky_relu
    batch_norm: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, h: Array, shift: Array | None = None, *, train: bool = False) -> Array:
        features = h.shape[-1]
        r = self.activation(normalise(h, self.batch_norm, self.axis_name, train))
        r = Conv(features, self.kernel_size, use_bias=not self.batch_norm)(r)
        r = normalise(r, self.batch_norm, self.axis_name, train)
        if shift is not None:
            r = r + nn.Dense(features, use_bias=False, name="shift")(shift)[:, None, None]
        scale = self.param("scale", nn.initializers.constant(0.1), ())
        return h + scale * Conv(features, self.kernel_size)(self.activation(r))


class ResNet(nn.Module):
    """Trunk of the encoder: (x [B, H, W] or [B, H, W, C] in [0, 1], noise [B, N] or None) -> features [B, F].

    The noise enters every level through a learned projection of its own, in the level's first unit.
    """

    channels: int = 64
    kernel_size: int = 3
    units: int = 3  # per level
    activation: Callable[[Array], Array] = nn.leaky_relu
    batch_norm: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None, *, train: bool = False) -> Array:
        h = 2.0 * (x if x.ndim == 4 else x[..., None]) - 1.0
        sizes = layer_sizes(*h.shape[1:3])
        for i in range(DEPTH):
            h = Conv(self.channels * 2**i, self.kernel_size, 1 if sizes[i + 1] == sizes[i] else 2)(h)
            for unit in range(self.units):
                residual = ResidualUnit(self.kernel_size, self.activation, self.batch_norm, self.axis_name)
                h = residual(h, noise if unit == 0 else None, train=train)
        h = self.activation(normalise(h, self.batch_norm, self.axis_name, train))
        return h.reshape(h.shape[0], -1)


class ResNetDecoder(nn.Module):
    """`ResNet` upside down: z [B, Z] -> the likelihood's parameters [B, *x_shape, parameters].

    A level's units run before its resolution is doubled, by depth-to-space of a convolution to four times the features.
    """

    x_shape: Sequence[int]  # (H, W) or (H, W, C)
    parameters: int = 1
    channels: int = 64
    kernel_size: int = 3
    units: int = 3
    activation: Callable[[Array], Array] = nn.leaky_relu
    batch_norm: bool = False  # the paper: it costs reconstruction quality in the decoder
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: Array, *, train: bool = False) -> Array:
        colours = self.x_shape[2] if len(self.x_shape) == 3 else 1
        sizes = layer_sizes(*self.x_shape[:2])[::-1]
        (height, width), features = sizes[0], self.channels * 2 ** (DEPTH - 1)
        h = nn.Dense(height * width * features)(z).reshape(-1, height, width, features)
        for i, (height, width) in enumerate(sizes[1:]):
            for _ in range(self.units):
                h = ResidualUnit(self.kernel_size, self.activation, self.batch_norm, self.axis_name)(h, train=train)
            h = self.activation(normalise(h, self.batch_norm, self.axis_name, train))
            last = i == DEPTH - 1
            features = colours * self.parameters if last else features // 2
            if (height, width) == h.shape[1:3]:
                h = Conv(features, self.kernel_size)(h)
            else:
                h = _depth_to_space(Conv(4 * features, self.kernel_size)(h))[:, :height, :width]
        return h.reshape(-1, *self.x_shape, self.parameters)


class ConvAdversary(nn.Module):
    """T(x, z) by one deep convolutional network on x, with z added to every hidden layer through a learned projection.

    Maps x [B, ...] and z [B, Z] to T [B], which starts at 0.
    """

    channels: int = 64
    kernel_size: int = 5
    z_widths: Sequence[int] = (512,)
    activation: Callable[[Array], Array] = nn.leaky_relu
    batch_norm: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, z: Array, *, train: bool = False) -> Array:
        h = 2.0 * (x if x.ndim == 4 else x[..., None]) - 1.0
        sizes = layer_sizes(*h.shape[1:3])
        for i in range(DEPTH):
            h = Conv(self.channels * 2**i, self.kernel_size, 1 if sizes[i + 1] == sizes[i] else 2)(h)
            h = normalise(h, self.batch_norm, self.axis_name, train)
            h = self.activation(h + nn.Dense(h.shape[-1], use_bias=False, name=f"z_{i}")(z)[:, None, None])
        h = h.reshape(h.shape[0], -1)
        for i, width in enumerate(self.z_widths):
            h = self.activation(nn.Dense(width, name=f"hidden_{i}")(h) + nn.Dense(width, name=f"z_hidden_{i}")(z))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="t")(h)[:, 0]


class GlobalScale(nn.Module):
    """A decoder of means [B, *x, 1] with one learned raw scale for all pixels as their second parameter: [B, *x, 2].

    The raw scale is `speed` times a param: Adam moves each param by about its rate, and this one has a long way to go.
    """

    decoder: nn.Module
    speed: float = 10.0

    @nn.compact
    def __call__(self, z: Array, *, train: bool = False) -> Array:
        mean = self.decoder(z, train=train)
        raw = self.speed * self.param("raw_scale", nn.initializers.constant(0.1), ())
        return jnp.concatenate([mean, jnp.broadcast_to(raw, mean.shape)], axis=-1)


def _depth_to_space(h: Array) -> Array:
    b, height, width, c = h.shape
    h = h.reshape(b, height, width, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(b, 2 * height, 2 * width, c // 4)
