"""Ready-made players (section 4 of the paper). Flax only: nothing here knows about losses, devices or data.

An encoder is put together from a trunk (`MLP`, `ConvNet`, `ResNet`), which turns an image, and perhaps noise, into features,
and a head, which makes a posterior sample of them; `InnerProductAdversary` takes two trunks.
"""

from avb_jax.network import from_equinox, from_linen, from_nnx, in_bfloat16, rematerialized
from avb_jax.networks.adversaries import (
    ImageAdversary,
    InnerProductAdversary,
    JointAdversary,
    LatentAdversary,
    MixtureAdversary,
)
from avb_jax.networks.autoregressive import GatedPixelCNN, RowLSTM
from avb_jax.networks.conv import Conv, ConvTranspose
from avb_jax.networks.dcgan import ConvDecoder, ConvNet
from avb_jax.networks.encoders import (
    BlackBoxEncoder,
    GaussianEncoder,
    MomentEncoder,
    ReverseModel,
    Sampler,
    SemiImplicitEncoder,
)
from avb_jax.networks.learned_priors import FlowPrior, VampPrior
from avb_jax.networks.mlp import MLP, MLPDecoder
from avb_jax.networks.model_decoder import ModelDecoder
from avb_jax.networks.posteriors import (
    AuxiliaryEncoder,
    FullCovarianceEncoder,
    IAFEncoder,
    PlanarFlowEncoder,
    RealNVPEncoder,
)
from avb_jax.networks.realnvp import RealNVP
from avb_jax.networks.resnet import ConvAdversary, GlobalScale, ResNet, ResNetDecoder

__all__ = [
    "MLP",
    "AuxiliaryEncoder",
    "BlackBoxEncoder",
    "Conv",
    "ConvAdversary",
    "ConvDecoder",
    "ConvNet",
    "ConvTranspose",
    "FlowPrior",
    "FullCovarianceEncoder",
    "GatedPixelCNN",
    "GaussianEncoder",
    "GlobalScale",
    "IAFEncoder",
    "ImageAdversary",
    "InnerProductAdversary",
    "JointAdversary",
    "LatentAdversary",
    "MLPDecoder",
    "MixtureAdversary",
    "ModelDecoder",
    "MomentEncoder",
    "PlanarFlowEncoder",
    "RealNVP",
    "RealNVPEncoder",
    "ResNet",
    "ResNetDecoder",
    "ReverseModel",
    "RowLSTM",
    "Sampler",
    "SemiImplicitEncoder",
    "VampPrior",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "in_bfloat16",
    "rematerialized",
]
