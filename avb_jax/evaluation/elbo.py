"""The ELBO on given examples, by Monte Carlo over the posterior's draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.players import Model
from avb_jax.types import Array, State, Terms


@functools.partial(jax.jit, static_argnames=("method", "model", "binarize", "draws", "chunk"))
def elbo_terms(
    key: Array, state: State, images: Array | np.ndarray, *, method, model: Model, binarize: str = "none", draws: int = 1,
    chunk: int = 500,
) -> Terms:
    """The ELBO's terms per example [N] in nats, averaged over `draws` posterior draws each.

    Under AVB the KL term is T's estimate: no bound, and only as good as T. Every example has randomness of its own, so
    that `chunk`, how many examples are held at once, changes nothing but memory.

    Args:
      key: randomness of the draws and of the binarisation.
      state: one run's, without a leading axis of seeds.
      images: [N, ...] as a `Dataset` stores them.
      method: a module of `avb_jax.methods`.
      model: the method's model.
      binarize: see `data.dataset.to_pixels`.
      draws: posterior draws per example.
      chunk: examples at once.
    """

    def one(example: tuple[Array, Array]) -> Terms:
        number, image = example
        data_key, draws_key = jax.random.split(jax.random.fold_in(key, number))
        x = to_pixels(data_key, image, binarize)[None]
        draw_keys = jax.random.split(draws_key, draws)
        terms = jax.vmap(lambda k: method.elbo_terms(k, state, x, model=model))(draw_keys)
        return jax.tree.map(jnp.mean, terms)

    images = jnp.asarray(images)
    return jax.lax.map(one, (jnp.arange(len(images)), images), batch_size=min(chunk, len(images)))
