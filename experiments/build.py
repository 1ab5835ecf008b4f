"""From a config to what it describes: data set, model, optimisers."""

from typing import NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax

from avb_jax import Model, Players, StandardNormal, UserError, data, networks, players
from avb_jax.data import Dataset
from avb_jax.data.photos import Photos
from avb_jax.distributions import Bernoulli, Deterministic, DiscretizedLogistic, Gaussian
from avb_jax.methods import METHODS

ACTIVATIONS = {"relu": nn.relu, "leaky_relu": nn.leaky_relu, "elu": nn.elu, "silu": nn.silu, "tanh": nn.tanh}
SCHEDULES = ("constant", "cosine")


def methods(config: ml_collections.ConfigDict) -> dict:
    """The methods that `config.method` names (several with commas between), by name."""
    names = [name.strip() for name in config.method.split(",")]
    return {name: _pick("method", name, METHODS) for name in names}


def dataset(config: ml_collections.ConfigDict) -> Dataset:
    """The data set of `config.data`."""
    options = Photos(**{field: config.data[field] for field in Photos._fields if field in config.data})
    return data.load(config.data.name, config.data.dir, config.data.binarize, options)


def model(config: ml_collections.ConfigDict, method: str, x_shape: tuple[int, ...]) -> Model:
    """The players of a method, as its `PLAYERS` says, for examples of this shape; every method gets the same decoder."""
    kinds, latents = METHODS[method].PLAYERS, config.latent_dim
    _check(config)
    likelihood = _pick("likelihood", config.likelihood, LIKELIHOODS)(config)
    shared = _pick("likelihood_scale", config.likelihood_scale, SCALES) and likelihood.parameters == 2
    if kinds.decoder == "deterministic":
        likelihood, shared = Deterministic(), False
    family = _pick("network.family", config.network.family, FAMILIES)
    lacking = [field for field in FAMILY_FIELDS[config.network.family] if field not in config.network]
    if lacking:
        raise UserError(f"network.family={config.network.family!r}: this config has no network.{lacking[0]}; use one that has")
    nets = family(config, x_shape, 1 if shared else likelihood.parameters)
    encoder, noise_dim = ENCODERS[kinds.encoder](config, nets.trunk, latents)
    adaptive = kinds.encoder == "implicit" and config.contrast.kind == "adaptive"
    return Model(
        networks=Players(
            encoder, networks.GlobalScale(nets.decoder) if shared else nets.decoder,
            kinds.adversary and getattr(nets, kinds.adversary),
        ),
        prior=StandardNormal(latents),
        likelihood=likelihood,
        noise_dim=noise_dim,
        contrast="adaptive" if adaptive else "none",
        moment_draws=config.contrast.moment_draws,
        moment_gradients=config.contrast.moment_gradients,
        noise_draws=config.noise_draws,
        adversary_floor=config.adversary_floor,
        divergence=config.divergence,
        adversary_sees_x=kinds.adversary != "latents",
        feature_weight=config.feature_weight,
        beta=config.beta,
        beta_warmup=config.beta_warmup,
        adversary_steps=config.adversary_steps,
        ema_decay=config.ema_decay,
    )  # fmt: skip


def optimizers(config: ml_collections.ConfigDict) -> Players:
    """Adam for each player at its own rate, with the schedule and clipping of `config.optimizer`.

    The shape of a `networks.MomentEncoder`'s posterior takes `contrast.shape_rate` times the encoder's steps.
    """
    options, shape_rate = config.optimizer, config.contrast.shape_rate
    if not shape_rate > 0:
        raise UserError(f"contrast.shape_rate={shape_rate!r}: must be positive")
    if options.schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule={options.schedule!r}: must be one of {', '.join(SCHEDULES)}")

    def adam(player: str, updates_per_step: int) -> optax.GradientTransformation:
        rate, updates = options[f"{player}_rate"], config.steps * updates_per_step
        if not rate > 0:
            raise UserError(f"optimizer.{player}_rate={rate!r}: must be positive")
        schedule = optax.cosine_decay_schedule(rate, max(updates, 1)) if options.schedule == "cosine" else rate
        clip = optax.clip_by_global_norm(options.clip) if options.clip else optax.identity()
        return optax.chain(clip, optax.adam(schedule, b1=options.b1, b2=options.b2))

    def of_shape(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in networks.MomentEncoder.SHAPE, params)

    encoder = adam("encoder", 1)
    if shape_rate != 1.0:
        encoder = optax.chain(encoder, optax.masked(optax.scale(shape_rate), of_shape))
    return Players(encoder, adam("decoder", 1), adam("adversary", config.adversary_steps))


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses what `Model` does not see."""
    options = config.contrast
    _pick("contrast.kind", options.kind, CONTRASTS)
    _pick("posterior.kind", config.posterior.kind, POSTERIORS)
    for field, value, holds, remedy in (
        ("contrast.bases", options.bases, options.bases >= 0, "at least 0"),
        ("contrast.gaussian_share", options.gaussian_share, 0 <= options.gaussian_share <= 1, "in [0, 1]"),
        ("posterior.flows", config.posterior.flows, config.posterior.flows >= 1, "at least 1"),
        ("network.head_scale", config.network.head_scale, config.network.head_scale > 0, "positive"),
    ):
        if not holds:
            raise UserError(f"{field}={value!r}: must be {remedy}")


def _implicit(config, trunk, latents):
    """AVB's: under adaptive contrast with bases, one that knows its moments."""
    options = config.contrast
    if options.kind == "none" or not options.bases:
        return _black_box(config, trunk, latents)
    encoder = networks.MomentEncoder(
        trunk, latents, options.bases, tuple(options.widths), options.gaussian_share, config.network.head_scale
    )
    return encoder, latents + options.bases * (latents + config.noise_dim)


def _black_box(config, trunk, latents):
    return networks.BlackBoxEncoder(trunk, latents), config.noise_dim


def _gaussian(config, trunk, latents):
    return networks.GaussianEncoder(trunk, latents, config.network.head_scale), latents


def _density(config, trunk, latents):
    """The VAE's, which knows log q(z|x)."""
    kind, options = config.posterior.kind, config.posterior
    parts = {"trunk": trunk, "latent_dim": latents, "head_scale": config.network.head_scale}
    more = {"flows": options.flows, "widths": tuple(options.widths)}
    more = {field: value for field, value in more.items() if field in POSTERIORS[kind].__dataclass_fields__}
    return POSTERIORS[kind](**parts, **more), latents + (config.noise_dim if kind == "auxiliary" else 0)


# A method's kind of encoder, and how many noise numbers it takes.
ENCODERS = {
    "implicit": _implicit, "black_box": _black_box, "gaussian": _gaussian, "density": _density,
    None: lambda config, trunk, latents: (None, 1),
}  # fmt: skip
POSTERIORS = {
    "diagonal": networks.GaussianEncoder, "full": networks.FullCovarianceEncoder, "planar": networks.PlanarFlowEncoder,
    "iaf": networks.IAFEncoder, "realnvp": networks.RealNVPEncoder, "auxiliary": networks.AuxiliaryEncoder,
}  # fmt: skip


class Family(NamedTuple):
    """A family's networks."""

    trunk: nn.Module  # of the encoder
    decoder: nn.Module
    pairs: nn.Module  # an adversary of (x, z)
    latents: nn.Module  # of z
    images: nn.Module  # of x


def _mlp(config, x_shape, parameters):
    options, activation = config.network, _activation(config)
    widths, rank = tuple(options.widths), len(x_shape)

    def trunk() -> networks.MLP:
        return networks.MLP(widths, activation, rank)

    pairs = networks.InnerProductAdversary(
        trunk(), networks.MLP(widths, activation), options.adversary_features, options.minus_log_prior,
        config.contrast.kind == "adaptive",
    )  # fmt: skip
    decoder = networks.MLPDecoder(x_shape, parameters, widths, activation)
    latents = networks.LatentAdversary(widths, activation)
    return Family(trunk(), decoder, pairs, latents, networks.ImageAdversary(trunk()))


def _conv(config, x_shape, parameters):
    options, activation = config.network, _activation(config)

    def trunk() -> networks.ConvNet:
        return networks.ConvNet(options.channels, options.kernel_size, activation, options.batch_norm)

    z_widths = tuple(options.z_widths)
    pairs = networks.InnerProductAdversary(
        trunk(), networks.MLP(z_widths, activation), options.adversary_features, options.minus_log_prior,
        config.contrast.kind == "adaptive",
    )  # fmt: skip
    decoder = networks.ConvDecoder(
        x_shape, parameters, options.channels, options.kernel_size, activation, options.decoder_batch_norm
    )
    latents = networks.LatentAdversary(z_widths, activation)
    return Family(trunk(), decoder, pairs, latents, networks.ImageAdversary(trunk()))


def _resnet(config, x_shape, parameters):
    options, activation = config.network, _activation(config)
    adversary, widths = (options.adversary_channels, options.adversary_kernel_size), tuple(options.adversary_widths)
    encoder = networks.ResNet(options.channels, options.kernel_size, options.units, activation, options.batch_norm)
    decoder = networks.ResNetDecoder(
        x_shape, parameters, options.channels, options.kernel_size, options.units, activation, options.decoder_batch_norm
    )
    pairs = networks.ConvAdversary(*adversary, widths, activation, options.batch_norm, options.minus_log_prior)
    images = networks.ImageAdversary(networks.ConvNet(*adversary, activation, options.batch_norm))
    return Family(encoder, decoder, pairs, networks.LatentAdversary(widths, activation), images)


FAMILIES = {"mlp": _mlp, "conv": _conv, "resnet": _resnet}
FAMILY_FIELDS = {
    "mlp": ("widths", "adversary_features"), "conv": ("channels", "kernel_size", "z_widths", "adversary_features"),
    "resnet": ("units", "adversary_channels", "adversary_kernel_size", "adversary_widths"),
}  # fmt: skip
LIKELIHOODS = {
    "bernoulli": lambda config: Bernoulli(),
    "gaussian": lambda config: Gaussian(std=config.likelihood_std or None),
    "logistic": lambda config: DiscretizedLogistic(),
}
CONTRASTS = {name: name for name in players.CONTRASTS}
SCALES = {"pixel": False, "global": True}  # whether all pixels share one learned scale


def _activation(config):
    return _pick("network.activation", config.network.activation, ACTIVATIONS)


def _pick(field: str, name: str, choices: dict):
    if name not in choices:
        raise UserError(f"{field}={name!r}: must be one of {', '.join(choices)}")
    return choices[name]
