"""VAE/GAN (Larsen et al. 2016): a VAE whose reconstructions are measured in a layer of an adversary of images.

The adversary (`networks.ImageAdversary`) tells data from reconstructions and from samples, and lends its features f to
-log N(f(x); f(dec(z)), I), which stands in the place of -log p(x|z). So there is no likelihood of x, and no ELBO of x.
"""

import jax
import jax.numpy as jnp

from avb_jax import players
from avb_jax.distributions import normal_kl
from avb_jax.methods import gan
from avb_jax.methods.update import play
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Draws, Info, Players, PyTree, State, UserError

__all__ = ["PLAYERS", "init", "reconstruct", "sample", "sample_posterior", "train_step"]

PLAYERS = Players("gaussian", "deterministic", "images")


def losses(
    params: Players, adversary: PyTree, batch_stats: Players, draws: Draws, *, model: Model, beta: Array | float = 1.0,
) -> tuple[Players, tuple[tuple[Array, Array], Array, Players]]:
    """One loss per player (algorithm 1 of Larsen et al. 2016), with the decoder's adversarial one non-saturating.

        encoder  beta KL(q(z|x), p(z)) + 1/2 |f(x) - f(dec(z))|^2
        decoder  gamma 1/2 |f(x) - f(dec(z))|^2 + softplus(-T(dec(z))) + softplus(-T(dec(z_prior)))

    gamma is `model.feature_weight`. A squared distance in features is -log N(f(x); f(dec(z)), I) up to a constant.

    Returns:
      The two losses, and ((feature distance, KL) [B], reconstructions and samples [2, B, ...], new batch statistics).

    Raises:
      UserError: the posterior is not Gaussian, or the adversary has no features.
    """
    posterior, encoder_stats = players.encode(
        model, params.encoder, batch_stats.encoder, draws.x, draws.noise[:1], train=True
    )
    if not posterior.gaussian:
        name = type(model.networks.encoder).__name__
        raise UserError(f"encoder={name}: a VAE/GAN needs an encoder that returns Posterior(z, mean, std, gaussian=True)")
    z = jnp.concatenate([posterior.z[0], draws.z_prior[0]])
    output, decoder_stats = players.decode(model, params.decoder, batch_stats.decoder, z, train=True)
    images = model.likelihood.mean(output).reshape(2, *draws.x.shape)
    judgement, _ = gan.judge_all(adversary, batch_stats, draws.x, images, model)
    if judgement.features is None:
        name = type(model.networks.adversary).__name__
        raise UserError(f"adversary={name}: a VAE/GAN needs features; return Judgement(t, features [B, F])")
    distance = 0.5 * jnp.sum(jnp.square(judgement.features[0] - judgement.features[1]), axis=-1)
    kl = normal_kl(posterior.mean, posterior.std)
    fooling = jnp.sum(jax.nn.softplus(-judgement.t[1:]), axis=0)
    stats = batch_stats._replace(encoder=encoder_stats, decoder=decoder_stats)
    by_player = Players(jnp.mean(beta * kl + distance), jnp.mean(model.feature_weight * distance + fooling))
    return by_player, ((distance, kl), images, stats)


def gradients(params: Players, adversary: PyTree, batch_stats: Players, draws: Draws, *, model: Model, beta: Array):
    """Each player's gradient of its own loss, and the second part of `losses`."""

    def of(params: Players):
        return losses(params, adversary, batch_stats, draws, model=model, beta=beta)

    by_player, pull, beside = jax.vjp(of, params, has_aux=True)
    one, zero = jnp.ones_like(by_player.encoder), jnp.zeros_like(by_player.encoder)
    (encoder,), (decoder,) = pull(Players(one, zero)), pull(Players(zero, one))
    return Players(encoder.encoder, decoder.decoder), beside


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step of all three players; arguments and returns as in `avb.train_step`."""
    state, (distance, kl), info = play(
        key, state, batch, model=model, optimizers=optimizers, loss=losses, adversary_loss=gan.adversary_loss,
        gradients=gradients,
    )  # fmt: skip
    return state, info._replace(feature_distance=distance, kl=kl)
