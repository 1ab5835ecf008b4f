"""From an experiment's config to the players' networks and the likelihood, in the families of section 4 of the paper.

The fields are explained in `experiments/configs/fields.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import ml_collections

from avb_jax import distributions, models, networks
from avb_jax.network import Network
from avb_jax.training import blocks
from avb_jax.types import UserError

ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu, "elu": nn.elu, "silu": nn.silu, "tanh": nn.tanh}
PRECISIONS = ("float32", "bfloat16")
ADVERSARIES = ("inner_product", "joint", "mixture")
# The likelihood, and how many numbers per pixel it takes of the decoder.
LIKELIHOODS = {
    "bernoulli": lambda config: (distributions.bernoulli, 1),
    "gaussian": lambda config: (distributions.gaussian(config.likelihood_std), 1 if config.likelihood_std else 2),
    "logistic": lambda config: (distributions.discretized_logistic(), 2),
}
# Whether pixels are independent given z, or depend on those before them, by which network.
PIXELS = {"independent": None, "pixelcnn": networks.GatedPixelCNN, "row_lstm": networks.RowLSTM}
SCALES = {"pixel": False, "global": True}  # whether all pixels share one learned scale


class Parts(NamedTuple):
    """What the constructors of methods choose from."""

    trunk: nn.Module  # of the encoder
    decoder: nn.Module | Network
    pairs: nn.Module | Network  # an adversary of (x, z)
    latents: nn.Module | Network  # of z
    images: nn.Module | Network  # of x
    likelihood: Callable
    x_shape: tuple[int, ...]


def parts_of(config: ml_collections.ConfigDict, name: str, x_shape: tuple[int, ...]) -> Parts:
    """The parts of a method of that name, for examples of this shape; every method gets the same decoder.

    Raises:
      UserError: a field's value is not one of those that it may have, or the config lacks fields of its family.
    """
    likelihood, parameters = pick("likelihood", config.likelihood, LIKELIHOODS)(config)
    shared = pick("likelihood_scale", config.likelihood_scale, SCALES) and parameters == 2
    kind = pick("pixels.kind", config.pixels.kind, tuple(PIXELS))
    if name in ("bigan", "gan", "vaegan"):
        likelihood, parameters, shared, kind = distributions.deterministic, 1, False, "independent"
    if kind != "independent" and shared:
        raise UserError(f"likelihood_scale='global': is for independent pixels, not for pixels.kind={kind!r}; use 'pixel'")
    family = pick("network.family", config.network.family, FAMILIES)
    lacking = [field for field in FAMILY_FIELDS[config.network.family] if field not in config.network]
    if lacking:
        raise UserError(f"network.family={config.network.family!r}: this config has no network.{lacking[0]}; use one that has")
    numbers = config.pixels.features if kind != "independent" else 1 if shared else parameters
    trunk, decoder, pairs, latents, images = family(config, x_shape, numbers)
    decoder = networks.GlobalScale(decoder) if shared else decoder
    if kind != "independent" and config.precision == "bfloat16":
        raise UserError(f"precision='bfloat16': pixels.kind={kind!r} computes in float32; use precision='float32'")
    if kind != "independent":
        model = pixels_of(config, kind, x_shape, parameters)
        decoder, likelihood = networks.ModelDecoder(decoder, model), models.autoregressive(model, likelihood)
    return Parts(trunk, *(computing(config, network) for network in (decoder, pairs, latents, images)), likelihood, x_shape)


def pixels_of(config, kind: str, x_shape: tuple[int, ...], parameters: int) -> nn.Module:
    """A network of the pixels above and to the left, as `config.pixels` has it."""
    options = config.pixels
    return PIXELS[kind](x_shape, parameters, options.channels, options.layers, options.kernel_size)


def computing(config, network: nn.Module) -> nn.Module | Network:
    """A player's network in the precision, and with the memory, that the config says."""
    network = networks.in_bfloat16(network) if pick("precision", config.precision, PRECISIONS) == "bfloat16" else network
    return networks.rematerialized(network) if config.rematerialize else network


def _pairs(config, x_net: nn.Module, z_widths: tuple[int, ...]) -> nn.Module:
    """An adversary of (x, z)."""
    activation, features = activation_of(config), config.network.adversary_features
    z_net = networks.MLP(z_widths, activation)
    kind, components = pick("network.adversary", config.network.adversary, ADVERSARIES), config.network.adversary_components
    if components < (kind == "mixture"):
        raise UserError(f"network.adversary_components={components}: must be at least {int(kind == 'mixture')} with {kind!r}")
    if kind == "mixture":
        return networks.MixtureAdversary(x_net, components)
    if kind == "joint":
        options = {"components": components, "activation": activation}
        return networks.JointAdversary(x_net, z_net, features, (features, features), **options)
    near_q = config.contrast.kind != "prior"
    return networks.InnerProductAdversary(x_net, z_net, features, starts_at_zero=near_q)


def _mlp(config, x_shape, parameters):
    activation, widths, rank = activation_of(config), tuple(config.network.widths), len(x_shape)

    def trunk() -> networks.MLP:
        return networks.MLP(widths, activation, rank)

    encoder = networks.MLP((*widths, *config.network.encoder_widths), activation, rank)
    pairs = _pairs(config, trunk(), widths)
    decoder = networks.MLPDecoder(x_shape, parameters, widths, activation)
    latents = networks.LatentAdversary(widths, activation)
    return encoder, decoder, pairs, latents, networks.ImageAdversary(trunk())


def _conv(config, x_shape, parameters):
    options, activation, axis = config.network, activation_of(config), _axis(config)

    def trunk() -> networks.ConvNet:
        return networks.ConvNet(options.channels, options.kernel_size, activation, options.batch_norm, axis_name=axis)

    z_widths = tuple(options.z_widths)
    decoder = networks.ConvDecoder(
        x_shape,
        parameters,
        options.channels,
        options.kernel_size,
        activation,
        options.decoder_batch_norm,
        axis_name=axis,
    )
    pairs, latents = _pairs(config, trunk(), z_widths), networks.LatentAdversary(z_widths, activation)
    return trunk(), decoder, pairs, latents, networks.ImageAdversary(trunk())


def _resnet(config, x_shape, parameters):
    options, activation, axis = config.network, activation_of(config), _axis(config)
    adversary, widths = (options.adversary_channels, options.adversary_kernel_size), tuple(options.adversary_widths)
    encoder = networks.ResNet(
        options.channels, options.kernel_size, options.units, activation, options.batch_norm, axis_name=axis
    )
    decoder = networks.ResNetDecoder(
        x_shape,
        parameters,
        options.channels,
        options.kernel_size,
        options.units,
        activation,
        options.decoder_batch_norm,
        axis_name=axis,
    )
    pairs = networks.ConvAdversary(*adversary, widths, activation, options.batch_norm, axis_name=axis)
    images = networks.ImageAdversary(networks.ConvNet(*adversary, activation, options.batch_norm, axis_name=axis))
    return encoder, decoder, pairs, networks.LatentAdversary(widths, activation), images


FAMILIES = {"mlp": _mlp, "conv": _conv, "resnet": _resnet}
FAMILY_FIELDS = {
    "mlp": ("widths", "encoder_widths", "adversary", "adversary_components", "adversary_features"),
    "conv": ("channels", "kernel_size", "z_widths", "adversary", "adversary_components", "adversary_features"),
    "resnet": ("units", "adversary_channels", "adversary_kernel_size", "adversary_widths"),
}


def _axis(config) -> str | None:
    """Under pmap, batch statistics are over the global batch."""
    return blocks.AXIS if config.parallel == "pmap" else None


def activation_of(config) -> Callable:
    """The config's activation function."""
    return pick("network.activation", config.network.activation, ACTIVATIONS)


def pick(field: str, name: str, choices):
    """What a name stands for among choices, or the name itself where these are no dictionary.

    Raises:
      UserError: it is none of them.
    """
    if name not in choices:
        raise UserError(f"{field}={name!r}: must be one of {', '.join(choices)}")
    return choices[name] if isinstance(choices, dict) else name
