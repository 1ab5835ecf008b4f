"""A method is a value: pure functions under the names that training and evaluation call them by."""

from collections.abc import Callable
from typing import NamedTuple

from numpyro.distributions import Distribution


class Method(NamedTuple):
    """What is trained and evaluated; made by `avb_jax.avb`, `vae`, `gan`, `explicit` and others, or by a user.

    What a method can do is what is not None. x is [B, ...] as the decoder's distribution has it, nats everywhere.
    """

    name: str
    init: Callable  # (key, x) -> State
    train_step: Callable  # (key, state, x, reduce=identity) -> (State, Info); `reduce` averages over devices, see `transforms`
    sample: Callable  # (key, state, count) -> x [count, ...], of p(x|z) at z from the prior its means, or draws (`models`)
    prior: Distribution | None = None  # p(z), or a `priors.Learned` one
    encode: Callable | None = None  # (key, state, x, draws=None) -> Posterior, with z [B, Z] or [draws, B, Z]
    decode: Callable | None = None  # (state, z [B, Z]) -> the distribution p(x|z), one per code
    log_joint: Callable | None = None  # (state, x, z [B, Z]) -> log p(x, z) [B]
    elbo: Callable | None = None  # (key, state, x) -> Terms, per example, in evaluation mode
    adversary: Callable | None = None  # (key, state, x, draws=1) -> AdversaryTerms, per example
    fresh_adversary: Callable | None = None  # (optimizer, state) -> a Method that trains a new T on the frozen players
    semi_implicit: bool = False  # whether `encode` gives z's moments given the rest of the encoder's noise
    bounds_kl: bool = False  # whether the kl of `elbo` is on average too large, where it is not T's
    prior_of: Callable | None = None  # (state) -> p(z) as it is; None: `prior`
    log_likelihood: Callable | None = None  # (key, state, x) -> log p(x) [B], of models without latents; the key dequantises


def prior_at(method: Method, state) -> Distribution | None:
    """The method's p(z), learned or not; None without latents."""
    return method.prior if method.prior_of is None else method.prior_of(state)


def identity(tree):
    """What `reduce` is on one device."""
    return tree
