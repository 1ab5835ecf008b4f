"""Adversarial Variational Bayes: Algorithm 1 of Mescheder, Nowozin & Geiger (2017)."""

from avb_jax import objectives, players
from avb_jax.methods.update import play
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Info, Players, State, Terms

__all__ = ["PLAYERS", "elbo_terms", "init", "reconstruct", "sample", "sample_posterior", "train_step"]

PLAYERS = Players("implicit", "likelihood", "pairs")


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step of Algorithm 1: eq. 3.9 for encoder and decoder, eq. 3.3 for T; see `update.play`.

    Args:
      key: a key of this step's own.
      state: the State before.
      batch: x [B, ...], pixels in [0, 1].
      model: networks, distributions and scales.
      optimizers: an optax optimiser per player.

    Returns:
      The State after, with all three players' new params, and the step's Info (per example, in nats).
    """
    state, terms, info = play(
        key, state, batch, model=model, optimizers=optimizers, loss=objectives.negative_elbo_adversarial,
        adversary_loss=objectives.adversary_loss,
    )  # fmt: skip
    return state, info._replace(
        elbo=terms.elbo, reconstruction=terms.reconstruction, kl=terms.kl, kl_contrast=terms.kl_contrast
    )


def elbo_terms(key: Array, state: State, batch: Array, *, model: Model) -> Terms:
    """The ELBO's terms [B] in evaluation mode; `kl` is T's estimate over `model.noise_draws` draws, floored as in training."""
    params, stats = players.evaluation_variables(state)
    _, (terms, _, _) = objectives.negative_elbo_adversarial(
        params, params.adversary, stats, players.draw(key, model, batch), model=model, train=False
    )
    return terms
