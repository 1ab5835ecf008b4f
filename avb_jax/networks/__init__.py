"""Ready-made players (section 4 of the paper). Flax only: nothing here knows about losses, devices or data.

An encoder or adversary is put together from a trunk (`MLP`, `ConvNet`), which turns an image, and perhaps noise, into
features, and a head, which makes a posterior sample or T of them.
"""

from avb_jax.networks.adversaries import InnerProductAdversary
from avb_jax.networks.conv import Conv, ConvTranspose
from avb_jax.networks.dcgan import ConvDecoder, ConvNet
from avb_jax.networks.encoders import BlackBoxEncoder, GaussianEncoder
from avb_jax.networks.mlp import MLP, MLPDecoder

__all__ = [
    "MLP", "BlackBoxEncoder", "Conv", "ConvDecoder", "ConvNet", "ConvTranspose", "GaussianEncoder",
    "InnerProductAdversary", "MLPDecoder",
]  # fmt: skip
