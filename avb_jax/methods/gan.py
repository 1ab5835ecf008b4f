"""The generative adversarial network (Goodfellow et al. 2014), with the DC-GAN's networks of Radford et al. (2015).

A decoder and an adversary of images (`networks.ImageAdversary`), no encoder and no likelihood: T* = log p_data(x) - log p(x).
"""

import jax
import jax.numpy as jnp

from avb_jax import objectives, players
from avb_jax.methods.update import play
from avb_jax.objectives import Said
from avb_jax.players import Model, init, sample
from avb_jax.types import Array, Draws, Info, Players, PyTree, State

__all__ = ["PLAYERS", "init", "sample", "train_step"]

PLAYERS = Players(None, "deterministic", "images")


def generative_loss(
    params: Players, adversary: PyTree, batch_stats: Players, draws: Draws, *, model: Model, beta: Array | float = 1.0,
) -> tuple[Array, tuple[None, Array, Players]]:
    """The decoder's, non-saturating: E softplus(-T(dec(z))), z ~ p(z).

    Returns:
      The loss, and (nothing observed, the generated images [1, B, ...], new batch statistics).
    """
    del beta
    output, stats = players.decode(model, params.decoder, batch_stats.decoder, draws.z_prior[0], train=True)
    images = model.likelihood.mean(output)[None]
    judgement, _ = judge_all(adversary, batch_stats, draws.x, images, model)
    return jnp.mean(jax.nn.softplus(-judgement.t[1])), (None, images, batch_stats._replace(decoder=stats))


def adversary_loss(
    adversary: PyTree, batch_stats: Players, draws: Draws, images: Array, *, model: Model,
) -> tuple[Array, tuple[Said, PyTree]]:
    """The adversary's loss, by `model.divergence`: data [B, ...] against each of K sets of made images [K, B, ...]."""
    judgement, stats = judge_all(adversary, batch_stats, draws.x, jax.lax.stop_gradient(images), model)
    real, made = judgement.t[:1], judgement.t[1:]
    loss, said = objectives.judged(jnp.stack([jnp.broadcast_to(real, made.shape), made]), model)
    return loss, (said, stats)


def judge_all(adversary: PyTree, batch_stats: Players, x: Array, images: Array, model: Model):
    """T [1 + K, B], and the features [1 + K, B, F], of data x [B, ...] and K sets of images, through one call."""
    everything = jnp.concatenate([x[None], images])
    flat = everything.reshape(-1, *x.shape[1:])
    judgement, stats = players.judge(model, adversary, batch_stats.adversary, flat, train=True)
    return jax.tree.map(lambda a: a.reshape(*everything.shape[:2], *a.shape[1:]), judgement), stats


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step of decoder and adversary; arguments and returns as in `avb.train_step`."""
    state, _, info = play(
        key, state, batch, model=model, optimizers=optimizers, loss=generative_loss, adversary_loss=adversary_loss
    )
    return state, info
