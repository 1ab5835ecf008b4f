"""Importance weighted hierarchical variational inference (Sobolev & Vetrov 2019): SIVI with a proposal that has learned.

A reverse model tau(noise|x, z) proposes the noise that may have led to z, where SIVI takes draws that know nothing of z. It is
the third player, in the adversary's place; but it plays with the others: all three minimise one bound.
"""

from typing import Any

import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood, log_likelihood, normal, standard_normal
from avb_jax.importance import log_mean
from avb_jax.method import Method
from avb_jax.methods import generator
from avb_jax.methods.bound import check_semi_implicit, method_of_bound
from avb_jax.methods.update import Generative
from avb_jax.network import call
from avb_jax.priors import at
from avb_jax.semi_implicit import log_conditional, smoothed
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Draws, Players, Terms


def negative_elbo_hierarchical(
    params: Players,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    prior: Distribution,
    likelihood: Likelihood,
    beta: Array | float = 1.0,
    train: bool = True,
) -> tuple[Array, Generative]:
    """Sobolev & Vetrov's lower bound on the ELBO (2019), negated.

        log q(z|x) <= E log (1 / (K + 1)) sum_{k=0..K} q(z|x, noise_k) p(noise_k) / tau(noise_k|x, z)

    with noise_0 that of z, and K draws from tau. With tau = p(noise) it is SIVI's.

    Args:
      params: the encoder's, the decoder's, and as `adversary` the reverse model's.
      collections: every player's.
      draws: x [B, ...] and noise [2 + K, B, N]: z is drawn given the first, by the first Z numbers of the second, and tau makes
        its draws of the others; its z_prior is not read. (What the encoder itself makes z of depends on z in another way.)
      networks: every player's.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      beta: weight of the KL term.
      train: whether batch normalisation uses this batch (and updates its statistics).

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B], whose kl is on average too large, and `compared` z [1, B, Z].

    Raises:
      UserError: the encoder gives no conditional moments.
    """
    prior = at(prior, networks, params, collections)

    def encode(noise: Array):
        return players.encode(
            networks.encoder, params.encoder, collections.encoder, draws.x, noise, prior.event_shape[0], train=train
        )

    own = draws.noise[:1]
    posterior, encoder = encode(own)
    check_semi_implicit(posterior, networks)
    z = smoothed(posterior.conditional, draws.noise)
    (mean, std), reverse = call(networks.adversary, params.adversary, collections.adversary, draws.x, z, train=train)
    noise = jnp.concatenate([own, mean + std * draws.noise[2:]])  # [1 + K, B, N]
    log_q = log_conditional(z[None], encode(noise)[0].conditional)[0]
    log_weight = log_q + standard_normal(noise.shape[-1]).log_prob(noise) - normal(mean, std).log_prob(noise)
    kl = log_mean(log_weight, axis=0) - prior.log_prob(z)

    of_x, decoder = generator.decode(networks.decoder, likelihood, params.decoder, collections.decoder, z, train=train)
    reconstruction = -log_likelihood(of_x, draws.x)
    after = Players(encoder, decoder, reverse)
    return jnp.mean(reconstruction + beta * kl), Generative(Terms(reconstruction, kl), z[None], after)


def iwhvi(
    encoder: Any,
    decoder: Any,
    reverse_model: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    inner_draws: int = 15,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """Importance weighted hierarchical variational inference.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` with conditional moments, such as `networks.SemiImplicitEncoder`'s.
      decoder: z [B, Z] -> what `likelihood` takes.
      reverse_model: (x [B, ...], z [B, Z]) -> mean and standard deviation [B, N] of the noise, such as `networks.ReverseModel`.
        As a player it is the adversary: `params.adversary`, `optimizers.adversary`.
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      inner_draws: K, draws of the noise from the reverse model.
      beta: weight of the KL term once warmed up; 1 is the ELBO.
      beta_warmup: steps over which the weight rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(
        inner_draws=at_least(inner_draws, 1),
        reverse_model=(reverse_model, reverse_model is not None, "a network, such as networks.ReverseModel"),
    )

    return method_of_bound(
        "iwhvi",
        negative_elbo_hierarchical,
        inner_draws + 2,
        networks=Players(encoder, decoder, reverse_model),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        beta=beta,
        beta_warmup=beta_warmup,
    )
