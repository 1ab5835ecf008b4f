"""The posterior's moments per latent dimension, and which dimensions a model uses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation.examples import map_examples
from avb_jax.players import Model, encode, evaluation_params
from avb_jax.types import Array, Posterior, State

ACTIVE = 0.01  # variance of E[z_u|x] over x above which Burda et al. (2016) call the unit u active


class Moments(NamedTuple):
    """Of q(z|x) per example and latent dimension."""

    mean: Array  # [N, Z]
    variance: Array  # [N, Z]
    mean_error: Array  # [N, Z] sampling variance of `mean`; 0 where the encoder tells its moments


@functools.partial(jax.jit, static_argnames=("model", "binarize", "draws", "chunk"))
def posterior_moments(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 64, chunk: int = 100,
) -> Moments:  # fmt: skip
    """The moments of q(z|x): those that the encoder tells, or else those of some draws.

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

    return map_examples(one, key, images, numbers, binarize, chunk)


@functools.partial(jax.jit, static_argnames=("model", "binarize", "draws", "chunk"))
def posterior_draws(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 1000, chunk: int = 4,
) -> Posterior:  # fmt: skip
    """Draws z [N, draws, Z] from q(z|x), and what the encoder tells: moments [N, Z], log q(z|x) [N, draws].

    Arguments as in `posterior_moments`.
    """
    return map_examples(lambda key, x: _draws(key, state, model, x, draws), key, images, numbers, binarize, chunk)


def activity(moments: Moments) -> np.ndarray:
    """Variance over x of E[z_u|x] per latent [Z], cleared of the sampling error of the means; active above `ACTIVE`."""
    return np.var(moments.mean, axis=0, ddof=1) - np.mean(moments.mean_error, axis=0)


def _draws(key: Array, state: State, model: Model, x: Array, draws: int) -> Posterior:
    """Draws z [draws, Z] for one x, the moments [Z], and log q(z|x) [draws]."""
    noise = jax.random.normal(key, (draws, 1, model.noise_dim))
    params, stats = evaluation_params(state).encoder, state.batch_stats.encoder
    posterior, _ = encode(model, params, stats, x[None], noise, train=False)
    mean, std = (None if moment is None else moment[0] for moment in (posterior.mean, posterior.std))
    return Posterior(posterior.z[:, 0], mean, std, None if posterior.log_q is None else posterior.log_q[:, 0])
