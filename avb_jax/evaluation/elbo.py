"""The ELBO on given examples, by Monte Carlo over the posterior's draws."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation.examples import map_examples
from avb_jax.players import Model
from avb_jax.types import Array, State


class ElboEstimate(NamedTuple):
    """Per example, in nats."""

    reconstruction: Array  # [N] -log p(x|z)
    kl: Array  # [N] KL(q(z|x), p(z)): in closed form, or T's estimate of it
    standard_error: Array  # [N] of elbo, from the spread of the draws; not a number where there is one draw

    @property
    def elbo(self) -> Array:
        """The evidence lower bound [N]."""
        return -self.reconstruction - self.kl


@functools.partial(jax.jit, static_argnames=("method", "model", "binarize", "draws", "chunk"))
def elbo_terms(
    key: Array, state: State, images: Array | np.ndarray, *, method, model: Model, numbers: Array | None = None,
    binarize: str = "none", draws: int = 1, chunk: int = 500,
) -> ElboEstimate:  # fmt: skip
    """The ELBO's terms per example, averaged over `draws` posterior draws each.

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

    def one(key: Array, x: Array) -> ElboEstimate:
        terms = jax.vmap(lambda k: method.elbo_terms(k, state, x[None], model=model))(jax.random.split(key, draws))
        spread = jnp.std(terms.elbo, ddof=1) if draws > 1 else jnp.nan
        return ElboEstimate(terms.reconstruction.mean(), terms.kl.mean(), spread / jnp.sqrt(draws))

    return map_examples("elbo", one, key, images, numbers, binarize, chunk)
