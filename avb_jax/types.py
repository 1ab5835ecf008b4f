"""The shapes that every other module shares. Imports nothing of ours."""

from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array
PyTree = Any


class UserError(ValueError):
    """A slip of the caller's, in one line: the field, its value and the remedy."""


class Diverged(UserError):
    """A loss is not finite, or an encoder has no density; a setting of the caller's is to be changed."""


class Players(NamedTuple):
    """One thing per player of the game: networks, params, optimisers and their states, collections, gradients.

    A player that a method does not have is None, which is an empty pytree.
    """

    encoder: PyTree = None
    decoder: PyTree = None
    adversary: PyTree = None


@struct.dataclass
class Posterior:
    """A draw z ~ q(z|x), and what the encoder knows of q(.|x): its moments, its family, its density at the draw."""

    z: Array  # [..., B, Z]
    mean: Array | None = None  # [B, Z]
    std: Array | None = None  # [B, Z]
    log_q: Array | None = None  # [..., B] log q(z|x), nats; with auxiliary variables an upper bound on it, on average
    gaussian: bool = struct.field(pytree_node=False, default=False)  # whether q(.|x) is N(mean, diag std^2), and no other
    conditional: tuple[Array, Array] | None = None  # [..., B, Z] each: z is N(mean, diag std^2) given the rest of its noise


class AdversaryOutput(NamedTuple):
    """What an adversary's network may return in the place of T alone."""

    t: Array  # [B]
    features: Array | None = None  # [B, F] of the layer before, in which a VAE/GAN measures its reconstructions


class Draws(NamedTuple):
    """What one step of Algorithm 1 samples (its lines 3 to 5)."""

    x: Array  # [B, ...] data
    noise: Array  # [S, B, N] the encoder's noise, N(0, I), S draws per example
    z_prior: Array | None  # [S, B, Z] codes from the prior p(z), or what a contrast makes its draws of; None where unread


class Terms(NamedTuple):
    """The negative ELBO's two terms, per example and in nats."""

    reconstruction: Array  # [B] -log p(x|z)
    kl: Array  # [B] an estimate of KL(q(z|x), p(z)) from the draws, or its closed form
    kl_contrast: Array | None = None  # [B] under adaptive contrast, KL(r(z|x), p(z)) of the Gaussian r with q's moments

    @property
    def elbo(self) -> Array:
        """The evidence lower bound [B] at beta = 1, whatever beta was trained with."""
        return -self.reconstruction - self.kl


class AdversaryTerms(NamedTuple):
    """An adversary's loss and what it says, per example, averaged over its draws."""

    loss: Array  # [B] eq. 3.3 as a minimisation, or another divergence's, nats; of two T the lower one is nearer the optimum
    accuracy: Array  # [B] share of the pairs that T puts on the right side, in [0, 1]
    saturation: Array  # [B] share of the pairs with a logit beyond 5, where under 1% of eq. 3.3's gradient is left
    t: Array  # [B] T(x, z) at z ~ q(z|x), nats
    kl: Array | None = None  # [B] T's estimate of KL(q(z|x), p(z)), nats: t, and log r(z|x) - log p(z) under adaptive contrast


class Variables(NamedTuple):
    """What the networks compute with: their params, and the collections that belong to these."""

    params: Players
    collections: Players


class State(NamedTuple):
    """What a step carries to the next one. Holds no PRNG key: randomness is a function of (seed, step)."""

    step: Array  # [] int32, how many steps were taken
    params: Players
    opt_state: Players
    collections: Players  # per player: its variables other than params, e.g. {'batch_stats': ...}
    ema: Variables | None = None  # exponential moving averages, where `transforms.with_ema` keeps them
