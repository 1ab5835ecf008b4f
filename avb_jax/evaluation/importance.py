"""Log-likelihood by importance sampling: a number that takes nobody's word for the KL."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.distributions import normal_log_prob
from avb_jax.players import Model, decode, encode, evaluation_params
from avb_jax.types import Array, State


class ImportanceEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] log-mean weight, nats: a stochastic lower bound on log p(x) (Burda et al. 2016)
    effective_sample_size: Array  # [N] in [1, samples]; near 1 the bound is loose


@functools.partial(jax.jit, static_argnames=("model", "binarize", "samples", "fit_draws", "inflation", "chunk"))
def log_likelihood(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, binarize: str = "none", samples: int = 256,
    fit_draws: int = 64, inflation: float = 1.2, chunk: int = 20,
) -> ImportanceEstimate:
    """Bounds log p(x) of each example from below with a Gaussian proposal fitted to the encoder's draws.

    An implicit q(z|x) has no density to weigh by, so the proposal is N(mean, diag (inflation std)^2) of `fit_draws`
    draws from it; the bound holds whatever the proposal, and is tight where it covers the posterior.

    Args:
      key: randomness; every example has its own, so that `chunk` changes nothing but memory.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      model: the method's model.
      binarize: see `data.dataset.to_pixels`; the same key gives the same binary images to every method.
      samples: importance samples per example.
      fit_draws: draws that the proposal is fitted to.
      inflation: of the proposal's standard deviation, to cover the tails.
      chunk: examples at once.
    """
    params, stats = evaluation_params(state), state.batch_stats

    def one(example: tuple[Array, Array]) -> ImportanceEstimate:
        number, image = example
        data_key, fit_key, sample_key = jax.random.split(jax.random.fold_in(key, number), 3)
        x = to_pixels(data_key, image, binarize)
        noise = jax.random.normal(fit_key, (fit_draws, model.noise_dim))
        many = jnp.broadcast_to(x, (fit_draws, *x.shape))
        draws = encode(model, params.encoder, stats.encoder, many, noise, train=False)[0].z
        mean, std = draws.mean(axis=0), inflation * draws.std(axis=0) + 1e-4
        z = mean + std * jax.random.normal(sample_key, (samples, model.prior.dim))
        output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
        log_p = model.likelihood.log_prob(output, jnp.broadcast_to(x, (samples, *x.shape))) + model.prior.log_prob(z)
        log_weight = log_p - jnp.sum(normal_log_prob(z, mean, jnp.log(std)), axis=-1)
        normaliser = jax.nn.logsumexp(log_weight)
        effective = jnp.exp(2.0 * normaliser - jax.nn.logsumexp(2.0 * log_weight))
        return ImportanceEstimate(normaliser - jnp.log(samples), effective)

    images = jnp.asarray(images)
    return jax.lax.map(one, (jnp.arange(len(images)), images), batch_size=min(chunk, len(images)))
