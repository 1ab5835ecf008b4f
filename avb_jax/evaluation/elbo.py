"""The ELBO on given examples, by Monte Carlo over the posterior's draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation.examples import map_examples
from avb_jax.players import Model
from avb_jax.types import Array, State, Terms


@functools.partial(jax.jit, static_argnames=("method", "model", "binarize", "draws", "chunk"))
def elbo_terms(
    key: Array, state: State, images: Array | np.ndarray, *, method, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 1, chunk: int = 500,
) -> Terms:  # fmt: skip
    """The ELBO's terms per example [N] in nats, averaged over `draws` posterior draws each.

    Under AVB the KL term is T's estimate: no bound, and only as good as T.

    Args:
      key: randomness of the draws and of the binarisation, see `examples.map_examples`.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      method: a module of `avb_jax.methods`.
      model: the method's model.
      numbers: [N] which examples they are; the first N where it is None.
      binarize: see `data.dataset.to_pixels`.
      draws: posterior draws per example.
      chunk: examples at once.
    """

    def one(key: Array, x: Array) -> Terms:
        terms = jax.vmap(lambda k: method.elbo_terms(k, state, x[None], model=model))(jax.random.split(key, draws))
        return jax.tree.map(jnp.mean, terms)

    return map_examples(one, key, images, numbers, binarize, chunk)
