"""The importance weighted autoencoder (Burda, Grosse & Salakhutdinov 2016): a VAE whose bound closes as it draws more."""

from typing import Any

import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood
from avb_jax.importance import log_mean
from avb_jax.method import Method
from avb_jax.methods import generator
from avb_jax.methods.bound import log_density, method_of_bound
from avb_jax.methods.update import Generative
from avb_jax.priors import at
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Draws, Players, Terms


def negative_importance_bound(
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
    """Burda et al.'s lower bound on log p(x) (2016, eq. 8), negated.

        log p(x) >= E log (1 / S) sum_{s=1..S} p(x|z_s) p(z_s) / q(z_s|x)

    With S = 1 it is the ELBO.

    Args:
      params: the encoder's and the decoder's.
      collections: every player's.
      draws: x [B, ...] and noise [S, B, N]; its z_prior is not read.
      networks: every player's.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      beta: power of p(z) / q(z|x) in a weight; 1 is the bound.
      train: whether batch normalisation uses this batch (and updates its statistics).

    Returns:
      The loss, and a `Generative` with `terms` the ELBO's own [B], averaged over the draws, and `compared` z [S, B, Z].

    Raises:
      UserError: the encoder gives no density.
    """
    prior = at(prior, networks, params, collections)
    posterior, encoder = players.encode(
        networks.encoder, params.encoder, collections.encoder, draws.x, draws.noise, prior.event_shape[0], train=train
    )
    z = posterior.z
    reconstruction, decoder = generator.reconstruction(
        networks.decoder, likelihood, params.decoder, collections.decoder, draws.x, z, train=train
    )
    kl = log_density(posterior, networks) - prior.log_prob(z)
    bound = log_mean(-reconstruction - beta * kl, axis=0)
    terms = Terms(jnp.mean(reconstruction, axis=0), jnp.mean(kl, axis=0))
    return -jnp.mean(bound), Generative(terms, z, collections._replace(encoder=encoder, decoder=decoder))


def iwae(
    encoder: Any,
    decoder: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    noise_draws: int = 16,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """The importance weighted autoencoder.

    Its encoder is trained as a proposal, not as a posterior: the ELBO that it is evaluated by falls as `noise_draws` grows,
    while log p(x) (`evaluation.ImportanceSampling`, `AIS`) is what is trained.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` that says that it is Gaussian, or has log_q.
      decoder: z [B, Z] -> what `likelihood` takes.
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      noise_draws: S, draws of z per example in a step, all of them decoded.
      beta: power of p(z) / q(z|x) in a weight once warmed up; 1 is the bound.
      beta_warmup: steps over which it rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(noise_draws=at_least(noise_draws, 1))

    return method_of_bound(
        "iwae",
        negative_importance_bound,
        noise_draws,
        networks=Players(encoder, decoder),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        beta=beta,
        beta_warmup=beta_warmup,
    )
