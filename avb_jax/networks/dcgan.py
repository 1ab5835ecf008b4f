"""The DC-GAN family (Radford et al. 2015; section 4) for images of any size: five layers, four of them hidden.

`channels` counts the first hidden layer's features; deeper layers double them up to 8 times. A layer halves the
resolution as long as its shorter side stays at least 2 pixels: 64 -> 32, 16, 8, 4; 28 -> 14, 7, 4, 2; 8 -> 4, 2, 2, 2.
"""

from collections.abc import Callable, Sequence

from flax import linen as nn

from avb_jax.networks.conv import Conv, ConvTranspose
from avb_jax.types import Array

DEPTH = 4
SMALLEST = 2


def layer_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Resolutions from the image's own to the deepest hidden layer's, DEPTH + 1 of them."""
    sizes = [(height, width)]
    for _ in range(DEPTH):
        half = tuple(-(-n // 2) for n in sizes[-1])
        sizes.append(half if min(half) >= SMALLEST else sizes[-1])
    return sizes


def normalise(h: Array, batch_norm: bool, axis_name: str | None, train: bool) -> Array:
    """Batch normalisation where it is wanted."""
    if not batch_norm:
        return h
    return nn.BatchNorm(use_running_average=not train, momentum=0.99, axis_name=axis_name)(h)


class ConvNet(nn.Module):
    """Strided convolutions from an image to features: the trunk of encoder and adversary.

    Maps (x [B, H, W] or [B, H, W, C] in [0, 1], noise [B, N] or None) to features [B, F]. The noise enters every hidden
    layer through a learned projection of its own, added after batch normalisation so that it is not normalised away.
    """

    channels: int = 64
    kernel_size: int = 5
    activation: Callable[[Array], Array] = nn.leaky_relu
    batch_norm: bool = True
    axis_name: str | None = None  # of a map over devices: batch statistics over all of them

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None, *, train: bool = False) -> Array:
        h = 2.0 * (x if x.ndim == 4 else x[..., None]) - 1.0
        sizes = layer_sizes(*h.shape[1:3])
        for i in range(DEPTH):
            stride = 1 if sizes[i + 1] == sizes[i] else 2
            h = Conv(self.channels * 2**i, self.kernel_size, stride, use_bias=not self.batch_norm)(h)
            h = normalise(h, self.batch_norm, self.axis_name, train)
            if noise is not None:
                h = h + nn.Dense(h.shape[-1], use_bias=False, name=f"noise_{i}")(noise)[:, None, None]
            h = self.activation(h)
        return h.reshape(h.shape[0], -1)


class ConvDecoder(nn.Module):
    """`ConvNet` upside down: z [B, Z] -> the likelihood's parameters [B, *x_shape, parameters]."""

    x_shape: Sequence[int]  # (H, W) or (H, W, C)
    parameters: int = 1
    channels: int = 64
    kernel_size: int = 5
    activation: Callable[[Array], Array] = nn.relu
    batch_norm: bool = False  # the paper: it costs reconstruction quality in the decoder
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: Array, *, train: bool = False) -> Array:
        colours = self.x_shape[2] if len(self.x_shape) == 3 else 1
        sizes = layer_sizes(*self.x_shape[:2])[::-1]
        (height, width), deepest = sizes[0], self.channels * 2 ** (DEPTH - 1)
        h = nn.Dense(height * width * deepest)(z).reshape(-1, height, width, deepest)
        h = self.activation(normalise(h, self.batch_norm, self.axis_name, train))
        for i, (height, width) in enumerate(sizes[1:]):
            last = i == DEPTH - 1
            features = colours * self.parameters if last else deepest // 2 ** (i + 1)
            layer = Conv if (height, width) == h.shape[1:3] else ConvTranspose
            h = layer(features, self.kernel_size)(h)[:, :height, :width]
            if not last:
                h = self.activation(normalise(h, self.batch_norm, self.axis_name, train))
        return h.reshape(-1, *self.x_shape, self.parameters)
