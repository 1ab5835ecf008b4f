"""The shapes that every other module shares. Imports nothing of ours."""

from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array
PyTree = Any


class UserError(ValueError):
    """A slip of the caller's, told in one line: the field, its value and the remedy."""


class Diverged(UserError):
    """A training left the numbers, or its encoder no room for a density; a setting of the caller's is to be changed."""


class Players(NamedTuple):
    """One thing per player of the game: networks, params, optimiser states, batch statistics, gradients.

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


class Judgement(NamedTuple):
    """What an adversary says of a pair."""

    t: Array  # [B]
    features: Array | None = None  # [B, F] of the layer before, by which a VAE/GAN measures its reconstructions


class Draws(NamedTuple):
    """What one step of Algorithm 1 samples (its lines 3 to 5)."""

    x: Array  # [B, ...] data
    noise: Array  # [S, B, N] the encoder's noise, N(0, I), S draws per example
    z_prior: Array  # [S, B, Z] codes from p(z) = N(0, I), which adaptive contrast compares with as well


class Terms(NamedTuple):
    """The negative ELBO's two terms, per example and in nats."""

    reconstruction: Array  # [B] -log p(x|z)
    kl: Array  # [B] an estimate of KL(q(z|x), p(z)) from the draws, or its closed form
    kl_contrast: Array | None = None  # [B] under adaptive contrast, KL(r(z|x), p(z)) of the Gaussian r with q's moments

    @property
    def elbo(self) -> Array:
        """The evidence lower bound [B] at beta = 1, whatever beta was trained with."""
        return -self.reconstruction - self.kl


class Variables(NamedTuple):
    """What a network computes with: its params, and the statistics that belong to them."""

    params: Players
    batch_stats: Players  # as State's


class State(NamedTuple):
    """What a step carries to the next one. Holds no PRNG key: randomness is a function of (seed, step)."""

    step: Array  # [] int32, how many steps were taken
    params: Players
    opt_state: Players
    batch_stats: Players  # per player: its Flax collections other than 'params', e.g. {'batch_stats': ...}
    average: Variables | None  # exponential moving averages, for evaluation; None where they are off


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats unless said otherwise. Never fed back.

    What a method does not have is None.
    """

    elbo: Array | None = None
    reconstruction: Array | None = None
    kl: Array | None = None
    kl_contrast: Array | None = None  # as in Terms: what is left of kl is T's share, by how much q is no Gaussian
    kl_aggregated_posterior: Array | None = None  # T(z), an estimate of KL(q(z), p(z)) by an adversary that sees z alone
    feature_distance: Array | None = None  # 1/2 |f(x) - f(dec(z))|^2 in the features of a VAE/GAN's adversary
    beta: Array | None = None  # [] weight of the KL term in this step
    adversary_loss: Array | None = None  # what T minimises; by eq. 3.3, 2 log 2 = 1.386 when T knows nothing
    adversary_accuracy: Array | None = None  # share of the two pairs that T puts on the right side, in [0, 1]
    adversary_saturation: Array | None = None  # share of the pairs with |T| > 5, where under 1% of eq. 3.3's gradient is left
