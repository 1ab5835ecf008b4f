"""AVB for a density that the user gives, without a data set.

(Mescheder, Nowozin & Geiger 2017, the later version: eight schools.) A sampler z = enc(eps) maximises
E_q[log p~(z) - T(z) - log r(z)], T standing in for log q(z) - log r(z) under adaptive contrast: where T is optimal, a lower
bound on the log of the integral of p~. It is a `Method` whose `log_joint` is log p~(z): p~ is in the place of the prior, and an
example x has no numbers, so that there is nothing to decode.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer.util import initialize_model

from avb_jax import contrast as contrasts
from avb_jax import networks, players
from avb_jax.data.dataset import Dataset
from avb_jax.distributions import standard_normal
from avb_jax.method import Method, identity
from avb_jax.methods import avb, generator
from avb_jax.methods.settings import at_least, check_settings
from avb_jax.methods.update import Generative, adversarial_step
from avb_jax.network import as_network
from avb_jax.streams import stream
from avb_jax.training.callbacks import JSONLines, ProgressBar, TensorBoard
from avb_jax.training.loop import train
from avb_jax.transforms.ema import averaged, with_ema
from avb_jax.types import AdversaryTerms, Array, Draws, Players, PyTree, State, Terms, UserError

PAIRS = 20_000  # draws behind `Fit.bound` and its diagnostics
EMA_DECAY = 0.999  # of the averages that `Fit` evaluates
ADAPTIVE = contrasts.GaussianContrast()


class Density(dist.Distribution):
    """The user's density p~ over R^dim, up to a factor, as a distribution that cannot be sampled."""

    support = dist.constraints.real_vector
    pytree_aux_fields = ("log_density",)

    def __init__(self, log_density: Callable[[Array], Array], dim: int):
        """Takes log p~ of one z [dim]."""
        self.log_density = log_density
        super().__init__(event_shape=(dim,), validate_args=False)

    def log_prob(self, value: Array) -> Array:
        """Log p~(z) [...] of z [..., Z]: nats, up to a constant."""
        return jnp.vectorize(self.log_density, signature="(z)->()")(value)


class LogDensityNetwork(nn.Module):
    """log q(z), up to a constant, of z as r standardises it; maps x [B, 0] and z [B, Z] to [B], and starts at 0."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        return networks.LatentAdversary(self.widths, name="log_q")(x, z)


class Info(NamedTuple):
    """What a step is observed by, per draw [B] and in nats."""

    elbo: Array  # log p~(z) - T(z) - log r(z): an estimate of a bound on the log of p~'s integral, as good as T
    adversary_loss: Array  # eq. 3.3
    adversary_accuracy: Array  # as in AdversaryTerms
    adversary_saturation: Array  # as in AdversaryTerms


def negative_bound(
    params: Players,
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    density: Density,
    contrast: contrasts.GaussianContrast,
    beta: Array | float = 1.0,
    train: bool = True,
) -> tuple[Array, Generative]:
    """E_q[T(z) + log r(z) - log p~(z)] at z = enc(noise): KL(q, p~), as far as T is log q(z) - log r(z).

    Args:
      params: of which the encoder's are read.
      adversary: T's params.
      collections: every player's.
      draws: x [B, 0], noise [S, B, N], z_prior [S, B, Z] from N(0, I).
      networks: encoder and adversary.
      density: p~.
      contrast: how r's moments are found.
      beta: not used; `adversarial_step` gives it to every method's loss.
      train: whether batch normalisation uses this batch.

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B] without reconstructions, and `compared` [2, S, B, Z], its draws
      and r's as T sees them.
    """
    del beta
    drawn, encoder = contrasts.encode(
        contrast, density, networks.encoder, params.encoder, collections.encoder, draws, train=train
    )
    t, _ = avb.both_sides(
        adversary,
        collections,
        draws.x,
        drawn.compared,
        networks=networks,
        prior=density,
        contrast=contrast,
        minus_log_prior=True,
        train=train,
    )
    kl = jnp.mean(t[0] + drawn.log_ratio, axis=0)
    terms = Terms(jnp.zeros_like(kl), kl)
    return jnp.mean(kl), Generative(terms, drawn.compared, collections._replace(encoder=encoder))


def density_method(
    log_density: Callable[[Array], Array],
    dim: int,
    sampler: Any,
    adversary: Any,
    *,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    contrast: contrasts.GaussianContrast = ADAPTIVE,
    adversary_steps: int = 1,
) -> Method:
    """AVB with adaptive contrast for a density.

    T is the adversary's output plus |z|^2 / 2 at z as r standardises it: T + log r, which the sampler is trained on, is that
    output up to a constant. Where q has few draws nothing teaches the network, and it continues about linearly. Were T itself
    the network, the sampler would there be rewarded by -log r, which rises as a square: the arms of the tests' banana grew too
    long.

    Args:
      log_density: z [dim] -> log p~(z) [], nats, up to a constant, differentiable, over all of R^dim.
      dim: of z.
      sampler: (x [B, 0], noise [B, N]) -> z [B, Z], or a `Posterior` with r's moments; `networks.Sampler`, for one.
      adversary: (x [B, 0], z [B, Z]) -> log q(z) [B] up to a constant, at z as r standardises it.
      optimizers: an optax optimiser per player, or one for both.
      noise_dim: N, how many N(0, 1) numbers the sampler gets per draw.
      contrast: how r's moments are found where the sampler does not give them.
      adversary_steps: adversary updates per step (section 3.2).

    Returns:
      A `Method` for x [B, 0], whose `sample` draws z [count, Z] from q, whose `log_joint` is log p~(z), and whose `elbo` is the
      bound under T. It has no decoder.

    Raises:
      UserError: a setting out of its range, or a density that is not a finite number at the origin.
    """
    check_settings(
        dim=at_least(dim, 1),
        noise_dim=at_least(noise_dim, 1),
        adversary_steps=at_least(adversary_steps, 1),
    )
    at_origin = jax.eval_shape(log_density, jnp.zeros(dim))
    if getattr(at_origin, "shape", None) != ():
        raise UserError(f"log_density: returned {at_origin} at z [{dim}]; it must return one number for one z")
    if not np.isfinite(log_density(jnp.zeros(dim))):
        raise UserError("log_density: is not finite at z = 0; shift z, or give a density over all of R^dim")
    density, optimizers = Density(log_density, dim), generator.for_each(optimizers)
    networks = players.prepare(Players(sampler, None, adversary), optimizers, density, ("adversary",))
    base = contrast.base(density)
    loss = functools.partial(negative_bound, networks=networks, density=density, contrast=contrast)
    loss_of_t = functools.partial(avb.adversary_loss, networks=networks, prior=density, contrast=contrast, minus_log_prior=True)
    encode = generator.posterior_of(networks.encoder, noise_dim, dim)

    def draw(key: Array, x: Array, draws: int = 1) -> Draws:
        return players.draw(key, x, base, noise_dim, draws)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, density, noise_dim)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        state, terms, of_t = adversarial_step(
            key,
            state,
            draw=lambda key: draw(key, x),
            loss=loss,
            adversary_loss=loss_of_t,
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            reduce=reduce,
        )
        return state, Info(terms.elbo, of_t.loss, of_t.accuracy, of_t.saturation)

    def sample(key: Array, state: State, count: int) -> Array:
        return encode(key, state, jnp.zeros((count, 0))).z

    def log_joint(state: State, x: Array, z: Array) -> Array:
        del state, x
        return density.log_prob(z)

    def elbo(key: Array, state: State, x: Array) -> Terms:
        return loss(state.params, state.params.adversary, state.collections, draw(key, x), train=False)[1].terms

    def evaluate_adversary(key: Array, state: State, x: Array, draws: int = 1) -> AdversaryTerms:
        drawn = draw(key, x, draws)
        _, generative = loss(state.params, state.params.adversary, state.collections, drawn, train=False)
        _, (terms, _) = loss_of_t(state.params.adversary, state.collections, drawn, generative.compared, train=False)
        return terms._replace(kl=generative.terms.kl)

    return Method("avb", init, train_step, sample, encode=encode, log_joint=log_joint, elbo=elbo, adversary=evaluate_adversary)


class Diagnostics(NamedTuple):
    """Whether T can be believed; means over draws."""

    adversary_loss: float  # eq. 3.3, nats; 2 log 2 = 1.386 where q = r, near 0 where T saturates
    adversary_accuracy: float  # in [0, 1]
    kl_contrast: float  # KL(q(z), r(z)) under T, nats: how far q is from the Gaussian of its moments; negative: T is off


class Fit(NamedTuple):
    """What was fitted."""

    sample: Callable[[Array, int], PyTree]  # (key, count) -> draws: [count, Z], or {site: [count, ...]} of a NumPyro model
    unconstrained: Callable[[Array, int], Array]  # (key, count) -> draws [count, Z] of the density's own z
    bound: float  # E[log p~ - T - log r], nats: an estimate of a lower bound on log of p~'s integral, as good as T
    bound_error: float  # its standard error over draws
    diagnostics: Diagnostics
    adversary: Callable[[Array], Array]  # z [N, Z] -> log q(z) - log r(z) [N] under T
    contrast: tuple[Array, Array]  # mean [Z] and standard deviation [Z] of r
    state: State
    method: Method  # whose functions take `state`, and x [B, 0]


def fit(
    log_density: Callable[[Array], Array],
    dim: int,
    *,
    steps: int = 10_000,
    batch_size: int = 512,
    seed: int = 0,
    noise_dim: int = 16,
    widths: Sequence[int] = (128, 128),
    gaussian_share: float = 0.05,
    adversary_widths: Sequence[int] = (256, 256),
    adversary_steps: int = 2,
    sampler_rate: float = 2e-4,
    adversary_rate: float = 1e-3,
    clip: float = 10.0,
    workdir: str | pathlib.Path | None = None,
    quiet: bool = False,
) -> Fit:
    """Fits an implicit q(z) to a density by AVB with adaptive contrast.

    Args:
      log_density: z [dim] -> log p~(z) [], up to a constant, differentiable, over all of R^dim.
      dim: of z.
      steps: of training; both rates fall to 0 along a cosine.
      batch_size: draws of z per step.
      seed: of everything random.
      noise_dim: noise numbers that the sampler's network sees next to `dim` others, which also enter linearly; with `dim` more,
        the Gaussian share's, a draw takes 2 dim + noise_dim.
      widths: of the sampler's network.
      gaussian_share: of q's variance in each dimension at the start, how much is independent Gaussian noise, against a q that
        is sharper than T resolves: the sampler's way to a bound that is not true. No floor: training may shrink it with `std`.
      adversary_widths: of T's.
      adversary_steps: updates of T per step (section 3.2).
      sampler_rate: Adam's, of the sampler; location and log scale move ten times as fast. It has to be slow for T to follow.
        The tests' torus and Rosenbrock density take 5e-4 for 4,000 steps; with 6,000 at 2e-4 the banana's arms were short (its
        z_1's standard deviation by 7% and 10%, two seeds).
      adversary_rate: Adam's, of T.
      clip: largest norm of a gradient; densities are steep far from their modes, where the sampler may start.
      workdir: folder for checkpoints and metrics, from which an interrupted fit continues; none by default.
      quiet: no progress on the terminal.

    Raises:
      UserError: sizes out of range, or a density that is not a finite number at the origin.
      Interrupted: as `training.loop.train`.
    """
    check_settings(
        dim=at_least(dim, 1),
        steps=at_least(steps, 1),
        batch_size=at_least(batch_size, 1),
        noise_dim=at_least(noise_dim, 0),
        adversary_steps=at_least(adversary_steps, 1),
        gaussian_share=(gaussian_share, 0 <= gaussian_share <= 1, "in [0, 1]"),
        sampler_rate=(sampler_rate, sampler_rate > 0, "above 0"),
        adversary_rate=(adversary_rate, adversary_rate > 0, "above 0"),
        clip=(clip, clip > 0, "above 0"),
    )

    def adam(rate: float, updates: int) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(clip), optax.adam(optax.cosine_decay_schedule(rate, updates), b1=0.5))

    sampler = networks.Sampler(dim, tuple(widths), gaussian_share)
    adversary = LogDensityNetwork(tuple(adversary_widths))
    optimizers = Players(encoder=adam(sampler_rate, steps), adversary=adam(adversary_rate, adversary_steps * steps))
    method = density_method(
        log_density,
        dim,
        sampler,
        adversary,
        optimizers=optimizers,
        noise_dim=2 * dim + noise_dim,
        adversary_steps=adversary_steps,
    )
    method = with_ema(method, EMA_DECAY)
    nothing = np.zeros((batch_size, 0), np.float32)
    state = train(
        method,
        Dataset(nothing, nothing, name="no data"),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        workdir=workdir,
        parallel="jit",
        log_every=max(1, min(500, steps)),
        checkpoint_every=max(1, steps // 5),
        callbacks=[JSONLines(), TensorBoard(), *([] if quiet else [ProgressBar()])],
    )
    return _summarise(method, adversary, state, dim, seed)


def fit_numpyro(model: Callable, *args: Any, model_kwargs: dict | None = None, seed: int = 0, **options: Any) -> Fit:
    """Fits q to the posterior of a NumPyro model, over its own unconstrained space.

    Args:
      model: with all latent sites continuous.
      args: the model's, data among them.
      model_kwargs: the model's keyword arguments.
      seed: of everything random.
      options: of `fit`.

    Returns:
      A `Fit` whose `sample` gives {site: [count, ...]} in the constrained space, deterministic sites included.

    Raises:
      UserError: the model has discrete latent sites, or none.
    """
    kwargs = model_kwargs or {}
    key = stream(jax.random.key(seed), "numpyro")
    trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
    latent = {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete or not latent:
        found = f"latent site {discrete[0]!r} is discrete; sum it out" if discrete else "it has no latent sites"
        raise UserError(f"fit_numpyro: {found}, since q is over a space of real numbers")
    info = initialize_model(key, model, model_args=args, model_kwargs=kwargs)
    flat, unravel = ravel_pytree(info.param_info.z)
    fitted = fit(lambda z: -info.potential_fn(unravel(z)), flat.size, seed=seed, **options)
    constrain = jax.jit(jax.vmap(lambda z: info.postprocess_fn(unravel(z))))
    return fitted._replace(sample=lambda key, count: constrain(fitted.unconstrained(key, count)))


def _summarise(method: Method, adversary: nn.Module, state: State, dim: int, seed: int) -> Fit:
    evaluate = jax.jit(lambda key, x: (method.elbo(key, state, x), method.adversary(key, state, x)))
    terms, of_t = jax.device_get(evaluate(stream(jax.random.key(seed), "summary"), jnp.zeros((PAIRS, 0))))
    posterior = method.encode(jax.random.key(0), state, jnp.zeros((1, 0)))
    mean, std = posterior.mean[0], posterior.std[0]
    variables, of_z = averaged(state), Players(adversary=as_network(adversary))

    @jax.jit
    def log_ratio(z: Array) -> Array:
        t, _ = avb.evaluate_t(
            variables.params.adversary,
            variables.collections,
            jnp.zeros((len(z), 0)),
            ((z - mean) / std)[None],
            networks=of_z,
            prior=standard_normal(dim),
            contrast=ADAPTIVE,
            minus_log_prior=True,
            train=False,
        )
        return t[0]

    def sample(key: Array, count: int) -> Array:
        return method.sample(key, state, count)

    diagnostics = Diagnostics(float(of_t.loss.mean()), float(of_t.accuracy.mean()), float(of_t.t.mean()))
    error = float(terms.elbo.std(ddof=1) / np.sqrt(PAIRS))
    bound = float(terms.elbo.mean())
    return Fit(sample, sample, bound, error, diagnostics, log_ratio, (mean, std), state, method)
