"""Convolutions that pick their formulation by backend and shape, with the same parameters and the same result in each.

TPUs want `lax.conv`, and so do GPUs for large images; for small ones matrix products take half the time there. XLA's CPU
backend runs `lax.conv` at a few percent of the machine's speed inside a `lax.scan`, which is where training happens. There
oneDNN does it where the extra `avb_jax[onednn]` is installed (`networks.onednn`); else, and for the narrowest layers, a
convolution is strided slices next to each other and one matrix product, in one of two ways:

  rows     slices of whole rows, times a matrix [k W C, W' F] that has the kernel once for each output column: k slices in the
           place of k * k, and W / k times the products, the rest of them with zeros. For small layers, whose time is copies.
  patches  slices for each of the k * k taps, and a matrix [k k C, F]: the fewest products. Of large images a few examples at a
           time, so that their patches stay in the processor's cache; the backward pass makes them again.

A transposed convolution is a small convolution to s * s times the channels, whose output pixels are then put where they belong.
`benchmarks/conv.py` times all of them next to PyTorch.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from avb_jax.networks import onednn
from avb_jax.types import Array, UserError

FORMULATIONS = ("auto", "lax", "onednn", "rows", "patches")
NARROW = 40  # of F (W - k) / (k - s): up to here, products with zeros cost less than copies do
WHOLE, CACHE = 12_000_000, 2_500_000  # bytes of patches up to which they are made at once, and else at a time
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: Array, kernel: Array, stride: int = 1, formulation: str = "auto", pads: Sequence | None = None) -> Array:
    """Convolution [B, H, W, C] -> [B, H', W', F] with a kernel [k, k', C, F].

    With SAME padding, so that H' = ceil(H / stride), or with `pads`, (low, high) of rows and of columns.
    """
    if pads is None:
        pads = [_same_padding(n, k, stride) for n, k in zip(x.shape[1:3], kernel.shape[:2], strict=True)]
    outputs = [(n + sum(pad) - k) // stride + 1 for n, pad, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)]
    size = 4 * len(x) * math.prod(outputs) * math.prod(kernel.shape[:3])
    chosen = formulation_of(formulation, x.dtype, x.shape[2], kernel.shape[1], stride, kernel.shape[3], size)
    if chosen == "onednn":
        return onednn.forward(x, kernel, stride, pads)
    if chosen == "lax":
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=_LAYOUT)
    if chosen == "patches":
        return _patches(x, kernel, stride, pads)
    k = kernel.shape[1]
    width = (x.shape[2] + sum(pads[1]) - k) // stride + 1
    w, tap, out = np.ogrid[: x.shape[2], :k, :width]
    columns = np.float32(w == out * stride + tap - pads[1][0])  # [W, k, W']: whether input column w is that tap of the output's
    matrix = jnp.einsum("wko,hkcf->hwcof", columns, kernel)
    return _rows(x, matrix.reshape(len(kernel), -1, width * kernel.shape[3]), stride, pads[0], (1, width, kernel.shape[3]))


def conv_transpose(x: Array, kernel: Array, stride: int = 2, formulation: str = "auto") -> Array:
    """Transposed convolution with SAME padding, as `lax.conv_transpose`: [B, H, W, C] -> [B, H s, W s, F]."""
    k, s, (b, h, w, _) = kernel.shape[0], stride, x.shape
    # Output pixel s p + r sees input pixel p + d through tap s d - r + pad.
    pad = k - 1 if s > k - 1 else (k + s - 1) // 2
    low, high = -(pad // s), (k - 1 + s - 1 - pad) // s
    size = 4 * math.prod(x.shape) * (high - low + 1) ** 2
    chosen = formulation_of(formulation, x.dtype, w, high - low + 1, 1, s * s * kernel.shape[3], size)
    if chosen == "onednn":
        flipped, pads = kernel[::-1, ::-1].swapaxes(2, 3), [(k - 1 - pad, pad + 1 - s)] * 2
        return onednn.transposed(x, flipped, s, pads, (h * s, w * s))
    if chosen == "lax":
        return lax.conv_transpose(x, kernel, (s, s), "SAME", dimension_numbers=_LAYOUT)
    offset, tap, phase = np.ogrid[low : high + 1, :k, :s]
    taps = np.float32(tap == s * offset - phase + pad)  # [D, k, s]: whether phase r sees offset d through that tap
    c, f = kernel.shape[2:]
    if chosen == "patches":
        phases = jnp.einsum("dir,ejq,ijcf->decrqf", taps, taps, kernel).reshape(len(taps), len(taps), c, s * s * f)
        y = _patches(x, phases, 1, [(-low, high)] * 2)
        return y.reshape(b, h, w, s, s, f).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * s, w * s, f)
    column, tap, out = np.ogrid[:w, :k, : w * s]
    columns = np.float32(tap == s * column - out + pad)  # [W, k, W s]
    matrix = jnp.einsum("dir,wjo,ijcf->dwcrof", taps, columns, kernel)
    return _rows(x, matrix.reshape(len(taps), w * c, s * w * s * f), 1, (-low, high), (s, w * s, f))


def _rows(x: Array, matrix: Array, stride: int, pads: tuple[int, int], shape: tuple[int, int, int]) -> Array:
    """Rows of x [B, H, W, C], each with its neighbours, times a matrix [k, W C, N]; `shape` is what N is: rows, W', F."""
    b, h, w, c = x.shape
    rows = jnp.pad(x.reshape(b, h, w * c), ((0, 0), pads, (0, 0)))
    height = (rows.shape[1] - len(matrix)) // stride + 1
    taps = [rows[:, i : i + (height - 1) * stride + 1 : stride] for i in range(len(matrix))]
    y = jnp.concatenate(taps, axis=-1) @ matrix.reshape(len(matrix) * w * c, -1)
    return y.reshape(b, height * shape[0], *shape[1:])


def _patches(x: Array, kernel: Array, stride: int, pads: list[tuple[int, int]]) -> Array:
    kh, kw, c, f = kernel.shape
    height, width = ((n + sum(pad) - k) // stride + 1 for n, pad, k in zip(x.shape[1:3], pads, (kh, kw), strict=True))

    def few(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        taps = [
            x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            for i in range(kh)
            for j in range(kw)
        ]
        return jnp.concatenate(taps, axis=-1) @ kernel.reshape(kh * kw * c, f)

    size = 4 * height * width * kh * kw * c  # bytes of an example's patches
    count = math.gcd(len(x), 2 ** int(math.log2(max(1, CACHE // size))))
    if (
        len(x) * size <= WHOLE or count == len(x) or jax.device_count() > 1
    ):  # a batch split between devices cannot be taken apart once more
        return few(x)
    parts = x.reshape(-1, count, *x.shape[1:])
    return lax.scan(lambda _, part: (None, jax.checkpoint(few)(part)), None, parts)[1].reshape(len(x), height, width, f)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def formulation_of(formulation: str, dtype, width: int, kernel: int, stride: int, features: int, size: int) -> str:
    """What 'auto' stands for: by measurement, see `benchmarks/conv.py`; `size` is the bytes of all patches in float32.

    Raises:
      UserError: no such formulation, or oneDNN's where it cannot be had.
    """
    if formulation not in FORMULATIONS:
        raise UserError(f"formulation={formulation!r}: must be one of {', '.join(FORMULATIONS)}")
    backend = jax.default_backend()
    if formulation == "onednn" and not (backend == "cpu" and dtype in onednn.dtypes()):
        raise UserError(
            f"formulation='onednn', {dtype}: needs a CPU, float32 (or bfloat16, on a processor that has it), a C++ compiler "
            "and pip install 'avb_jax[onednn]'"
        )
    if formulation != "auto":
        return formulation
    if backend not in ("cpu", "gpu"):
        return "lax"
    if features * (width - kernel) <= NARROW * (kernel - stride):
        return "rows"
    if backend == "gpu":
        return "patches" if size <= WHOLE else "lax"
    one_device = jax.device_count() == 1  # a call of oneDNN cannot be split between devices
    return "onednn" if one_device and dtype in onednn.dtypes() else "patches"


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
