"""What every per-example estimator shares: randomness of an example's own, chunks of examples, weights summed up."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.streams import stream
from avb_jax.types import Array, PyTree


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
    standard_error: Array  # [] of log_mean, by the delta method
    effective_sample_size: Array  # [] (sum w)^2 / sum w^2 in [1, K]; near 1 neither number above can be trusted


def sum_up(log_weight: Array) -> WeightedEstimate:
    """The log-mean of weights [K], with its standard error."""
    count = log_weight.shape[0]
    total = jax.nn.logsumexp(log_weight)
    size = jnp.exp(2.0 * total - jax.nn.logsumexp(2.0 * log_weight))
    relative_variance = jnp.maximum(count / size - 1.0, 0.0) / max(count - 1, 1)  # of the mean weight
    return WeightedEstimate(total - jnp.log(count), jnp.sqrt(relative_variance), size)
