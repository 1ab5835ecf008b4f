"""The posterior's moments per latent dimension, and which dimensions a model uses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.distributions import normal_kl
from avb_jax.evaluation.examples import map_examples
from avb_jax.players import Model, encode, evaluation_variables
from avb_jax.types import Array, Posterior, State

ACTIVE = 0.01  # variance of E[z_u|x] over x above which Burda et al. (2016) call the unit u active


class Moments(NamedTuple):
    """Of q(z|x) per example and latent dimension."""

    mean: Array  # [N, Z]
    variance: Array  # [N, Z]
    mean_error: Array  # [N, Z] sampling variance of `mean`; 0 where the encoder gives its moments


class PosteriorDraws(NamedTuple):
    """Of q(z|x) per example."""

    z: Array  # [N, draws, Z]
    kl: Array | None  # [N] KL(q(z|x), N(0, I)) in nats, exact, where the encoder says that q is Gaussian


@functools.partial(jax.jit, static_argnames=("model", "binarize", "draws", "chunk"))
def posterior_moments(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 64, chunk: int = 100,
) -> Moments:  # fmt: skip
    """The moments of q(z|x): those that the encoder gives, or else those of some draws.

    Args:
      key: randomness, see `examples.map_examples`.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      model: the method's model.
      numbers: [N] which examples they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      draws: posterior draws per example, at least 2.
      chunk: examples at once.
    """

    def one(key: Array, x: Array) -> Moments:
        posterior = _draws(key, state, model, x, draws)
        z = posterior.z
        if posterior.mean is not None and posterior.std is not None:
            return Moments(posterior.mean, jnp.square(posterior.std), jnp.zeros_like(posterior.mean))
        variance = z.var(axis=0, ddof=1)
        return Moments(z.mean(axis=0), variance, variance / draws)

    return map_examples("moments", one, key, images, numbers, binarize, chunk)


@functools.partial(jax.jit, static_argnames=("model", "binarize", "draws", "chunk", "name"))
def posterior_draws(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 1000, chunk: int = 4, name: str = "draws",
) -> PosteriorDraws:  # fmt: skip
    """Draws z from q(z|x); arguments as in `posterior_moments`, and draws under another `name` are others."""

    def one(key: Array, x: Array) -> PosteriorDraws:
        posterior = _draws(key, state, model, x, draws)
        return PosteriorDraws(posterior.z, normal_kl(posterior.mean, posterior.std) if posterior.gaussian else None)

    return map_examples(name, one, key, images, numbers, binarize, chunk)


def activity(moments: Moments) -> np.ndarray:
    """Variance over x of E[z_u|x] per latent [Z], cleared of the sampling error of the means; active above `ACTIVE`."""
    return np.var(moments.mean, axis=0, ddof=1) - np.mean(moments.mean_error, axis=0)


def _draws(key: Array, state: State, model: Model, x: Array, draws: int) -> Posterior:
    """Draws z [draws, Z] for one x, and the moments [Z]."""
    noise = jax.random.normal(key, (draws, 1, model.noise_dim))
    params, stats = evaluation_variables(state)
    posterior, _ = encode(model, params.encoder, stats.encoder, x[None], noise, train=False)
    mean, std = (None if moment is None else moment[0] for moment in (posterior.mean, posterior.std))
    return posterior.replace(z=posterior.z[:, 0], mean=mean, std=std, log_q=None)
