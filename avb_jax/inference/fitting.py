"""`fit`: a sampler for a density, trained, watched and checked."""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avb_jax import networks, players
from avb_jax.contrast import GaussianContrast
from avb_jax.data.dataset import Dataset
from avb_jax.distributions import standard_normal
from avb_jax.inference.checks import APART, CLOSER, DRAWS, INNER, Diagnostics, Weigher, check_finite, summarise
from avb_jax.inference.density import ADAPTIVE, density_method, semi_implicit_method
from avb_jax.inference.fitted import Fit
from avb_jax.inference.watch import CAME_BY, Watch
from avb_jax.method import Method
from avb_jax.methods import avb
from avb_jax.network import Network, as_network
from avb_jax.settings import at_least, check_settings
from avb_jax.streams import stream
from avb_jax.training.callbacks import Callback, ProgressBar, keepers
from avb_jax.training.loop import train
from avb_jax.transforms import of_seed
from avb_jax.transforms.ema import averaged, with_ema
from avb_jax.types import Array, Diverged, Players, Posterior, PyTree, State, UserError

# The sampler's rate, by method and dimensions; with a T it has to be slow, the more so the more there is to learn about q.
RATES = {"avb": lambda dim: max(2e-4, 1e-3 / dim), "sivi": lambda dim: 2e-3, "uivi": lambda dim: 2e-3}
SMALL = 3  # dimensions up to which a smaller T follows q as well, and a sharper q
STEPS, STEPS_OF_MORE = 8000, 4000  # up to so many dimensions, and beyond: a minute or two on two cores
EMA_DECAY = 0.999  # of the averages that `Fit` evaluates
NEAREST_RATE, NEAREST_STEPS, NEAREST_DRAWS = 0.05, 300, 128  # Adam's, for the Gaussian that q begins as
NEAR = 1.0  # nats per dimension that the ELBO of the Gaussian that q begins as may lack of the largest
PROBED = 1000  # draws of the first q, at which the density is looked at before anything is trained


class Game(NamedTuple):
    """What is trained for a density."""

    method: Method
    sampler: Network
    adversary: Network | None
    dim: int
    noise_dim: int
    gaussian_share: float

    def moments(self, params: PyTree, u: Array) -> tuple[Array, Array]:
        """Mean and std [N, dim] of z given u [N, noise_dim - dim], under the sampler's params."""
        return self._encode(params, jnp.concatenate([jnp.zeros((len(u), self.dim)), u], axis=1)).conditional

    def draw(self, params: PyTree, noise: Array) -> Array:
        """Z [N, dim] of noise [N, noise_dim], under the sampler's params."""
        return self._encode(params, noise).z

    def _encode(self, params: PyTree, noise: Array) -> Posterior:
        x = jnp.zeros((noise.shape[0], 0))
        return players.encode(self.sampler, params, {}, x, noise, self.dim, train=False)[0]

    def log_ratio(self, state: State, mean: Array, std: Array, z: Array) -> Array:
        """T's log q(z) - log r(z) [N] at z [N, dim], r being N(mean, diag std^2)."""
        variables = averaged(state)
        t, _ = avb.evaluate_t(
            variables.params.adversary,
            variables.collections,
            jnp.zeros((len(z), 0)),
            ((z - mean) / std)[None],
            networks=Players(adversary=self.adversary),
            prior=standard_normal(self.dim),
            contrast=ADAPTIVE,
            minus_log_prior=True,
            train=False,
        )
        return t[0]


def game(
    log_density: Callable[[Array], Array],
    dim: int,
    *,
    method: str = "avb",
    steps: int | None = None,
    noise_dim: int = 0,
    widths: Sequence[int] = (128, 128),
    gaussian_share: float | None = None,
    adversary_widths: Sequence[int] | None = None,
    adversary_steps: int = 2,
    sampler_rate: float | None = None,
    adversary_rate: float = 1e-3,
    inflation: float | None = None,
    clip: float = 10.0,
) -> Game:
    """The players for a density, as `fit` trains them; arguments as there. Rates stay as they are where `steps` is None.

    Raises:
      UserError: sizes out of range, an unknown method.
    """
    check_settings(method=(method, method in RATES, f"one of {', '.join(RATES)}"), dim=at_least(dim, 1))
    sampler_rate = RATES[method](dim) if sampler_rate is None else sampler_rate
    inflation = 1.0 + 2.0 / dim if inflation is None else inflation
    if adversary_widths is None:  # with a smaller T there is time for more steps; in ten dimensions it does not keep up
        adversary_widths = (128, 128) if dim <= SMALL else (256, 256)
    if gaussian_share is None:  # the less, the longer and the thinner q's arms may be; the more, the better T resolves q
        gaussian_share = 0.05 if method != "avb" else 0.15 if dim <= SMALL else 0.3
    check_settings(
        noise_dim=at_least(noise_dim, 0),
        adversary_steps=at_least(adversary_steps, 1),
        gaussian_share=(gaussian_share, 0 <= gaussian_share <= 1, "in [0, 1]"),
        sampler_rate=(sampler_rate, sampler_rate > 0, "above 0"),
        adversary_rate=(adversary_rate, adversary_rate > 0, "above 0"),
        inflation=at_least(inflation, 1),
        clip=(clip, clip > 0, "above 0"),
    )
    if method != "avb" and not gaussian_share:
        raise UserError(f"gaussian_share=0: {method} has no other density of q than its Gaussian share's; set it above 0")

    def adam(rate: float, updates: int) -> optax.GradientTransformation:
        falling = optax.cosine_decay_schedule(rate, updates * steps) if steps else rate
        return optax.chain(optax.clip_by_global_norm(clip), optax.adam(falling, b1=0.5))

    sampler, size = networks.Sampler(dim, tuple(widths), gaussian_share), 2 * dim + noise_dim
    if method != "avb":
        adversary, options = None, {"optimizers": adam(sampler_rate, 1), "noise_dim": size, "unbiased": method == "uivi"}
        made = semi_implicit_method(log_density, dim, sampler, **options)
    else:
        adversary = networks.LatentAdversary(tuple(adversary_widths))
        made = density_method(
            log_density,
            dim,
            sampler,
            adversary,
            optimizers=Players(encoder=adam(sampler_rate, 1), adversary=adam(adversary_rate, adversary_steps)),
            noise_dim=size,
            contrast=GaussianContrast(inflation=inflation),
            adversary_steps=adversary_steps,
        )
        adversary = as_network(adversary)
    return Game(with_ema(made, EMA_DECAY), as_network(sampler), adversary, dim, size, gaussian_share)


def fit(
    log_density: Callable[[Array], Array],
    dim: int,
    *,
    method: str = "avb",
    steps: int | None = None,
    batch_size: int = 512,
    seed: int = 0,
    num_seeds: int | None = None,
    start: Array | Sequence[float] | None = None,
    scale: Array | Sequence[float] | float | str | None = None,
    tolerance: float = 0.01,
    workdir: str | pathlib.Path | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> Fit:
    """Fits an implicit q(z) to a density, by AVB with adaptive contrast or by semi-implicit variational inference.

    Ten times on the way, and at the end, q's own ELBO is bounded from both sides without T: the fit is of the latest State
    that is not surely worse than one before, and the training ends where the log evidence, by importance sampling, is within
    the tolerance.

    Args:
      log_density: z [dim] -> log p~(z) [], up to a constant, differentiable, over all of R^dim.
      dim: of z.
      method: 'avb'; or without T 'sivi' (Yin & Zhou 2018) or 'uivi' (Titsias & Ruiz 2019).
      steps: of training at most, 8,000 up to three dimensions, else 4,000 by default, which is a minute or two on two cores;
        all rates fall to 0 along a cosine.
      batch_size: draws of z per step.
      seed: of everything random.
      num_seeds: how many are trained side by side; the fit is that of the largest log evidence, with all in `runs`.
      start: where q begins, or where the search for its beginning does (`scale`), z [dim]; 0 by default.
      scale: q's standard deviations there [dim], or one for all; 'nearest': q begins as the Gaussian of the largest ELBO whose
        dimensions are independent, found from N(start, I), which of several modes is at one. By default q begins on the way
        there, as the first Gaussian whose ELBO lacks at most a nat per dimension of the largest: as N(start, I) itself where
        that is near enough; from further away T would have to follow q all the way.
      tolerance: estimate of KL(q, p), nats between the log evidence and q's own ELBO, at which training ends; 0: never.
      workdir: folder for checkpoints and metrics, from which an interrupted fit continues and a finished one is read back,
        of this density and these settings; none by default.
      callbacks: further ones, called between blocks of steps.
      quiet: no progress on the terminal.
      **settings: noise_dim, 0: numbers that the sampler's network sees next to `dim` others, which also enter linearly; with
        `dim` more, the Gaussian share's, a draw takes 2 dim + noise_dim. The fewer, the tighter the bounds;
        widths, (128, 128): of the sampler's network;
        gaussian_share, 0.05, of AVB 0.3 and up to three dimensions 0.15: of q's variance in each dimension at the start, how
        much is independent Gaussian noise, against a q that is sharper than T, or the bounds, resolve; no floor, since training
        may shrink it;
        adversary_widths, (256, 256), up to three dimensions (128, 128): of T's network;
        adversary_steps, 2: updates of T per step, which keep it near its optimum (section 3.2);
        sampler_rate, 1e-3 / dim and at least 2e-4, or without T 2e-3: Adam's, of the sampler, which has to be slow for T to
        follow; location and log scale move ten times as fast;
        adversary_rate, 1e-3: Adam's, of T;
        inflation, 1 + 2 / dim: of the standard deviation of the Gaussian's draws that T is shown, over q's, so that it has seen
        what lies around q; the more dimensions, the fewer such draws are near q's middle;
        clip, 10: largest norm of a gradient; densities are steep far from their modes, where the sampler may start.
        Those of T (its widths, steps and rate, and inflation) mean nothing to 'sivi' and 'uivi'.

    Raises:
      UserError: settings out of range; with the point, a density that is not a number somewhere, or has none at the start or
        at more than a twentieth of the points around it.
      Interrupted: as `training.loop.train`.
    """
    check_settings(dim=at_least(dim, 1))
    if steps is None:
        steps = STEPS if dim <= SMALL else STEPS_OF_MORE
    check_settings(
        steps=at_least(steps, 1),
        batch_size=at_least(batch_size, 1 if method == "avb" else 2),
        tolerance=at_least(tolerance, 0),
    )
    if unknown := set(settings) - (known := set(inspect.signature(game).parameters) - {"log_density"}):
        raise UserError(f"{min(unknown)}: is no setting of fit; it has {', '.join(sorted(known))}")
    if start is not None and np.shape(start) != (dim,):
        raise UserError(f"start: has shape {np.shape(start)}, and z has [{dim}]")
    if isinstance(scale, str):
        check_settings(scale=(scale, scale == "nearest", "standard deviations, or 'nearest'"))
    elif scale is not None and (
        np.shape(scale) not in ((), (dim,)) or not np.all((np.asarray(scale) > 0) & np.isfinite(scale))
    ):
        raise UserError(f"scale={scale!r}: must be a positive number, {dim} of them, or 'nearest'")
    played = game(log_density, dim, method=method, steps=steps, **settings)
    center = jnp.zeros(dim) if start is None else jnp.asarray(start, jnp.float32)
    key = stream(jax.random.key(seed), "probe")
    width = 1.0 if scale is None or isinstance(scale, str) else jnp.asarray(scale, jnp.float32)
    probes = jnp.concatenate([center[None], center + width * jax.random.normal(key, (PROBED, dim))])
    check_finite(log_density, probes, "where q starts")

    nothing = np.zeros((batch_size, 0), np.float32)
    callbacks, weighers, watch = [*callbacks, *keepers()], [], None
    if played.gaussian_share:
        sizes = dim, played.noise_dim - dim
        weighers = [Weigher(played.moments, log_density, *sizes, inner) for inner in (INNER, CLOSER)]
        watch = Watch(weighers[0], tolerance, quiet)
        callbacks.append(watch)
    with _named_points(log_density, center, stream(key, "diverged"), watch):
        state = train(
            started(played, center, scale),
            Dataset(nothing, nothing, name="no data"),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            num_seeds=num_seeds,
            workdir=workdir,
            parallel="jit",
            log_every=max(1, min(500, steps // 10)),
            checkpoint_every=max(1, steps // 10),
            callbacks=callbacks + ([] if quiet else [ProgressBar()]),
        )
    state = state if watch is None else watch.best
    states = [state] if num_seeds is None else [of_seed(state, s) for s in range(num_seeds)]
    fits = [_summarised(played, weighers, one, seed) for one in states]
    best = max(fits, key=lambda one: one.bound if one.log_evidence is None else one.log_evidence)
    return dataclasses.replace(best, runs=tuple(fits))


def started(played: Game, at: Array, scale: Array | Sequence[float] | float | str | None) -> Method:
    """The method, whose sampler begins about as N(at [dim], diag scale^2) instead of N(0, I); scale as in `fit`."""

    def init(key: Array, x: Array) -> State:
        state = played.method.init(key, x)
        if scale is None or isinstance(scale, str):
            log_density = functools.partial(played.method.log_joint, state, x)
            less = NEAR * len(at) if scale is None else 0.0
            mean, log_std = _nearest_gaussian(stream(key, "nearest"), log_density, at, less)
        else:
            mean, log_std = at, jnp.broadcast_to(jnp.log(jnp.asarray(scale, jnp.float32)), at.shape)
        begun = {"mean": mean / networks.Sampler.speed, "log_std": log_std / networks.Sampler.speed}
        params, ema = (params._replace(encoder={**params.encoder, **begun}) for params in (state.params, state.ema.params))
        return state._replace(params=params, ema=state.ema._replace(params=ema))

    return played.method._replace(init=init)


def _nearest_gaussian(key: Array, log_density: Callable[[Array], Array], at: Array, less: float) -> tuple[Array, Array]:
    """Mean and log s [dim] of the N(mean, diag s^2) of the largest ELBO for log p~(z) [N], z [N, dim], found from N(at, I).

    With `less` above 0, those of the first Gaussian on the way whose ELBO is at most so many nats below the largest.
    """
    # Slopes fall by orders of magnitude on the way, and a memory of the first ones would stop it: hence b2.
    optimizer = optax.adam(optax.cosine_decay_schedule(NEAREST_RATE, NEAREST_STEPS), b1=0.5, b2=0.9)

    def negative_elbo(moments: tuple[Array, Array], key: Array) -> Array:
        mean, log_std = moments
        z = mean + jnp.exp(log_std) * jax.random.normal(key, (NEAREST_DRAWS, len(at)))
        return -jnp.mean(log_density(z)) - jnp.sum(log_std)

    def step(carry: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], None]:
        moments, state = carry
        loss, gradient = jax.value_and_grad(negative_elbo)(moments, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(moments, updates), state), (moments, -loss)

    begun = at, jnp.zeros_like(at)
    (nearest, _), (passed, elbos) = jax.lax.scan(step, (begun, optimizer.init(begun)), jax.random.split(key, NEAREST_STEPS))
    if not less:
        return nearest
    largest = elbos[-NEAREST_STEPS // 10 :].mean()
    return jax.tree.map(lambda moments: moments[jnp.argmax(elbos >= largest - less)], passed)


@contextlib.contextmanager
def _named_points(log_density: Callable, center: Array, key: Array, watch: Watch | None) -> Iterator[None]:
    """Where a training diverges, says at which point the density is not finite, if one is found, or what to change.

    Where all is finite and there is an earlier State, a warning says so, and that one is to be taken.

    Raises:
      UserError: in the place of `Diverged`.
    """
    try:
        yield
    except Diverged as error:
        normal = jax.random.normal(key, (PROBED, len(center)))
        for scale in (1.0, 3.0, 10.0, 30.0, 100.0):
            check_finite(log_density, center + scale * normal, CAME_BY, without=1.0)
        remedy = "lower sampler_rate, adversary_rate or clip, or give start near the density's bulk"
        what = f"{str(error).partition(';')[0]}; {remedy}"
        if watch is None or watch.best is None:
            raise Diverged(what) from None
        warnings.warn(f"{what}. The fit is that of the best step before", RuntimeWarning, stacklevel=3)


def _summarised(played: Game, weighers: Sequence[Weigher], state: State, seed: int) -> Fit:
    """The fit of one seed's State, weighed by the first that bounds q closely, or by the last."""
    method, key, params = played.method, stream(jax.random.key(seed), "summary"), averaged(state).params.encoder
    found, weigher = {}, None
    for weigher in weighers:
        found = summarise(weigher(params, stream(key, "weigh"), DRAWS))
        if found["elbo_upper"] - found["elbo_lower"] < APART:
            break
    log_ratio = contrast = None
    if played.adversary is not None:
        x = jnp.zeros((DRAWS, 0))
        terms, of_t = jax.jit(lambda: (method.elbo(key, state, x), method.adversary(key, state, x)))()
        found |= {
            "elbo_under_t": float(terms.elbo.mean()),
            "elbo_under_t_error": float(terms.elbo.std(ddof=1) / np.sqrt(DRAWS)),
            "adversary_loss": float(of_t.loss.mean()),
            "adversary_accuracy": float(of_t.accuracy.mean()),
            "kl_contrast": float(of_t.t.mean()),
        }
        posterior = method.encode(jax.random.key(0), state, jnp.zeros((1, 0)))
        contrast = posterior.mean[0], posterior.std[0]
        log_ratio = jax.jit(functools.partial(played.log_ratio, state, *contrast))
    return Fit(
        dim=played.dim,
        noise_dim=played.noise_dim,
        draw=jax.jit(functools.partial(played.draw, params)),
        constrain=lambda z: z,
        diagnostics=Diagnostics(**found),
        method=method,
        state=state,
        adversary=log_ratio,
        contrast=contrast,
        weigh=None if weigher is None else functools.partial(weigher, params),
    )
