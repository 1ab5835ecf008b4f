"""Semi-implicit variational inference (Yin & Zhou 2018): AVB's rival that needs no T.

Its bound on the ELBO of a semi-implicit q(z|x) puts a mixture over further draws of u in the place of q(z|x).
"""

import functools
from typing import Any

import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax.distributions import Likelihood
from avb_jax.method import Method
from avb_jax.methods.bound import check_semi_implicit, method_of_bound
from avb_jax.methods.vae import negative_elbo
from avb_jax.semi_implicit import upper_log_density
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Players, Posterior


def kl_of_mixture(posterior: Posterior, prior: Distribution, networks: Players) -> Array:
    """The KL term [B] of Yin & Zhou's lower bound on the ELBO (2018), each draw's own conditional among the K + 1.

    Each of the S draws of z [S, B, Z] is scored by the mixture of all S conditionals q(z|x, u_s), its own among them: on
    average at least log q(z|x), by I(z; u) - log S or more where the conditionals lie that far apart.

    Raises:
      UserError: the encoder gives no conditional moments.
    """
    check_semi_implicit(posterior, networks)
    return jnp.mean(upper_log_density(posterior.z, posterior.conditional) - prior.log_prob(posterior.z), axis=0)


def sivi(
    encoder: Any,
    decoder: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    inner_draws: int = 15,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """Semi-implicit variational inference.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` with conditional moments, such as `networks.SemiImplicitEncoder`'s.
      decoder: z [B, Z] -> what `likelihood` takes.
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      inner_draws: K, draws of u that score each draw of z next to its own. All K + 1 are drawn from, and score each other; the
        first is decoded.
      beta: weight of the KL term once warmed up; 1 is the ELBO.
      beta_warmup: steps over which the weight rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(inner_draws=at_least(inner_draws, 1))

    return method_of_bound(
        "sivi",
        functools.partial(negative_elbo, kl=kl_of_mixture),
        inner_draws + 1,
        networks=Players(encoder, decoder),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        beta=beta,
        beta_warmup=beta_warmup,
    )
