"""The three players as pure functions of their params, whatever Flax Linen modules they are.

encoder    (x [B, ...], noise [B, N]) -> z [B, Z], or a `Posterior` with moments [B, Z] or log q(z|x) [B] as well
decoder    z [B, Z] -> the likelihood's parameters [B, *x, P]
adversary  (x [B, ...], z [B, Z]) -> T [B], or a `Judgement` that also tells the features [B, F] behind it

A module whose `__call__` takes `train` is told whether it trains; collections other than 'params' (batch statistics)
are carried. An adversary that declares `shares_x = True` accepts z [S, B, Z] and returns T [S, B], which lets it
compute its x-side once for several z; so does an encoder, of noise [S, B, N] and z [S, B, Z]. Any other is called on the
S * B pairs.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from avb_jax import distributions
from avb_jax.divergences import DIVERGENCES
from avb_jax.types import Array, Draws, Judgement, Players, Posterior, PyTree, State, UserError, Variables

CONTRASTS = ("none", "adaptive")


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained: the players' networks, the distributions between them, and the scales of the objective."""

    networks: Players
    prior: distributions.StandardNormal
    likelihood: distributions.Likelihood | distributions.Deterministic  # the latter: a decoder that only samples
    noise_dim: int  # N, how many N(0, 1) numbers the encoder gets per example
    beta: float = 1.0  # weight of the KL term once warmed up; 1 is the ELBO
    beta_warmup: int = 0  # steps over which the weight rises linearly from 0
    adversary_steps: int = 1  # adversary updates per step (section 3.2: keep T near its optimum)
    noise_draws: int = 1  # S, draws of z per example in a step: all are for T, the first one is decoded
    contrast: str = "none"  # what T tells q(z|x) from: the prior, or with 'adaptive' a Gaussian with q's moments
    adversary_floor: float = 0.0  # c: the KL term takes max(T, -c), which costs at most e^-c nats of bound; 0: none
    moment_draws: int = 8  # of z, for those moments where the encoder does not tell them
    moment_gradients: bool = False  # whether gradients flow through those moments, see `contrast`
    divergence: str = "jensen_shannon"  # the adversary's objective, one of `divergences.DIVERGENCES`
    adversary_sees_x: bool = True  # False: T(z), as in the adversarial autoencoder, whose method turns it off
    feature_weight: float = 1.0  # gamma of the VAE/GAN: of its reconstruction term in the decoder's loss
    ema_decay: float = 0.0  # decay of the moving averages that evaluation uses; 0 turns them off

    def __post_init__(self):
        checks = {
            "noise_dim": (self.noise_dim >= 1, "at least 1"),
            "beta": (self.beta >= 0, "at least 0"),
            "beta_warmup": (self.beta_warmup >= 0, "at least 0 steps"),
            "adversary_steps": (self.adversary_steps >= 1, "at least 1"),
            "noise_draws": (self.noise_draws >= 1, "at least 1"),
            "contrast": (self.contrast in CONTRASTS, "one of " + ", ".join(CONTRASTS)),
            "adversary_floor": (self.adversary_floor >= 0, "at least 0 nats"),
            "moment_draws": (self.moment_draws >= 2, "at least 2"),
            "divergence": (self.divergence in DIVERGENCES, "one of " + ", ".join(DIVERGENCES)),
            "feature_weight": (self.feature_weight >= 0, "at least 0"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
        }
        for field, (holds, remedy) in checks.items():
            if not holds:
                raise UserError(f"{field}={getattr(self, field)!r}: must be {remedy}")

    def beta_at(self, step: Array) -> Array:
        """Weight of the KL term in the step after `step` steps."""
        warmup = jnp.minimum(1.0, (step + 1) / self.beta_warmup) if self.beta_warmup else 1.0
        return jnp.asarray(self.beta * warmup, jnp.float32)


def _apply(module: nn.Module, params: PyTree, stats: PyTree, *inputs: Array, train: bool) -> tuple[PyTree, PyTree]:
    """Runs a module; returns its output and its new collections (the old ones unless it trains)."""
    options = {"train": train} if _takes_train(module) else {}
    variables = {"params": params, **stats}
    if not (train and stats):
        return module.apply(variables, *inputs, **options), stats
    return module.apply(variables, *inputs, mutable=list(stats), **options)


def _takes_train(module: nn.Module) -> bool:
    return "train" in inspect.signature(type(module).__call__).parameters


def _check_shape(player: str, got: tuple, expected: tuple) -> None:
    if tuple(got) != tuple(expected):
        raise UserError(f"{player}: returned shape {tuple(got)}, expected {tuple(expected)}; mend the module's output")


def encode(model: Model, params: PyTree, stats: PyTree, x: Array, noise: Array, *, train: bool):
    """Draws z ~ q(z|x) for x [B, ...] and noise [B, N], or S times as many for noise [S, B, N].

    Returns:
      The `Posterior`, with z [B, Z] or [S, B, Z] and moments [B, Z], and the encoder's new batch statistics.

    Raises:
      UserError: the encoder's output does not have these shapes, or is called Gaussian and has no moments.
    """
    encoder, shape = model.networks.encoder, (*noise.shape[:-1], model.prior.dim)
    separate = noise.ndim == 3 and not getattr(encoder, "shares_x", False)
    if separate:
        x = jnp.broadcast_to(x, (*noise.shape[:2], *x.shape[1:])).reshape(-1, *x.shape[1:])
        noise = noise.reshape(-1, noise.shape[-1])
    out, stats = _apply(encoder, params, stats, x, noise, train=train)
    posterior = out if isinstance(out, Posterior) else Posterior(out)
    _check_shape("encoder", posterior.z.shape, (*noise.shape[:-1], model.prior.dim))
    for moment in (posterior.mean, posterior.std):
        if moment is not None:
            _check_shape("encoder's moments", moment.shape, (x.shape[0], model.prior.dim))
    if posterior.gaussian and (posterior.mean is None or posterior.std is None):
        raise UserError("encoder: Posterior(gaussian=True) without mean and std; give both, of N(mean, diag std^2)")
    if posterior.log_q is not None:
        _check_shape("encoder's log_q", posterior.log_q.shape, noise.shape[:-1])
    if separate:  # an example's moments are the same beside each of its draws
        mean, std = (None if a is None else a.reshape(shape)[0] for a in (posterior.mean, posterior.std))
        log_q = None if posterior.log_q is None else posterior.log_q.reshape(shape[:-1])
        posterior = posterior.replace(z=posterior.z.reshape(shape), mean=mean, std=std, log_q=log_q)
    return posterior, stats


def decode(model: Model, params: PyTree, stats: PyTree, z: Array, *, train: bool):
    """The likelihood's parameters [B, *x, P] at z [B, Z], and the decoder's new batch statistics."""
    return _apply(model.networks.decoder, params, stats, z, train=train)


def discriminate(model: Model, params: PyTree, stats: PyTree, x: Array, z: Array, *, train: bool):
    """T(x, z) [S, B] at z [S, B, Z], and the adversary's new batch statistics.

    All S * B pairs go through one call, so that a batch normalisation sees them together: T stays one function of
    (x, z), the same one in the encoder's loss and in the adversary's.

    Raises:
      UserError: the adversary's output is not one number per pair.
    """
    adversary = model.networks.adversary
    pairs = z.shape[:-1]
    if not model.adversary_sees_x:
        x = jnp.zeros_like(x)
    if getattr(adversary, "shares_x", False):
        t, stats = _apply(adversary, params, stats, x, z, train=train)
        _check_shape("adversary", t.shape, pairs)
        return t, stats
    x = jnp.broadcast_to(x, (*pairs, *x.shape[1:])).reshape(-1, *x.shape[1:])
    judgement, stats = judge(model, params, stats, x, z.reshape(-1, z.shape[-1]), train=train)
    return judgement.t.reshape(pairs), stats


def judge(model: Model, params: PyTree, stats: PyTree, x: Array, z: Array | None = None, *, train: bool):
    """What the adversary says of pairs x [B, ...] and z [B, Z], or of x alone: a `Judgement`, and its new batch statistics.

    Raises:
      UserError: the adversary's output is not one number per pair.
    """
    z = jnp.zeros((x.shape[0], model.prior.dim)) if z is None else z
    out, stats = _apply(model.networks.adversary, params, stats, x, z, train=train)
    judgement = out if isinstance(out, Judgement) else Judgement(out)
    _check_shape("adversary", judgement.t.shape, x.shape[:1])
    return judgement, stats


def draw(key: Array, model: Model, x: Array) -> Draws:
    """Samples lines 4 and 5 of Algorithm 1 for the examples x [B, ...]."""
    noise_key, prior_key = jax.random.split(key)
    pairs = (model.noise_draws, x.shape[0])
    noise = jax.random.normal(noise_key, (*pairs, model.noise_dim))
    return Draws(x, noise, model.prior.sample(prior_key, pairs))


def init(key: Array, model: Model, optimizers: Players, x: Array) -> State:
    """A fresh State, its params shaped by the batch x [B, ...]; players that have no network stay None.

    Raises:
      UserError: a network's output does not fit x or the prior, or a player has a network and no optimiser.
    """
    keys = Players(*jax.random.split(key, 3))
    noise, z = jnp.zeros((x.shape[0], model.noise_dim)), jnp.zeros((x.shape[0], model.prior.dim))
    inputs = Players(encoder=(x, noise), decoder=(z,), adversary=(x, z))
    params, stats, opt_state = {}, {}, {}
    for name, module in model.networks._asdict().items():
        if module is None:
            params[name], stats[name], opt_state[name] = None, {}, None
            continue
        if getattr(optimizers, name) is None:
            raise UserError(f"optimizers.{name}=None: the model has a network for this player; give it an optax optimiser")
        variables = dict(module.init(getattr(keys, name), *getattr(inputs, name)))
        params[name] = variables.pop("params", {})
        stats[name] = variables
        opt_state[name] = getattr(optimizers, name).init(params[name])
    params, stats = Players(**params), Players(**stats)
    output = jax.eval_shape(lambda: decode(model, params.decoder, stats.decoder, z, train=False)[0])
    _check_shape("decoder", output.shape, (*x.shape, model.likelihood.parameters))
    average = jax.tree.map(jnp.copy, Variables(params, stats)) if model.ema_decay else None
    return State(jnp.zeros((), jnp.int32), params, Players(**opt_state), stats, average)


def evaluation_variables(state: State) -> Variables:
    """The params to evaluate, and the statistics that belong to them: their moving averages where there are any."""
    return Variables(state.params, state.batch_stats) if state.average is None else state.average


def check_likelihood(model: Model) -> None:
    """Refuses a model that defines no p(x|z).

    Raises:
      UserError: its decoder only samples.
    """
    if not hasattr(model.likelihood, "log_prob"):
        name = type(model.likelihood).__name__
        raise UserError(f"likelihood={name}: this model defines no p(x|z), so that it has no log p(x) to estimate")


def log_joint(state: State, model: Model) -> Callable[[Array, Array], Array]:
    """The function (x [*x], z [K, Z]) -> log p(x, z) [K] = log p(x|z) + log p(z) of one example, in nats.

    Raises:
      UserError: as `check_likelihood`.
    """
    check_likelihood(model)
    params, stats = evaluation_variables(state)

    def log_density(x: Array, z: Array) -> Array:
        output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
        return model.likelihood.log_prob(output, jnp.broadcast_to(x, (len(z), *x.shape))) + model.prior.log_prob(z)

    return log_density


def sample(key: Array, state: State, model: Model, count: int) -> Array:
    """Mean images [count, *x] of p(x|z) at z ~ p(z), pixels in [0, 1] under a Bernoulli likelihood."""
    return mean_images(state, model, model.prior.sample(key, (count,)))


def mean_images(state: State, model: Model, z: Array) -> Array:
    """Mean images [B, *x] of p(x|z) at z [B, Z]."""
    params, stats = evaluation_variables(state)
    output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
    return model.likelihood.mean(output)


def sample_posterior(key: Array, state: State, model: Model, x: Array) -> Array:
    """One draw z [B, Z] from q(z|x) per example."""
    noise = jax.random.normal(key, (x.shape[0], model.noise_dim))
    params, stats = evaluation_variables(state)
    return encode(model, params.encoder, stats.encoder, x, noise, train=False)[0].z


def reconstruct(key: Array, state: State, model: Model, x: Array) -> Array:
    """Mean images [B, *x] of p(x'|z) at one z ~ q(z|x) per example."""
    return mean_images(state, model, sample_posterior(key, state, model, x))
