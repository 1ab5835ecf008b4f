"""From an experiment's config to what it describes: data set, method, optimisers; and from a run directory back to them.

The fields are explained in `experiments/configs/fields.py`.
"""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax
from flax.traverse_util import flatten_dict

import avb_jax
from avb_jax import contrast, data, distributions, models, networks, priors
from avb_jax.data.dataset import Dataset
from avb_jax.data.photos import Photos
from avb_jax.divergences import DIVERGENCES, GENERATOR_DIVERGENCES
from avb_jax.families import LIKELIHOODS, Parts, activation_of, computing, parts_of, pick, pixels_of
from avb_jax.method import Method
from avb_jax.network import Network
from avb_jax.training.workdir import read_json
from avb_jax.transforms import with_ema
from avb_jax.types import Players, UserError

SCHEDULES = ("constant", "cosine")
CONTRASTS = ("prior", "gaussian", "full_covariance")
PIXELS, REALNVP = ("features", "channels", "layers", "kernel_size"), ("channels", "layers", "scales")
PRIORS = ("standard_normal", "flow", "vamp")
ENCODERS = ("black_box", "semi_implicit")
POSTERIORS = {
    "diagonal": networks.GaussianEncoder,
    "full": networks.FullCovarianceEncoder,
    "planar": networks.PlanarFlowEncoder,
    "iaf": networks.IAFEncoder,
    "realnvp": networks.RealNVPEncoder,
    "auxiliary": networks.AuxiliaryEncoder,
}


def methods(config: ml_collections.ConfigDict, x_shape: tuple[int, ...]) -> dict[str, Method]:
    """The methods that `config.method` names (several with commas between), by name, for examples of this shape.

    Raises:
      UserError: a field's value is not one of those that it may have.
    """
    return {name: method(config, name, x_shape) for name in method_names(config)}


def method_names(config: ml_collections.ConfigDict) -> list[str]:
    """What `config.method` names.

    Raises:
      UserError: there is no such method.
    """
    names = [name.strip() for name in config.method.split(",")]
    for name in names:
        pick("method", name, METHODS)
        if names.count(name) > 1:
            raise UserError(f"method={config.method!r}: {name} is named {names.count(name)} times")
    return names


def method(config: ml_collections.ConfigDict, name: str, x_shape: tuple[int, ...]) -> Method:
    """The method of a name; every method gets the same decoder."""
    _check(config)
    made = METHODS[name](config, parts_of(config, name, x_shape))
    return with_ema(made, config.ema_decay) if config.ema_decay else made


def dataset(config: ml_collections.ConfigDict) -> Dataset:
    """The data set of `config.data`."""
    options = Photos(**{field: config.data[field] for field in Photos._fields if field in config.data})
    return data.load(config.data.name, config.data.dir, config.data.binarize, options)


def optimizers(config: ml_collections.ConfigDict) -> Players:
    """Adam for each player at its own rate, with the schedule and clipping of `config.optimizer`.

    The shape of a `networks.MomentEncoder`'s posterior takes `contrast.shape_rate` times the encoder's steps.
    """
    options, shape_rate = config.optimizer, config.contrast.shape_rate
    if not shape_rate > 0:
        raise UserError(f"contrast.shape_rate={shape_rate!r}: must be positive")
    for field in ("b1", "b2"):
        if not 0 <= options[field] < 1:
            raise UserError(f"optimizer.{field}={options[field]!r}: must be at least 0 and below 1")
    if options.clip is not None and not options.clip > 0:
        raise UserError(f"optimizer.clip={options.clip!r}: must be positive, or None")
    if options.accumulate < 1:
        raise UserError(f"optimizer.accumulate={options.accumulate!r}: must be at least 1")
    if options.schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule={options.schedule!r}: must be one of {', '.join(SCHEDULES)}")

    def adam(player: str, updates_per_step: int) -> optax.GradientTransformation:
        rate, updates = options[f"{player}_rate"], config.steps * updates_per_step // options.accumulate
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
    players = Players(encoder, adam("decoder", 1), adam("adversary", config.adversary_steps))
    if options.accumulate == 1:
        return players
    return Players(*[optax.MultiSteps(optimizer, options.accumulate).gradient_transformation() for optimizer in players])


class Run(NamedTuple):
    """What a run directory's config describes."""

    config: ml_collections.ConfigDict
    name: str
    method: Method
    data: Dataset
    num_seeds: int


def run(workdir: pathlib.Path, name: str | None = None, data_dir: str = "") -> Run:
    """One of the methods of a run, with the data set that it was trained on.

    Args:
      workdir: of the run.
      name: which of its methods; the first where it is None.
      data_dir: where the data is, if no longer where the run found it.

    Raises:
      UserError: no run there, or a method that it does not have.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"workdir={workdir}: no run there (there is no {path}); name the directory of a finished run")
    config = ml_collections.ConfigDict(read_json(path))
    if "data" not in config:
        raise UserError(
            f"workdir={workdir}: a run of eight_schools, which has no data set; name one of synthetic, mnist or celeba"
        )
    config.data.dir = data_dir or config.data.dir
    names = method_names(config)
    if name is not None and name not in names:
        raise UserError(f"method={name!r}: the run in {workdir} has {', '.join(names)}")
    found, name = dataset(config), name or names[0]
    return Run(config, name, method(config, name, found.x_shape), found, config.num_seeds)


def _avb(config, parts: Parts) -> Method:
    options = config.contrast
    if config.encoder.kind == "semi_implicit":
        encoder, noise_dim = _semi_implicit(config, parts)
    elif options.kind == "gaussian" and options.bases:
        moments = networks.MomentEncoder(
            parts.trunk,
            config.latent_dim,
            options.bases,
            tuple(options.widths),
            options.gaussian_share,
            config.network.head_scale,
        )
        noise_dim = config.latent_dim + options.bases * (config.latent_dim + config.noise_dim)
        encoder = computing(config, moments)
    else:
        encoder, noise_dim = computing(config, networks.BlackBoxEncoder(parts.trunk, config.latent_dim)), config.noise_dim
    return avb_jax.avb(
        encoder,
        parts.decoder,
        parts.pairs,
        contrast=_contrast(options),
        minus_log_prior=config.network.minus_log_prior,
        likelihood=parts.likelihood,
        noise_dim=noise_dim,
        adversary_floor=config.adversary_floor,
        noise_draws=config.noise_draws,
        importance_weighted=config.importance_weighted,
        **_kl_weight(config),
        **_of_adversary(config),
        **_shared(config, parts),
    )


def _contrast(options) -> contrast.Contrast:
    if options.kind == "prior":
        return contrast.PriorContrast()
    return contrast.GaussianContrast(
        moment_draws=options.moment_draws,
        moment_gradients=options.moment_gradients,
        full=options.kind == "full_covariance",
        inflation=options.inflation,
        prior_share=options.prior_share,
    )


def _semi_implicit(config, parts: Parts) -> tuple[nn.Module | Network, int]:
    """The encoder, and how much noise it takes."""
    options = config.encoder
    encoder = networks.SemiImplicitEncoder(
        parts.trunk,
        config.latent_dim,
        tuple(options.widths),
        activation_of(config),
        config.network.head_scale,
        options.smallest_std,
        options.noise_scale,
    )
    return _in_float32(config, "a semi-implicit encoder", encoder), config.latent_dim + config.noise_dim


def _sivi(config, parts: Parts) -> Method:
    encoder, noise_dim = _semi_implicit(config, parts)
    return avb_jax.sivi(
        encoder,
        parts.decoder,
        likelihood=parts.likelihood,
        noise_dim=noise_dim,
        inner_draws=config.inner_draws,
        **_kl_weight(config),
        **_shared(config, parts),
    )


def _uivi(config, parts: Parts) -> Method:
    encoder, noise_dim = _semi_implicit(config, parts)
    return avb_jax.uivi(
        encoder,
        parts.decoder,
        likelihood=parts.likelihood,
        noise_dim=noise_dim,
        **config.hmc,
        **_kl_weight(config),
        **_shared(config, parts),
    )


def _iwhvi(config, parts: Parts) -> Method:
    encoder, noise_dim = _semi_implicit(config, parts)
    reverse = networks.ReverseModel(parts.trunk, noise_dim, tuple(config.encoder.widths), activation_of(config))
    return avb_jax.iwhvi(
        encoder,
        parts.decoder,
        computing(config, reverse),
        likelihood=parts.likelihood,
        noise_dim=noise_dim,
        inner_draws=config.inner_draws,
        **_kl_weight(config),
        **_shared(config, parts),
    )


def _aae(config, parts: Parts) -> Method:
    return avb_jax.aae(
        computing(config, networks.BlackBoxEncoder(parts.trunk, config.latent_dim)),
        parts.decoder,
        parts.latents,
        likelihood=parts.likelihood,
        noise_dim=config.noise_dim,
        adversary_floor=config.adversary_floor,
        noise_draws=config.noise_draws,
        **_kl_weight(config),
        **_of_adversary(config),
        **_shared(config, parts),
    )


def _known(name: str) -> Callable:
    """A method whose encoder knows its density: a VAE, or an IWAE."""

    def build(config, parts: Parts) -> Method:
        encoder, noise_dim = _explicit_encoder(config, parts)
        return getattr(avb_jax, name)(
            encoder,
            parts.decoder,
            likelihood=parts.likelihood,
            noise_dim=noise_dim,
            noise_draws=config.noise_draws,
            **_kl_weight(config),
            **_shared(config, parts),
        )

    return build


def _explicit_encoder(config, parts: Parts) -> tuple[nn.Module | Network, int]:
    """The encoder, and how much noise it takes."""
    kind, options = config.posterior.kind, config.posterior
    more = {"flows": options.flows, "widths": tuple(options.widths)}
    if kind == "diagonal":  # a semi-implicit encoder's layers, or none
        widths = config.encoder.widths if config.encoder.kind == "semi_implicit" else ()
        more = {"widths": tuple(widths), "activation": activation_of(config)}
    more = {field: value for field, value in more.items() if field in POSTERIORS[kind].__dataclass_fields__}
    encoder = POSTERIORS[kind](parts.trunk, config.latent_dim, head_scale=config.network.head_scale, **more)
    encoder = computing(config, encoder) if kind == "diagonal" else _in_float32(config, f"posterior.kind={kind!r}", encoder)
    return encoder, config.latent_dim + (config.noise_dim if kind == "auxiliary" else 0)


def _bigan(config, parts: Parts) -> Method:
    return avb_jax.bigan(
        _gaussian(config, parts),
        parts.decoder,
        parts.pairs,
        noise_dim=config.latent_dim,
        **_of_generator(config),
        **_of_adversary(config),
        **_shared(config, parts),
    )


def _gan(config, parts: Parts) -> Method:
    return avb_jax.gan(parts.decoder, parts.images, **_of_generator(config), **_of_adversary(config), **_shared(config, parts))


def _vaegan(config, parts: Parts) -> Method:
    return avb_jax.vaegan(
        _gaussian(config, parts),
        parts.decoder,
        parts.images,
        noise_dim=config.latent_dim,
        feature_weight=config.feature_weight,
        **_of_generator(config),
        **_kl_weight(config),
        **_of_adversary(config),
        **_shared(config, parts),
    )


def _of_pixels(kind: str) -> Callable:
    def build(config, parts: Parts) -> Method:
        likelihood, parameters = pick("likelihood", config.likelihood, LIKELIHOODS)(config)
        model = pixels_of(config, kind, parts.x_shape, parameters)
        return _explicit(kind, config, model, models.autoregressive(model, likelihood))

    return build


def _realnvp(config, parts: Parts) -> Method:
    options = config.realnvp
    model = networks.RealNVP(parts.x_shape, options.channels, options.layers, options.scales)
    return _explicit("realnvp", config, model, models.flow(model), levels=options.levels)


def _explicit(name: str, config, model: nn.Module, likelihood: Callable, **options) -> Method:
    decoder = _in_float32(config, f"method={name!r}", networks.ModelDecoder(None, model))
    return avb_jax.explicit(decoder, likelihood=likelihood, optimizers=optimizers(config), name=name, **options)


METHODS = {
    "avb": _avb,
    "vae": _known("vae"),
    "iwae": _known("iwae"),
    "sivi": _sivi,
    "uivi": _uivi,
    "iwhvi": _iwhvi,
    "aae": _aae,
    "bigan": _bigan,
    "gan": _gan,
    "vaegan": _vaegan,
    "pixelcnn": _of_pixels("pixelcnn"),
    "row_lstm": _of_pixels("row_lstm"),
    "realnvp": _realnvp,
}


def _gaussian(config, parts: Parts) -> nn.Module | Network:
    return computing(config, networks.GaussianEncoder(parts.trunk, config.latent_dim, config.network.head_scale))


def _shared(config, parts: Parts) -> dict[str, Any]:
    options, prior = config.prior, distributions.standard_normal(config.latent_dim)
    if options.kind == "flow":
        prior = priors.Learned(networks.FlowPrior(config.latent_dim, options.flows, tuple(options.widths)))
    elif options.kind == "vamp":
        prior = priors.Learned(networks.VampPrior(config.latent_dim, parts.x_shape, options.components))
    return {"prior": prior, "optimizers": optimizers(config)}


def _of_adversary(config) -> dict[str, Any]:
    divergence = pick("divergence", config.divergence, DIVERGENCES)
    penalty = config.gradient_penalty
    return {"divergence": divergence, "adversary_steps": config.adversary_steps, "gradient_penalty": penalty}


def _of_generator(config) -> dict[str, Any]:
    return {"generator_divergence": pick("generator_divergence", config.generator_divergence, GENERATOR_DIVERGENCES)}


def _kl_weight(config) -> dict[str, Any]:
    return {"beta": config.beta, "beta_warmup": config.beta_warmup}


def _in_float32(config, what: str, network: nn.Module) -> nn.Module | Network:
    """A network whose densities are sums that bfloat16 gets wrong by tenths of nats, and more where they are narrow."""
    if config.precision == "bfloat16":
        raise UserError(f"precision='bfloat16': {what} computes a density, which needs float32; use precision='float32'")
    return computing(config, network)


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses what the constructors do not see."""
    options = config.contrast
    pick("contrast.kind", options.kind, CONTRASTS)
    pick("prior.kind", config.prior.kind, PRIORS)
    pick("posterior.kind", config.posterior.kind, POSTERIORS)
    pick("encoder.kind", config.encoder.kind, ENCODERS)
    for field, value in flatten_dict(config.to_dict(), sep=".").items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field}={value!r}: must be finite")
        if whole and value < 1 and field.startswith(("network.", "evaluation.")) and field != "network.adversary_components":
            raise UserError(f"{field}={value!r}: must be at least 1")
    widths = {f"{group}.widths": config[group].widths for group in ("encoder", "contrast", "posterior", "prior")}
    widths |= {f"network.{name}": config.network[name] for name in config.network if name.endswith("widths")}
    for field, value, holds, remedy in (
        *((field, tuple(value), all(width >= 1 for width in value), "at least 1 each") for field, value in widths.items()),
        *((field, config[field], config[field] >= 1, "at least 1") for field in ("latent_dim", "noise_dim", "noise_draws")),
        ("contrast.bases", options.bases, options.bases >= 0, "at least 0"),
        ("contrast.gaussian_share", options.gaussian_share, 0 <= options.gaussian_share <= 1, "in [0, 1]"),
        ("encoder.widths", tuple(config.encoder.widths), len(config.encoder.widths) >= 1, "one width at least"),
        ("encoder.noise_scale", config.encoder.noise_scale, config.encoder.noise_scale > 0, "positive"),
        ("encoder.smallest_std", config.encoder.smallest_std, config.encoder.smallest_std >= 0, "at least 0"),
        *((f"pixels.{name}", config.pixels[name], config.pixels[name] >= 1, "at least 1") for name in PIXELS),
        *((f"realnvp.{name}", config.realnvp[name], config.realnvp[name] >= 1, "at least 1") for name in REALNVP),
        ("posterior.flows", config.posterior.flows, config.posterior.flows >= 1, "at least 1"),
        ("prior.flows", config.prior.flows, config.prior.flows >= 1, "at least 1"),
        ("prior.components", config.prior.components, config.prior.components >= 1, "at least 1"),
        ("network.head_scale", config.network.head_scale, config.network.head_scale > 0, "positive"),
    ):
        if not holds:
            raise UserError(f"{field}={value!r}: must be {remedy}")
