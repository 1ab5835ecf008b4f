"""The losses of the game. One per side; the first argument is what is differentiated.

Each is a pure function of params, batch statistics and one set of `Draws`, returns its mean over the batch in nats,
and beside it the per-example terms. Opponents' params are explicit arguments: differentiating with respect to the
first argument alone is what holds them fixed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avb_jax import contrast, distributions, divergences, players
from avb_jax.players import Model
from avb_jax.types import Array, Draws, Players, PyTree, Terms, UserError

SATURATED = 5.0  # |T| from which the logistic loss has less than 1% of its gradient left


class Said(NamedTuple):
    """What T said per example, averaged over its draws."""

    loss: Array  # [B] eq. 3.3 as a minimisation, or another divergence's, nats
    accuracy: Array  # [B] share of the pairs that T puts on the right side, in [0, 1]
    saturation: Array  # [B] share of the pairs with |T| > SATURATED
    t: Array  # [B] T(x, z) at z ~ q(z|x), nats


def negative_elbo_adversarial(
    params: Players, adversary: PyTree, batch_stats: Players, draws: Draws, *, model: Model, beta: Array | float = 1.0,
    train: bool = True,
) -> tuple[Array, tuple[Terms, Array, Players]]:
    """Eq. 3.9 (Mescheder et al. 2017), negated: E[beta T(x, z) - log p(x|z)] at z = enc(x, noise).

    T stands in for log q(z|x) - log p(z), and its own params are held fixed: by Proposition 2 the dependence of the
    optimal T on the encoder has no gradient on average. T is evaluated together with the prior's draws, as in the
    adversary's own loss, so that both see the same function where T normalises over the batch (and so that a
    compiler shares the forward pass).

    Under adaptive contrast T sees (z - mean) / std and stands in for log q(z|x) - log r(z|x); the KL term is T plus
    log r(z|x) - log p(z), see `contrast`.

    With `model.adversary_floor` c > 0 the KL term takes max(T, -c). Since E_q[exp(-T*)] = 1, T* < -t has a probability of at
    most e^-t under q, so that this raises the optimal T's KL by at most e^-c nats, while an encoder has nothing to gain any
    more from places where a T that is off goes to minus infinity.

    Args:
      params: the encoder's and the decoder's; `params.adversary` is not read.
      adversary: T's params.
      batch_stats: every player's.
      draws: x [B, ...], noise [S, B, N], z_prior [S, B, Z]; the KL term is averaged over S draws of z, the first is decoded.
      model: networks and distributions.
      beta: weight of the KL term.
      train: whether batch normalisation uses this batch (and updates the encoder's and decoder's statistics).

    Returns:
      The loss, and (terms [B], z [S, B, Z] as T sees it, new batch statistics); `terms.kl` is an estimate that is only
      as good as T and may be negative.
    """
    drawn, encoder_stats = contrast.encode(
        model, params.encoder, batch_stats.encoder, draws.x, draws.noise, train=train
    )
    reconstruction, decoder_stats = _reconstruct(params, batch_stats, draws, drawn.z, model, train)
    t, _ = _t_of_both(adversary, batch_stats, draws, drawn.seen, model, train)
    believed = jnp.maximum(t[0], -model.adversary_floor) if model.adversary_floor else t[0]
    terms = Terms(reconstruction, jnp.mean(believed + drawn.log_ratio, axis=0), drawn.kl)
    stats = batch_stats._replace(encoder=encoder_stats, decoder=decoder_stats)
    return jnp.mean(reconstruction + beta * terms.kl), (terms, drawn.seen, stats)


def negative_elbo(
    params: Players, batch_stats: Players, draws: Draws, *, model: Model, beta: Array | float = 1.0, train: bool = True,
) -> tuple[Array, tuple[Terms, Array, Players]]:
    """Eq. 2.1 negated, for an encoder that knows its density: the VAE (Kingma & Welling 2013), with whatever posterior.

    Where the encoder gives `log_q`, the KL term is log q(z|x) - log p(z), averaged over the S draws of z: an unbiased estimate
    of KL(q(z|x), p(z)), or with auxiliary variables of an upper bound on it. Where it says that q is Gaussian, N(mean, diag
    std^2), the KL term is exact. Moments alone are no density.

    Arguments and returns as in `negative_elbo_adversarial`.

    Raises:
      UserError: the encoder says neither.
    """
    posterior, encoder_stats = players.encode(
        model, params.encoder, batch_stats.encoder, draws.x, draws.noise, train=train
    )
    reconstruction, decoder_stats = _reconstruct(params, batch_stats, draws, posterior.z, model, train)
    if posterior.log_q is not None:
        kl = jnp.mean(posterior.log_q - model.prior.log_prob(posterior.z), axis=0)
    elif posterior.gaussian:
        kl = distributions.normal_kl(posterior.mean, posterior.std)
    else:
        name = type(model.networks.encoder).__name__
        raise UserError(
            f"encoder={name}: a VAE needs a density of q(z|x); return Posterior(z, log_q=...), or Posterior(z, mean, std, "
            "gaussian=True) where q is N(mean, diag std^2)"
        )
    stats = batch_stats._replace(encoder=encoder_stats, decoder=decoder_stats)
    return jnp.mean(reconstruction + beta * kl), (Terms(reconstruction, kl), posterior.z, stats)


def adversary_loss(
    adversary: PyTree, batch_stats: Players, draws: Draws, z: Array, *, model: Model, train: bool = True,
) -> tuple[Array, tuple[Said, PyTree]]:
    """Eq. 3.3 as a minimisation over T: E[-log sigma(T(x, z)) - log(1 - sigma(T(x, z_prior)))].

    With another `model.divergence`, that one's loss (section 5.3), which has the same optimum. (Line 9 of Algorithm 1 as
    printed subtracts the gradient of eq. 3.3, which is maximised: an erratum.)

    Args:
      adversary: T's params.
      batch_stats: every player's.
      draws: x [B, ...] and z_prior [S, B, Z]; its noise is not read.
      z: the encoder's draws [S, B, Z], normalised under adaptive contrast; no gradient flows into them.
      model: networks and distributions.
      train: whether batch normalisation uses this batch (and updates the adversary's statistics).

    Returns:
      The loss, and (what T says per example, the adversary's new batch statistics).
    """
    t, stats = _t_of_both(adversary, batch_stats, draws, jax.lax.stop_gradient(z), model, train)
    loss, said = judged(t, model)
    return loss, (said, stats)


def judged(t: Array, model: Model) -> tuple[Array, Said]:
    """The adversary's loss [] from its T [2, S, B] on the two sides, and what it says per example."""
    loss = divergences.DIVERGENCES[model.divergence](t[0], t[1])
    accuracy = 0.5 * (jnp.heaviside(t[0], 0.5) + jnp.heaviside(-t[1], 0.5))  # T = 0 is right half of the time
    saturation = jnp.mean(jnp.abs(t) > SATURATED, axis=(0, 1))
    said = Said(*(jnp.mean(a, axis=0) for a in (loss, accuracy)), saturation, jnp.mean(t[0], axis=0))
    return jnp.mean(loss), said


def _reconstruct(
    params: Players, batch_stats: Players, draws: Draws, z: Array, model: Model, train: bool
) -> tuple[Array, PyTree]:
    """-log p(x|z) [B] of the first of the draws z [S, B, Z], and the decoder's new batch statistics."""
    output, stats = players.decode(model, params.decoder, batch_stats.decoder, z[0], train=train)
    return -model.likelihood.log_prob(output, draws.x), stats


def _t_of_both(
    adversary: PyTree, batch_stats: Players, draws: Draws, z: Array, model: Model, train: bool
) -> tuple[Array, PyTree]:
    """T [2, S, B] at the encoder's z and at the prior's, through one call of the adversary."""
    both = jnp.concatenate([z, draws.z_prior])
    t, stats = players.discriminate(model, adversary, batch_stats.adversary, draws.x, both, train=train)
    return t.reshape(2, *z.shape[:2]), stats
