"""Convolutions that pick their formulation by backend, with the same parameters and the same result in each.

GPUs and TPUs want `lax.conv`. XLA's CPU backend runs it at a few percent of the machine's speed inside a `lax.scan`,
which is where training happens, and does not recover it for transposed convolutions anywhere; there, a convolution
is k * k strided slices side by side and one matrix product, and a transposed one is a small convolution to s * s
times the channels followed by depth-to-space. `benchmarks/conv.py` times them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from avb_jax.types import Array, UserError

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: Array, kernel: Array, stride: int = 1, formulation: str = "auto") -> Array:
    """Convolution with SAME padding: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), F]; kernel [k, k, C, F]."""
    pads = [_same_padding(n, k, stride) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
    return _conv(x, kernel, stride, pads, formulation)


def conv_transpose(x: Array, kernel: Array, stride: int = 2, formulation: str = "auto") -> Array:
    """Transposed convolution with SAME padding, as `lax.conv_transpose`: [B, H, W, C] -> [B, H s, W s, F]."""
    if _uses_lax(formulation):
        return lax.conv_transpose(x, kernel, (stride, stride), "SAME", dimension_numbers=_LAYOUT)
    # Output pixel s p + r sees input pixel p + d through tap s d - r + pad: one small kernel per phase r.
    k, s = kernel.shape[0], stride
    pad = k - 1 if s > k - 1 else (k + s - 1) // 2
    low, high = -(pad // s), (k - 1 + s - 1 - pad) // s
    taps = s * np.arange(low, high + 1)[:, None] - np.arange(s) + pad  # [D, s]
    taps = np.where((taps >= 0) & (taps < k), taps, k)  # k points at the zeros padded below
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    phases = padded[taps[:, :, None, None], taps[None, None]]  # [D, s, D, s, C, F]
    d, c, f = taps.shape[0], *kernel.shape[2:]
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(d, d, c, s * s * f)
    y = _conv(x, phases, 1, [(-low, high)] * 2, "matmul")
    b, h, w, _ = y.shape
    return y.reshape(b, h, w, s, s, f).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * s, w * s, f)


def _conv(x: Array, kernel: Array, stride: int, pads: list[tuple[int, int]], formulation: str) -> Array:
    if _uses_lax(formulation):
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=_LAYOUT)
    kh, kw, c, f = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    out_h, out_w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    patches = [
        x[:, i : i + (out_h - 1) * stride + 1 : stride, j : j + (out_w - 1) * stride + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(kh * kw * c, f)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _uses_lax(formulation: str) -> bool:
    if formulation not in ("auto", "lax", "matmul"):
        raise UserError(f"formulation={formulation!r}: must be 'auto', 'lax' or 'matmul'")
    return formulation == "lax" or (formulation == "auto" and jax.default_backend() != "cpu")


class Conv(nn.Module):
    """A convolution layer with SAME padding and, unless `use_bias` is False, a bias: [B, H, W, C] -> [B, H', W', features]."""

    features: int
    kernel_size: int = 5
    stride: int = 1
    use_bias: bool = True
    formulation: str = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        y = self.convolve(x, kernel)
        return y + self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else y

    def convolve(self, x: Array, kernel: Array) -> Array:
        return conv(x, kernel, self.stride, self.formulation)


class ConvTranspose(Conv):
    """A transposed convolution layer: `stride` times the resolution."""

    stride: int = 2

    def convolve(self, x: Array, kernel: Array) -> Array:
        return conv_transpose(x, kernel, self.stride, self.formulation)
