"""Models of x with a likelihood of their own and no latents: PixelCNN, PixelRNN, real NVP; maximum likelihood.

What the paper sets out from (van den Oord et al. 2016; Dinh et al. 2016), as rows of the same comparison: log p(x) is exact, or
of whole numbers under a density bounded from below by dequantisation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from avb_jax import players
from avb_jax.distributions import Likelihood, log_likelihood, standard_normal
from avb_jax.method import Method, identity
from avb_jax.methods import generator
from avb_jax.methods.update import apply_gradients, mean_collections
from avb_jax.models import images_of
from avb_jax.settings import check_settings
from avb_jax.streams import stream
from avb_jax.types import Array, Players, PyTree, State


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats."""

    log_likelihood: Array


def explicit(
    model: Any,
    *,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    levels: int | None = None,
    name: str = "explicit",
) -> Method:
    """A model of x by maximum likelihood.

    Args:
      model: z [B, 0] -> what `likelihood` takes, such as a `networks.ModelDecoder` without a trunk.
      likelihood: its output -> p(x), with batch shape [B], such as `models.autoregressive` or `models.flow` make.
      optimizers: an optax optimiser per player, of which the decoder's is used, or one.
      levels: of a density, how many values x has in [0, 1]: 2, 256. It is then trained on (x (levels - 1) + U(0, 1)) / levels,
        and log p(x) of x itself is on average at least its density's logarithm less D log levels (Uria et al. 2013; Theis et
        al. 2016). None: x is as it is.
      name: of the method.

    Returns:
      A `Method` with a `log_likelihood` and no latents.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the model's output"),
        levels=(levels, levels is None or levels >= 2, "None, or at least 2"),
    )
    optimizers, no_latents = generator.for_each(optimizers), standard_normal(0)
    networks = players.prepare(Players(None, model), optimizers, no_latents, ("decoder",))

    def of_x(params: PyTree, collections: dict, count: int, train: bool) -> tuple:
        z = jnp.zeros((count, 0))
        return generator.decode(networks.decoder, likelihood, params, collections, z, train=train)

    def loss(params: PyTree, collections: dict, key: Array, x: Array, train: bool) -> tuple[Array, tuple[Array, dict]]:
        found, after = of_x(params, collections, len(x), train)
        if levels is None:
            log_p = log_likelihood(found, x)
        else:
            noise = jax.random.uniform(key, x.shape)
            log_p = found.log_prob((x * (levels - 1) + noise) / levels) - math.prod(x.shape[1:]) * math.log(levels)
        return -jnp.mean(log_p), (log_p, after)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, no_latents, 1, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        gradient, (log_p, after) = jax.grad(loss, has_aux=True)(
            state.params.decoder, state.collections.decoder, stream(key, "dequantise"), x, True
        )
        after = state.collections._replace(decoder=mean_collections(reduce, after))
        state = apply_gradients(state._replace(collections=after), reduce(Players(decoder=gradient)), optimizers)
        return state._replace(step=state.step + 1), Info(log_p)

    def decode(state: State, z: Array):
        return of_x(state.params.decoder, state.collections.decoder, len(z), False)[0]

    def sample(key: Array, state: State, count: int) -> Array:
        x = images_of(key, decode(state, jnp.zeros((count, 0))))
        return x if levels is None else jnp.minimum(jnp.floor(x * levels), levels - 1.0) / (levels - 1)

    def log_p(key: Array, state: State, x: Array) -> Array:
        return loss(state.params.decoder, state.collections.decoder, key, x, False)[1][0]

    return Method(name, init, train_step, sample, decode=decode, log_likelihood=log_p)
