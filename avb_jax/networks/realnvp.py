"""Real NVP of images (Dinh, Sohl-Dickstein & Bengio 2016): an invertible network, whose density is exact.

A logit, then at each scale three couplings by checkerboards, two by two pixels put into channels, three couplings by channels,
and half of the channels set aside as they are; the last scale, and one of odd size, has four by checkerboards and ends. A
coupling scales and shifts one half by functions of the other; it starts as the identity.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from avb_jax.networks.conv import Conv
from avb_jax.types import Array

MARGIN = 0.05  # of the logit of MARGIN + (1 - 2 MARGIN) x, which is finite at 0 and 1


class RealNVP(nn.Module):
    """x [B, H, W] or [B, H, W, C] in [0, 1] -> (u [B, D], log |det du/dx| [B] in nats); `inverse` goes back."""

    x_shape: Sequence[int]
    channels: int = 32  # of the networks in the couplings
    layers: int = 2  # hidden ones of each
    scales: int = 2

    def setup(self):
        size = (*self.x_shape[:2], self.x_shape[2] if len(self.x_shape) == 3 else 1)
        steps, couplings = [], []

        def couple(mask: np.ndarray, count: int) -> None:
            for i in range(count):
                steps.append(("couple", mask if i % 2 == 0 else 1.0 - mask, len(couplings)))
                couplings.append(_Coupling(self.channels, self.layers))

        for scale in range(self.scales):
            height, width, colours = size
            checkerboard = np.float32(np.add.outer(np.arange(height), np.arange(width)) % 2)[..., None]
            last = scale == self.scales - 1 or height % 2 or width % 2
            couple(checkerboard, 4 if last else 3)
            if last:
                break
            steps.append(("squeeze", None, None))
            size = (height // 2, width // 2, 4 * colours)
            couple(np.float32(np.arange(4 * colours) % 2)[None, None], 3)
            steps.append(("aside", None, None))
            size = (*size[:2], size[2] // 2)
        self.steps, self.last, self.couplings = tuple(steps), size, couplings

    def __call__(self, x: Array, features: Array | None = None) -> tuple[Array, Array]:
        del features
        squeezed = MARGIN + (1.0 - 2.0 * MARGIN) * x.reshape(*x.shape[:3], -1)
        h = jnp.log(squeezed) - jnp.log1p(-squeezed)
        log_det = jnp.sum(math.log(1.0 - 2.0 * MARGIN) - jnp.log(squeezed) - jnp.log1p(-squeezed), axis=(1, 2, 3))
        done = []
        for kind, mask, which in self.steps:
            if kind == "squeeze":
                h = _squeeze(h)
            elif kind == "aside":
                aside, h = jnp.split(h, 2, axis=-1)
                done.append(aside.reshape(len(x), -1))
            else:
                log_scale, shift = self.couplings[which](mask * h, mask)
                h = h * jnp.exp(log_scale) + shift
                log_det += jnp.sum(log_scale, axis=(1, 2, 3))
        return jnp.concatenate([*done, h.reshape(len(x), -1)], axis=-1), log_det

    def inverse(self, u: Array) -> Array:
        """The x [B, *x] of u [B, D]."""
        sizes, size = [], int(np.prod(self.x_shape))
        for kind, *_ in self.steps:
            if kind == "aside":
                size //= 2
                sizes.append(size)
        *aside, h = jnp.split(u, np.cumsum(sizes), axis=-1) if sizes else [u]
        h = h.reshape(-1, *self.last)
        for kind, mask, which in reversed(self.steps):
            if kind == "squeeze":
                h = _unsqueeze(h)
            elif kind == "aside":
                h = jnp.concatenate([aside.pop().reshape(h.shape), h], axis=-1)
            else:
                log_scale, shift = self.couplings[which](mask * h, mask)
                h = (h - shift) * jnp.exp(-log_scale)
        x = (nn.sigmoid(h) - MARGIN) / (1.0 - 2.0 * MARGIN)
        return jnp.clip(x, 0.0, 1.0).reshape(-1, *self.x_shape)


class _Coupling(nn.Module):
    """The log scale and the shift of what the mask leaves out, from what it keeps."""

    channels: int
    layers: int

    @nn.compact
    def __call__(self, kept: Array, mask: np.ndarray) -> tuple[Array, Array]:
        colours = kept.shape[-1]
        mask = jnp.broadcast_to(mask, kept.shape)
        h = nn.relu(Conv(self.channels, 3)(jnp.concatenate([kept, mask], axis=-1)))
        for _ in range(self.layers - 1):
            h = h + nn.relu(Conv(self.channels, 3)(h))
        out = nn.Dense(2 * colours, kernel_init=nn.initializers.zeros)(h)
        raw, shift = jnp.split(out, 2, axis=-1)
        scale = self.param("scale", nn.initializers.ones, (colours,))
        return (1.0 - mask) * scale * jnp.tanh(raw), (1.0 - mask) * shift


def _squeeze(h: Array) -> Array:
    b, height, width, c = h.shape
    h = h.reshape(b, height // 2, 2, width // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(b, height // 2, width // 2, 4 * c)


def _unsqueeze(h: Array) -> Array:
    b, height, width, c = h.shape
    h = h.reshape(b, height, width, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(b, 2 * height, 2 * width, c // 4)
