"""What methods with a decoder, and perhaps an encoder, can do once trained, whatever they were trained by."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood, log_likelihood
from avb_jax.models import images_of
from avb_jax.network import Network, call
from avb_jax.priors import at
from avb_jax.streams import stream
from avb_jax.types import Array, Players, Posterior, PyTree, State, UserError


def decode(
    network: Network, likelihood: Likelihood, params: PyTree, collections: dict, z: Array, *, train: bool
) -> tuple[Distribution, dict]:
    """The distribution p(x|z) of each code z [B, Z], and the decoder's new collections."""
    output, collections = call(network, params, collections, z, train=train)
    return likelihood(output), collections


def reconstruction(
    network: Network, likelihood: Likelihood, params: PyTree, collections: dict, x: Array, z: Array, *, train: bool
) -> tuple[Array, dict]:
    """-log p(x|z) [S, B] of x [B, ...] and codes z [S, B, Z], all decoded together, and the decoder's new collections."""
    of_x, collections = decode(network, likelihood, params, collections, z.reshape(-1, z.shape[-1]), train=train)
    x = jnp.broadcast_to(x, (len(z), *x.shape)).reshape(-1, *x.shape[1:])
    return -log_likelihood(of_x, x).reshape(z.shape[:-1]), collections


def capabilities(
    networks: Players, prior: Distribution, likelihood: Likelihood, noise_dim: int | None = None, *, density: bool = True
) -> dict[str, Callable | Distribution | bool]:
    """The fields of a `Method` that follow from its networks and distributions alone, all in evaluation mode.

    Args:
      networks: of which the encoder may be None.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      noise_dim: the encoder's.
      density: whether p(x|z) has one; without, there is no `log_joint`.
    """

    def of_codes(state: State, z: Array) -> Distribution:
        return decode(networks.decoder, likelihood, state.params.decoder, state.collections.decoder, z, train=False)[0]

    def prior_of(state: State) -> Distribution:
        return at(prior, networks, state.params, state.collections)

    def sample(key: Array, state: State, count: int) -> Array:
        return images_of(stream(key, "images"), of_codes(state, prior_of(state).sample(key, (count,))))

    def log_joint(state: State, x: Array, z: Array) -> Array:
        return log_likelihood(of_codes(state, z), x) + prior_of(state).log_prob(z)

    fields = {"sample": sample, "prior": prior, "prior_of": prior_of, "decode": of_codes}
    fields |= {"log_joint": log_joint} if density else {}
    if networks.encoder is not None:
        fields["encode"] = posterior_of(networks.encoder, noise_dim, prior.event_shape[0])
        fields["semi_implicit"] = networks.encoder.semi_implicit
        fields["bounds_kl"] = networks.encoder.semi_implicit or networks.encoder.bounds_log_q
    return fields


def posterior_of(encoder: Network, noise_dim: int, latent_dim: int) -> Callable:
    """The function (key, state, x [B, ...], draws=None) -> `Posterior`, with z [B, Z] or [draws, B, Z]; in evaluation mode."""

    def encode(key: Array, state: State, x: Array, draws: int | None = None) -> Posterior:
        shape = (x.shape[0], noise_dim) if draws is None else (draws, x.shape[0], noise_dim)
        noise = jax.random.normal(key, shape)
        return players.encode(encoder, state.params.encoder, state.collections.encoder, x, noise, latent_dim, train=False)[0]

    return encode


def for_each(optimizers: Players | optax.GradientTransformation) -> Players:
    """An optimiser per player, where one for all may have been given.

    Raises:
      UserError: something that is no optimiser.
    """
    found = optimizers if isinstance(optimizers, Players) else Players(optimizers, optimizers, optimizers)
    for player, optimizer in found._asdict().items():
        if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            which = f".{player}" if isinstance(optimizers, Players) else ""
            raise UserError(
                f"optimizers{which}={type(optimizer).__name__}: give an optax optimiser for all, or avb_jax.Players of one each"
            )
    return found
