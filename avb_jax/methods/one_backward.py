"""The gradients of both sides of the game through one backward pass of T.

T's own loss asks for the gradient of T by its params at all pairs, the encoder's for that by z at the encoder's draws. Where T
at one z depends on no other (`Network.pointwise`), the backward pass for the first has the second in it: what it says of a z is
dT/dz times that pair's share of the loss's gradient, a number, by which it can be divided. In the encoder's loss T is then the
linear function of z that has this value and this slope, with the same gradient. The numbers are those of two passes, up to
rounding; a gradient penalty, which differentiates T twice, has to do without.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from avb_jax import players
from avb_jax.methods import update
from avb_jax.network import Network
from avb_jax.types import AdversaryTerms, Array, Draws, Players, PyTree, State

SMALLEST_SHARE = 1e-25  # to divide by, where a T that is very sure has less; T's params do not move by so little


def _tangent(variables: dict, x: Array, z: Array, *, train: bool) -> tuple[Array, dict]:
    """T [S, B] as a linear function of each z [S, B, Z]."""
    del x, train
    at = variables["params"]
    return at["t"] + jnp.sum(at["slope"] * (z - at["z"]), axis=-1), {}


def _given(variables: dict, x: Array, z: Array, *, train: bool) -> tuple[Array, dict]:
    """T's values, whatever z."""
    del x, z, train
    return variables["params"], {}


GIVEN, TANGENT = (Network(None, apply, shares_x=True) for apply in (_given, _tangent))


def chosen(networks: Players, gradient_penalty: float = 0.0) -> Callable:
    """`of_both` where it applies, else `update.of_both`."""
    if networks.adversary.pointwise and not gradient_penalty:
        return functools.partial(of_both, networks=networks)
    return update.of_both


def of_both(
    loss: Callable, adversary_loss: Callable, state: State, draws: Draws, networks: Players
) -> tuple[Players, PyTree, AdversaryTerms, PyTree]:
    """As `update.of_both` of the same losses.

    Args:
      loss: of encoder and decoder, as there, which takes `networks`.
      adversary_loss: T's, as there, which takes `networks`.
      state: the State before.
      draws: of the step.
      networks: every player's, with a pointwise adversary.
    """
    params, collections = state.params, state.collections
    _, generative = loss(params, params.adversary, collections, draws)  # the compiler shares this forward pass
    compared = jax.lax.stop_gradient(generative.compared)
    z = compared.z.reshape(-1, *compared.z.shape[2:])

    def evaluate(adversary: PyTree, z: Array) -> tuple[Array, PyTree]:
        return players.evaluate_pairs(networks.adversary, adversary, collections.adversary, draws.x, z, train=True)

    def of_values(t: Array) -> tuple[Array, AdversaryTerms]:
        given = networks._replace(adversary=GIVEN)
        value, (terms, _) = adversary_loss(t, collections, draws, compared, networks=given)
        return value, terms

    t, backward, after = jax.vjp(evaluate, params.adversary, z, has_aux=True)
    share, terms = jax.grad(of_values, has_aux=True)(t)
    share = jnp.where(jnp.abs(share) < SMALLEST_SHARE, SMALLEST_SHARE, share)
    of_adversary, of_z = backward(share)
    tangent = {"t": t, "slope": of_z / share[..., None], "z": z}
    of_players, generative = jax.grad(loss, has_aux=True)(
        params._replace(adversary=None), tangent, collections, draws, networks=networks._replace(adversary=TANGENT)
    )
    return of_players._replace(adversary=of_adversary), generative, terms, after
