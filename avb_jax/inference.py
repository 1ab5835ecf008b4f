"""AVB for a density that the user gives, without a data set.

(Mescheder, Nowozin & Geiger 2017, the later version: eight schools.) A sampler z = enc(eps) maximises
E_q[log p~(z) - T(z) - log r(z)], T standing in for log q(z) - log r(z) under adaptive contrast: where T is optimal, a lower
bound on the log of the integral of p~. It is the game of `objectives` with one empty example x, and with log p~(z) - log p(z)
in the place of log p(x|z).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from avb_jax import data, networks, objectives, players
from avb_jax.distributions import StandardNormal
from avb_jax.loop import fit as train
from avb_jax.methods import avb
from avb_jax.objectives import Said
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import Array, Players, PyTree, State, Terms, UserError

PAIRS = 20_000  # draws behind `Fit.bound` and its diagnostics


@dataclasses.dataclass(frozen=True)
class Density:
    """The user's log p~(z), as a likelihood beside the prior that `objectives` has: log p~(z) - log p(z)."""

    log_density: Callable[[Array], Array]
    prior: StandardNormal

    parameters = 1

    def log_prob(self, output: Array, x: Array) -> Array:
        """Log p~(z) - log p(z) [B] in nats, from output z [B, Z, 1]."""
        del x
        z = output[..., 0]
        return jax.vmap(self.log_density)(z) - self.prior.log_prob(z)

    def mean(self, output: Array) -> Array:
        """The latents themselves [B, Z]."""
        return output[..., 0]


class _Identity(nn.Module):
    """Decodes z to itself."""

    @nn.compact
    def __call__(self, z: Array) -> Array:
        return z[..., None]


class _Adversary(nn.Module):
    """T(z) = f(z) + |z|^2 / 2 at z as r standardises it: T + log r, which the sampler is trained on, is f up to a constant.

    Where q has few draws nothing teaches f, and it goes on about linearly. Were T itself the network, the sampler would
    there be rewarded by -log r, which rises as a square: the arms of the tests' banana grew too long.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        return networks.LatentAdversary(self.widths, name="log_q")(x, z) + 0.5 * jnp.sum(jnp.square(z), axis=-1)


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
    model: Model


def fit(
    log_density: Callable[[Array], Array], dim: int, *, steps: int = 10_000, batch_size: int = 512, seed: int = 0,
    noise_dim: int = 16, widths: Sequence[int] = (128, 128), gaussian_share: float = 0.05,
    adversary_widths: Sequence[int] = (256, 256), adversary_steps: int = 2, sampler_rate: float = 2e-4,
    adversary_rate: float = 1e-3, clip: float = 10.0, workdir: str | pathlib.Path | None = None, quiet: bool = False,
) -> Fit:  # fmt: skip
    """Fits an implicit q(z) to a density by AVB with adaptive contrast.

    Args:
      log_density: z [dim] -> log p~(z) [], up to a constant, differentiable, over all of R^dim.
      dim: of z.
      steps: of training; both rates fall to 0 along a cosine.
      batch_size: draws of z per step.
      seed: of everything random.
      noise_dim: noise numbers that the sampler's network sees beside `dim` others, which also enter linearly; with `dim` more,
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
      Interrupted: as `loop.fit`.
    """
    at_least_1 = {"dim": dim, "steps": steps, "batch_size": batch_size, "adversary_steps": adversary_steps}
    above_0 = {"sampler_rate": sampler_rate, "adversary_rate": adversary_rate, "clip": clip}
    checks = [(field, value, value >= 1, "at least 1") for field, value in at_least_1.items()]
    checks += [(field, value, value > 0, "above 0") for field, value in above_0.items()]
    checks += [
        ("noise_dim", noise_dim, noise_dim >= 0, "at least 0"),
        ("gaussian_share", gaussian_share, 0 <= gaussian_share <= 1, "in [0, 1]"),
    ]
    for field, value, holds, remedy in checks:
        if not holds:
            raise UserError(f"{field}={value}: must be {remedy}")
    there = jax.eval_shape(log_density, jnp.zeros(dim))
    if getattr(there, "shape", None) != ():
        raise UserError(f"log_density: returned {there} at z [{dim}]; it must return one number for one z")
    if not np.isfinite(log_density(jnp.zeros(dim))):
        raise UserError("log_density: is not finite at z = 0; shift z, or give a density over all of R^dim")
    prior = StandardNormal(dim)
    sampler, adversary = networks.Sampler(dim, tuple(widths), gaussian_share), _Adversary(tuple(adversary_widths))
    model = Model(
        Players(sampler, _Identity(), adversary), prior, Density(log_density, prior),
        noise_dim=2 * dim + noise_dim, adversary_steps=adversary_steps, contrast="adaptive", ema_decay=0.999,
    )  # fmt: skip

    def adam(rate: float, updates: int) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(clip), optax.adam(optax.cosine_decay_schedule(rate, updates), b1=0.5))

    optimizers = Players(adam(sampler_rate, steps), optax.identity(), adam(adversary_rate, adversary_steps * steps))
    nothing = data.from_arrays(np.zeros((batch_size, dim), np.float32), name="no data")
    states = train(
        avb, model, optimizers, nothing, steps=steps, batch_size=batch_size, seed=seed, workdir=workdir, quiet=quiet,
        mode="jit", log_every=max(1, min(500, steps)), checkpoint_every=max(1, steps // 5),
    )  # fmt: skip
    return _summarise(jax.tree.map(lambda a: a[0], states), model, seed)


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
      UserError: NumPyro is missing, or the model has discrete latent sites.
    """
    try:
        from numpyro import handlers
        from numpyro.infer.util import initialize_model
    except ImportError:
        raise UserError("fit_numpyro: NumPyro is not installed; pip install 'avb_jax[numpyro]'") from None
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


def _summarise(state: State, model: Model, seed: int) -> Fit:
    dim, (params, stats) = model.prior.dim, players.evaluation_variables(state)
    key = stream(jax.random.key(seed), "summary")

    @jax.jit
    def judge(params: Players) -> tuple[Terms, Said]:
        draws = players.draw(key, model, jnp.zeros((PAIRS, dim)))
        _, (terms, z, _) = objectives.negative_elbo_adversarial(
            params, params.adversary, stats, draws, model=model, train=False
        )
        _, (said, _) = objectives.adversary_loss(params.adversary, stats, draws, z, model=model, train=False)
        return terms, said

    terms, said = jax.device_get(judge(params))
    nothing = jnp.zeros((1, dim)), jnp.zeros((1, model.noise_dim))
    posterior, _ = players.encode(model, params.encoder, {}, *nothing, train=False)
    mean, std = posterior.mean[0], posterior.std[0]

    @jax.jit
    def adversary(z: Array) -> Array:
        z = (z - mean) / std
        t, _ = players.discriminate(model, params.adversary, {}, jnp.zeros((len(z), dim)), z[None], train=False)
        return t[0]

    def unconstrained(key: Array, count: int) -> Array:
        return avb.sample_posterior(key, state, model, jnp.zeros((count, dim)))

    diagnostics = Diagnostics(float(said.loss.mean()), float(said.accuracy.mean()), float(said.t.mean()))
    error = float(terms.elbo.std(ddof=1) / np.sqrt(PAIRS))
    return Fit(unconstrained, unconstrained, float(terms.elbo.mean()), error, diagnostics, adversary, (mean, std), state, model)
