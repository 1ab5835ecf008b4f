"""The variational autoencoder (Kingma & Welling 2013), for any posterior whose density the encoder knows: AVB's baseline.

Gaussian, as in section 4 of the paper, or more flexible: `networks.posteriors`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood, kl_divergence, log_likelihood, normal
from avb_jax.method import Method
from avb_jax.methods import generator
from avb_jax.methods.bound import log_density, method_of_bound
from avb_jax.methods.update import Generative
from avb_jax.priors import at
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Draws, Players, Posterior, Terms


def kl_of_density(posterior: Posterior, prior: Distribution, networks: Players) -> Array:
    """KL(q(z|x), p(z)) [B] of an encoder that knows its density.

    Where the encoder gives `log_q`, log q(z|x) - log p(z), averaged over the S draws of z: an unbiased estimate, or with
    auxiliary variables one of an upper bound. Where it says that q is Gaussian, N(mean, diag std^2), the KL is exact if NumPyro
    knows the KL of a Gaussian and this prior, and such an estimate if not. Moments alone are no density.

    Args:
      posterior: z [S, B, Z] and what is known of it.
      prior: p(z).
      networks: every player's.

    Raises:
      UserError: the encoder gives neither.
    """
    log_q = log_density(posterior, networks)
    exact = posterior.gaussian and posterior.log_q is None
    kl = kl_divergence(normal(posterior.mean, posterior.std), prior) if exact else None
    return jnp.mean(log_q - prior.log_prob(posterior.z), axis=0) if kl is None else kl


def negative_elbo(
    params: Players,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    prior: Distribution,
    likelihood: Likelihood,
    kl: Callable[[Posterior, Distribution, Players], Array] = kl_of_density,
    beta: Array | float = 1.0,
    train: bool = True,
) -> tuple[Array, Generative]:
    """Eq. 2.1 negated, for an encoder that says enough of q(z|x): the VAE, with whatever posterior.

    Args:
      params: the encoder's and the decoder's.
      collections: every player's.
      draws: x [B, ...] and noise [S, B, N]; its z_prior is not read.
      networks: every player's.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      kl: (posterior, prior, networks) -> the KL term [B], `kl_of_density` or another bound on it.
      beta: weight of the KL term.
      train: whether batch normalisation uses this batch (and updates its statistics).

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B] and `compared` z [S, B, Z].

    Raises:
      UserError: the encoder does not give what `kl` needs.
    """
    prior = at(prior, networks, params, collections)
    posterior, encoder = players.encode(
        networks.encoder, params.encoder, collections.encoder, draws.x, draws.noise, prior.event_shape[0], train=train
    )
    of_x, decoder = generator.decode(
        networks.decoder, likelihood, params.decoder, collections.decoder, posterior.z[0], train=train
    )
    terms = Terms(-log_likelihood(of_x, draws.x), kl(posterior, prior, networks))
    after = collections._replace(encoder=encoder, decoder=decoder)
    return jnp.mean(terms.reconstruction + beta * terms.kl), Generative(terms, posterior.z, after)


def vae(
    encoder: Any,
    decoder: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    noise_draws: int = 1,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """The variational autoencoder.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` that says that it is Gaussian, or has log_q.
      decoder: z [B, Z] -> what `likelihood` takes.
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      noise_draws: S, draws of z per example in a step, over which an estimated KL term is averaged; the first one is decoded.
      beta: weight of the KL term once warmed up; 1 is the ELBO.
      beta_warmup: steps over which the weight rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(noise_draws=at_least(noise_draws, 1))

    return method_of_bound(
        "vae",
        negative_elbo,
        noise_draws,
        networks=Players(encoder, decoder),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        beta=beta,
        beta_warmup=beta_warmup,
    )
