"""The adversarial autoencoder (Makhzani et al. 2015; section 5.2): AVB with a T that sees z alone.

T* = log q(z) - log p(z) of the aggregated posterior q(z), eq. 5.4: what is minimised is E[-log p(x|z)] + KL(q(z), p(z)), less
than the negative ELBO by the mutual information I(x; z), and no bound on anything. Whatever the adversary's network, it gets
x = 0 (`networks.LatentAdversary` needs none).
"""

import dataclasses

from avb_jax import objectives
from avb_jax.methods.update import play
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Info, Players, State, UserError

__all__ = ["PLAYERS", "init", "reconstruct", "sample", "sample_posterior", "train_step"]

PLAYERS = Players("black_box", "likelihood", "latents")


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step; arguments and returns as in `avb.train_step`.

    Raises:
      UserError: the model has adaptive contrast, which is about each x.
    """
    if model.contrast != "none":
        raise UserError(f"contrast={model.contrast!r}: the T of an adversarial autoencoder sees no x; use contrast='none'")
    blind = dataclasses.replace(model, adversary_sees_x=False)
    state, terms, info = play(
        key, state, batch, model=blind, optimizers=optimizers, loss=objectives.negative_elbo_adversarial,
        adversary_loss=objectives.adversary_loss,
    )  # fmt: skip
    return state, info._replace(reconstruction=terms.reconstruction, kl_aggregated_posterior=terms.kl)
