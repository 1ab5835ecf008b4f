"""Integrals over latents of 1 to 3 dimensions on a regular grid: exact up to the grid's spacing."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.distributions import StandardNormal, normal_log_prob
from avb_jax.evaluation.examples import map_examples
from avb_jax.players import Model, check_likelihood, decode, evaluation_variables
from avb_jax.types import Array, State, UserError

POINTS = {1: 4000, 2: 600, 3: 80}  # per dimension, by the number of dimensions
HALF_WIDTH = 6.0  # a standard normal leaves 2e-9 outside, in each dimension


def grid(dim: int, points: int | None = None, half_width: float = HALF_WIDTH) -> tuple[Array, float]:
    """Centres [points^dim, dim] of the cells of a cube around 0, and the log volume of a cell.

    Raises:
      UserError: more than 3 dimensions.
    """
    if dim not in POINTS:
        raise UserError(f"latent_dim={dim}: quadrature serves 1 to 3 latents; use an estimator that samples")
    points = points or POINTS[dim]
    spacing = 2.0 * half_width / points
    axis = (jnp.arange(points) + 0.5) * spacing - half_width
    return jnp.stack(jnp.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).reshape(-1, dim), dim * math.log(spacing)


def log_integral(
    log_prob: Callable[[Array], Array], prior: StandardNormal, points: int | None = None, chunk: int = 20_000
) -> tuple[Array, Array]:
    """The log of the integral of p(z) p(x|z) [N] in nats, and the largest share [N] that one cell of the grid has in it.

    Args:
      log_prob: z [G, Z] -> log p(x|z) [G, N] of the N examples at each z.
      prior: p(z).
      points: of the grid per dimension.
      chunk: grid points held at once.

    Raises:
      UserError: more than 3 latents.
    """
    z, log_volume = grid(prior.dim, points)

    def part_of_integral(part: Array) -> tuple[Array, Array]:
        log_density = prior.log_prob(part)[:, None] + log_prob(part)
        return jax.nn.logsumexp(log_density, axis=0), jnp.max(log_density, axis=0)

    total, largest = jax.lax.map(part_of_integral, _chunks(z, chunk))
    total = jax.nn.logsumexp(total, axis=0)
    return total + log_volume, jnp.exp(jnp.max(largest, axis=0) - total)


class QuadratureEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] log p(x), nats
    largest_share: Array  # [N] of one cell in p(x): above about 0.3 the posterior is too narrow for the grid


@functools.partial(jax.jit, static_argnames=("model", "binarize", "points", "chunk"))
def log_likelihood(
    key: Array, state: State, images: Array | np.ndarray, *, model: Model, numbers: Array | None = None,
    binarize: str = "none", points: int | None = None, chunk: int = 2000,
) -> QuadratureEstimate:  # fmt: skip
    """Log p(x) of each example, for a model of 1 to 3 latents.

    Args:
      key: randomness of the binarisation alone, see `examples.map_examples`.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      model: the method's model.
      numbers: [N] which examples they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      points: of the grid per dimension.
      chunk: grid points decoded at once.

    Raises:
      UserError: more than 3 latents, or a model without a likelihood.
    """
    check_likelihood(model)
    x = map_examples("quadrature", lambda key, x: x, key, images, numbers, binarize, chunk)
    params, stats = evaluation_variables(state)

    def log_prob(z: Array) -> Array:
        output, _ = decode(model, params.decoder, stats.decoder, z, train=False)
        of_all = jax.lax.map(lambda x: model.likelihood.log_prob(output, jnp.broadcast_to(x, (len(z), *x.shape))), x)
        return of_all.T

    return QuadratureEstimate(*log_integral(log_prob, model.prior, points, chunk))


def mixture_kl(mean: Array, std: Array, prior: StandardNormal, points: int | None = None, chunk: int = 20_000) -> Array:
    """KL(q(z), p(z)) [] in nats for q(z) the equal mixture of N(mean[n], diag std[n]^2), from [N, Z].

    The aggregated posterior of a VAE on N data points is of this form.

    Raises:
      UserError: more than 3 latents.
    """
    half_width = HALF_WIDTH + 2.0
    z, log_volume = grid(prior.dim, points, half_width)

    def part_of_kl(part: Array) -> Array:
        components = jnp.sum(normal_log_prob(part[:, None], mean, jnp.log(std)), axis=-1)
        log_q = jax.nn.logsumexp(components, axis=1) - jnp.log(len(mean))
        return jnp.sum(jnp.exp(log_q + log_volume) * (log_q - prior.log_prob(part)))

    return jnp.sum(jax.lax.map(part_of_kl, _chunks(z, chunk)))


def _chunks(z: Array, chunk: int) -> Array:
    """[G, Z] -> [G / c, c, Z] with c the largest divisor of G that `chunk` allows."""
    size = next(c for c in range(min(chunk, len(z)), 0, -1) if len(z) % c == 0)
    return z.reshape(-1, size, z.shape[1])
