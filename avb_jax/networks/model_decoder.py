"""A decoder whose p(x|z) is itself a network of x: autoregressive, or invertible."""

import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from avb_jax.types import Array


class Conditioned(NamedTuple):
    """What a `ModelDecoder` returns: all that p(x|z) is made of."""

    features: Array  # [B, H, W, F] of z; F = 0 without latents
    variables: Any  # of the network of x


class ModelDecoder(nn.Module):
    """z [B, Z] -> a `Conditioned`, of which `models.autoregressive` or `models.flow` makes p(x|z).

    Of no latents, Z = 0, the model of x stands by itself (`avb_jax.explicit`), and the trunk is not called.
    """

    trunk: nn.Module | None  # z [B, Z] -> features [B, H, W, F], or [B, H, W, C, F]
    model: nn.Module  # such as `GatedPixelCNN`, `RowLSTM`, `RealNVP`

    @nn.compact
    def __call__(self, z: Array, *, train: bool = False) -> Conditioned:
        x_shape = tuple(self.model.x_shape)
        features = jnp.zeros((len(z), *x_shape[:2], 0))
        if z.shape[-1]:
            takes_train = "train" in inspect.signature(type(self.trunk).__call__).parameters
            features = self.trunk(z, **({"train": train} if takes_train else {}))
            features = features.reshape(*features.shape[:3], -1)
        if self.is_initializing():
            self.model(jnp.zeros((len(z), *x_shape)), features)
        return Conditioned(features, {"params": self.model.variables["params"]})
