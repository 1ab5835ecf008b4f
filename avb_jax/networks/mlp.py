"""Fully connected networks (section 4, the synthetic example)."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from avb_jax.types import Array


class MLP(nn.Module):
    """Fully connected hidden layers; noise, where given, is concatenated to the input.

    Maps (x [..., *shape], noise [B, N] or None) to features [..., widths[-1]]; x is flattened over `input_rank` axes.
    """

    widths: Sequence[int] = (512, 512)
    activation: Callable[[Array], Array] = nn.relu
    input_rank: int = 1

    @nn.compact
    def __call__(self, x: Array, noise: Array | None = None, *, train: bool = False) -> Array:
        del train  # no batch statistics
        h = x.reshape(*x.shape[: x.ndim - self.input_rank], -1)
        if noise is not None:
            h = jnp.concatenate([h, noise], axis=-1)
        for width in self.widths:
            h = self.activation(nn.Dense(width, kernel_init=nn.initializers.he_normal())(h))
        return h


class MLPDecoder(nn.Module):
    """z [B, Z] -> hidden layers -> the likelihood's parameters [B, *x_shape, parameters]."""

    x_shape: Sequence[int]
    parameters: int = 1
    widths: Sequence[int] = (512, 512)
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, z: Array, *, train: bool = False) -> Array:
        del train
        h = MLP(self.widths, self.activation)(z)
        out = nn.Dense(math.prod(self.x_shape) * self.parameters)(h)
        return out.reshape(*z.shape[:-1], *self.x_shape, self.parameters)
