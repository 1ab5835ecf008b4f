"""From a config to what it describes: data set, model, optimisers."""

import functools

import flax.linen as nn
import ml_collections
import optax

from avb_jax import Model, Players, StandardNormal, UserError, data, networks, players
from avb_jax.data import Dataset
from avb_jax.data.photos import Photos
from avb_jax.distributions import Bernoulli, DiscretizedLogistic, Gaussian
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
    """The players of a method for examples of this shape; every method gets the same decoder."""
    likelihood = _pick("likelihood", config.likelihood, LIKELIHOODS)(config)
    shared = _pick("likelihood_scale", config.likelihood_scale, SCALES) and likelihood.parameters == 2
    parameters = 1 if shared else likelihood.parameters
    encoder, decoder, adversary = _pick("network.family", config.network.family, FAMILIES)(config, x_shape, parameters)
    decoder = networks.GlobalScale(decoder) if shared else decoder
    gaussian, latents, options = method == "vae", config.latent_dim, config.contrast
    adaptive = _pick("contrast.kind", options.kind, CONTRASTS) == "adaptive"
    for field, holds, remedy in (
        ("contrast.bases", options.bases >= 0, "at least 0"),
        ("contrast.gaussian_share", 0 <= options.gaussian_share <= 1, "in [0, 1]"),
        ("network.head_scale", config.network.head_scale > 0, "positive"),
    ):
        if not holds:
            value = functools.reduce(lambda part, name: part[name], field.split("."), config)
            raise UserError(f"{field}={value!r}: must be {remedy}")
    if gaussian:
        head, noise_dim = networks.GaussianEncoder(encoder, latents, config.network.head_scale), latents
    elif adaptive and options.bases:
        head = networks.MomentEncoder(
            encoder, latents, options.bases, tuple(options.widths), options.gaussian_share, config.network.head_scale
        )
        noise_dim = latents + options.bases * config.noise_dim
    else:
        head, noise_dim = networks.BlackBoxEncoder(encoder, latents), config.noise_dim
    return Model(
        networks=Players(head, decoder, None if gaussian else adversary),
        prior=StandardNormal(latents),
        likelihood=likelihood,
        noise_dim=noise_dim,
        contrast="none" if gaussian else options.kind,
        moment_draws=options.moment_draws,
        noise_draws=config.noise_draws,
        adversary_floor=config.adversary_floor,
        beta=config.beta,
        beta_warmup=config.beta_warmup,
        adversary_steps=config.adversary_steps,
        ema_decay=config.ema_decay,
    )


def optimizers(config: ml_collections.ConfigDict) -> Players:
    """Adam for each player at its own rate, with the schedule and clipping of `config.optimizer`."""
    options = config.optimizer
    if options.schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule={options.schedule!r}: must be one of {', '.join(SCHEDULES)}")

    def adam(player: str, updates_per_step: int) -> optax.GradientTransformation:
        rate, updates = options[f"{player}_rate"], config.steps * updates_per_step
        if not rate > 0:
            raise UserError(f"optimizer.{player}_rate={rate!r}: must be positive")
        schedule = optax.cosine_decay_schedule(rate, max(updates, 1)) if options.schedule == "cosine" else rate
        clip = optax.clip_by_global_norm(options.clip) if options.clip else optax.identity()
        return optax.chain(clip, optax.adam(schedule, b1=options.b1, b2=options.b2))

    return Players(adam("encoder", 1), adam("decoder", 1), adam("adversary", config.adversary_steps))


def _mlp(config, x_shape, parameters):
    widths, activation, rank = tuple(config.network.widths), _activation(config), len(x_shape)
    adversary = networks.InnerProductAdversary(
        networks.MLP(widths, activation, rank), networks.MLP(widths, activation), config.network.adversary_features,
        config.network.minus_log_prior,
    )  # fmt: skip
    decoder = networks.MLPDecoder(x_shape, parameters, widths, activation)
    return networks.MLP(widths, activation, rank), decoder, adversary


def _conv(config, x_shape, parameters):
    options, activation = config.network, _activation(config)

    def trunk() -> networks.ConvNet:
        return networks.ConvNet(options.channels, options.kernel_size, activation, options.batch_norm)

    z_net = networks.MLP(tuple(options.z_widths), activation)
    adversary = networks.InnerProductAdversary(trunk(), z_net, options.adversary_features, options.minus_log_prior)
    decoder = networks.ConvDecoder(
        x_shape, parameters, options.channels, options.kernel_size, activation, options.decoder_batch_norm
    )
    return trunk(), decoder, adversary


def _resnet(config, x_shape, parameters):
    options, activation = config.network, _activation(config)
    encoder = networks.ResNet(options.channels, options.kernel_size, options.units, activation, options.batch_norm)
    decoder = networks.ResNetDecoder(
        x_shape, parameters, options.channels, options.kernel_size, options.units, activation, options.decoder_batch_norm
    )
    adversary = networks.ConvAdversary(
        options.adversary_channels, options.adversary_kernel_size, tuple(options.adversary_widths), activation,
        options.batch_norm, options.minus_log_prior,
    )  # fmt: skip
    return encoder, decoder, adversary


FAMILIES = {"mlp": _mlp, "conv": _conv, "resnet": _resnet}
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
