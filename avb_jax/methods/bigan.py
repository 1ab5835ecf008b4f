"""BiGAN (Donahue et al. 2016), or adversarially learned inference (Dumoulin et al. 2016); section 5.4 of the paper.

The adversary tells pairs (x, enc(x, noise)) of the data from pairs (dec(z), z) of the model: T* = log q(x, z) - log p(x, z).
There is no likelihood, and reconstructions come about only as far as encoder and decoder match. Draws beyond the first per
example (`noise_draws`) and the scales of the ELBO are not used.
"""

import jax
import jax.numpy as jnp

from avb_jax import objectives, players
from avb_jax.methods.update import play
from avb_jax.objectives import Said
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Draws, Info, Players, PyTree, State

__all__ = ["PLAYERS", "init", "reconstruct", "sample", "sample_posterior", "train_step"]

PLAYERS = Players("gaussian", "deterministic", "pairs")


def generative_loss(
    params: Players, adversary: PyTree, batch_stats: Players, draws: Draws, *, model: Model, beta: Array | float = 1.0,
) -> tuple[Array, tuple[None, tuple[Array, Array], Players]]:
    """Both sides non-saturating: E softplus(T(x, enc(x))) for the encoder, E softplus(-T(dec(z), z)) for the decoder.

    Returns:
      The sum of the two, and (nothing observed, (z [1, B, Z] of the data, x [B, ...] of the model), new batch statistics).
    """
    del beta
    posterior, encoder_stats = players.encode(
        model, params.encoder, batch_stats.encoder, draws.x, draws.noise[:1], train=True
    )
    output, decoder_stats = players.decode(model, params.decoder, batch_stats.decoder, draws.z_prior[0], train=True)
    shown = posterior.z, model.likelihood.mean(output)
    t, _ = _t_of_both(adversary, batch_stats, draws, shown, model)
    loss = jnp.mean(jax.nn.softplus(t[0]) + jax.nn.softplus(-t[1]))
    return loss, (None, shown, batch_stats._replace(encoder=encoder_stats, decoder=decoder_stats))


def adversary_loss(
    adversary: PyTree, batch_stats: Players, draws: Draws, shown: tuple[Array, Array], *, model: Model,
) -> tuple[Array, tuple[Said, PyTree]]:
    """The adversary's loss over the two kinds of pairs, by `model.divergence`; no gradient flows into `shown`."""
    t, stats = _t_of_both(adversary, batch_stats, draws, jax.lax.stop_gradient(shown), model)
    loss, said = objectives.judged(t, model)
    return loss, (said, stats)


def _t_of_both(
    adversary: PyTree, batch_stats: Players, draws: Draws, shown: tuple[Array, Array], model: Model
) -> tuple[Array, PyTree]:
    """T [2, 1, B] at the data's pairs and at the model's, through one call of the adversary."""
    z, x = shown
    pairs = jnp.concatenate([draws.x, x]), jnp.concatenate([z[0], draws.z_prior[0]])[None]
    t, stats = players.discriminate(model, adversary, batch_stats.adversary, *pairs, train=True)
    return t.reshape(2, 1, -1), stats


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step of all three players; arguments and returns as in `avb.train_step`."""
    state, _, info = play(
        key, state, batch, model=model, optimizers=optimizers, loss=generative_loss, adversary_loss=adversary_loss
    )
    return state, info
