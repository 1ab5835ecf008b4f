"""What every per-example estimator shares: randomness of an example's own, chunks of examples, weights summed up."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.streams import stream
from avb_jax.types import Array, PyTree

# Of matrix products. By default GPUs take TF32 and TPUs bfloat16, whose rounding adds up over hundreds of pixels.
PRECISION = "float32"


def map_examples(
    name: str,
    one: Callable[[Array, Array], PyTree],
    key: Array,
    images: Array | np.ndarray,
    numbers: Array | None,
    binarize: str,
    chunk: int,
) -> PyTree:
    """`one(key, x [*x])` of every example, stacked to [N, ...].

    An example's randomness follows from the key, its number and the estimator's name alone. So `chunk`, how the examples are
    cut into calls, and how they are spread over devices change memory and speed, not results; and with one key and `binarize`,
    every estimator and every model sees the same binary images, while what they draw is their own.

    Args:
      name: of the estimator, and of its random stream.
      one: an estimator for one example.
      key: of the whole data set.
      images: [N, ...] as a `Dataset` stores them.
      numbers: [N] which examples of the data set they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      chunk: examples at once.
    """

    def numbered(example: tuple[Array, Array]) -> PyTree:
        pixels_key, own_key = (jax.random.fold_in(stream(key, use), example[0]) for use in ("pixels", name))
        return one(own_key, to_pixels(pixels_key, example[1], binarize))

    images = jnp.asarray(images)
    numbers = jnp.arange(len(images)) if numbers is None else numbers
    return jax.lax.map(numbered, (numbers, images), batch_size=min(chunk, len(images)))


class WeightedEstimate(NamedTuple):
    """What K log weights of one unbiased estimate say, in nats."""

    log_mean: Array  # [] log of the mean weight: by Jensen's inequality a lower bound in expectation
    standard_error: Array  # [] of log_mean, by the delta method; not a number of a single weight
    effective_sample_size: Array  # [] (sum w)^2 / sum w^2 in [1, K]; near 1 neither number above can be trusted


def sum_up(log_weight: Array) -> WeightedEstimate:
    """The log-mean of weights [K], with its standard error."""
    count = log_weight.shape[0]
    total = jax.nn.logsumexp(log_weight)
    size = jnp.exp(2.0 * total - jax.nn.logsumexp(2.0 * log_weight))
    relative_variance = jnp.maximum(count / size - 1.0, 0.0) / (count - 1) if count > 1 else jnp.nan  # of the mean weight
    return WeightedEstimate(total - jnp.log(count), jnp.sqrt(relative_variance), size)


def pareto_k(log_weight: Array) -> Array:
    """The shape k [] of a generalised Pareto distribution fitted to the largest of K weights: how heavy their tail is.

    Weights have a mean for k < 1 and a variance for k < 1/2; up to 0.7 their mean converges at a rate that is of use (Vehtari
    et al. 2024). By the estimator of Zhang & Stephens (2009), drawn towards 1/2 with the weight of ten weights; not a number
    for fewer than 25 of them.
    """
    count = len(log_weight)
    tail = min(count // 5, math.ceil(3.0 * math.sqrt(count)))
    if tail < 5:
        return jnp.float32(jnp.nan)
    ordered = jnp.sort(log_weight)
    weights = jnp.exp(ordered - ordered[-1])
    excess = weights[-tail:] - weights[-tail - 1]  # ascending, over the largest weight that is not of the tail
    grid = 30 + math.isqrt(tail)
    quarter = excess[int(tail / 4 + 0.5) - 1]
    theta = 1.0 / excess[-1] + (1.0 - jnp.sqrt(grid / (jnp.arange(1, grid + 1) - 0.5))) / (3.0 * quarter)
    k = jnp.log1p(-theta[:, None] * excess).mean(axis=1)
    likelihood = tail * (jnp.log(-theta / k) - k - 1.0)
    theta = jnp.sum(jax.nn.softmax(likelihood) * theta)
    k = jnp.log1p(-theta * excess).mean()
    return (tail * k + 10 * 0.5) / (tail + 10)
