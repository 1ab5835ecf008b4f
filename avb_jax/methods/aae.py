"""The adversarial autoencoder (Makhzani et al. 2015; section 5.2): AVB with a T that sees z alone.

T* = log q(z) - log p(z) of the aggregated posterior q(z), eq. 5.4: what is minimised is E[-log p(x|z)] + KL(q(z), p(z)), less
than the negative ELBO by the mutual information I(x; z), and no bound on anything. Whatever the adversary's network, it gets
x = 0 (`networks.LatentAdversary` needs none).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import divergences
from avb_jax.distributions import Likelihood
from avb_jax.method import Method, identity
from avb_jax.methods.avb import avb
from avb_jax.network import Network, as_network
from avb_jax.types import AdversaryTerms, Array, Players, State


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats unless said otherwise."""

    reconstruction: Array  # -log p(x|z)
    kl_aggregated_posterior: Array  # T(z), an estimate of KL(q(z), p(z))
    beta: Array  # [] weight of that term in this step
    adversary_loss: Array
    adversary_accuracy: Array
    adversary_saturation: Array


def aae(
    encoder: Any,
    decoder: Any,
    adversary: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    divergence: Callable = divergences.jensen_shannon,
    adversary_floor: float | None = None,
    adversary_steps: int = 1,
    gradient_penalty: float = 0.0,
    noise_draws: int = 1,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """The adversarial autoencoder; arguments as of `avb`, but that the adversary is given x = 0."""
    inner = avb(
        encoder,
        decoder,
        _blind(adversary),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        divergence=divergence,
        adversary_floor=adversary_floor,
        adversary_steps=adversary_steps,
        gradient_penalty=gradient_penalty,
        noise_draws=noise_draws,
        beta=beta,
        beta_warmup=beta_warmup,
    )

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        state, info = inner.train_step(key, state, x, reduce)
        return state, Info(
            info.reconstruction, info.kl, info.beta, info.adversary_loss, info.adversary_accuracy, info.adversary_saturation
        )

    def adversary_of_z(key: Array, state: State, x: Array, draws: int = 1) -> AdversaryTerms:
        return inner.adversary(key, state, x, draws)._replace(kl=None)  # T says nothing of q(z|x)

    def fresh_adversary(optimizer: optax.GradientTransformation, state: State) -> Method:
        return inner.fresh_adversary(optimizer, state)._replace(elbo=None, adversary=adversary_of_z)

    return inner._replace(
        name="aae", train_step=train_step, elbo=None, adversary=adversary_of_z, fresh_adversary=fresh_adversary
    )


def _blind(adversary: Any) -> Network | None:
    """The adversary with x = 0 in the place of every x."""
    if (network := as_network(adversary)) is None:
        return None

    def apply(variables: dict, x: Array, z: Array, *, train: bool):
        return network.apply(variables, jnp.zeros_like(x), z, train=train)

    return network._replace(apply=apply)
