"""Where sampling estimators start: the prior, or a Gaussian fitted to the encoder's draws."""

import jax
import jax.numpy as jnp

from avb_jax.distributions import Normal
from avb_jax.players import Model, encode, evaluation_variables
from avb_jax.types import Array, State, UserError

INITIAL = ("encoder", "prior")
SMALLEST_STD = 1e-4  # an encoder that ignores its noise would leave a proposal without a density


def proposal(key: Array, state: State, model: Model, x: Array, initial: str, draws: int, inflation: float) -> Normal:
    """The distribution over z that an estimator for the example x [*x] starts from.

    Args:
      key: of the encoder's noise.
      state: one run's, without a leading axis of seeds.
      model: the method's model.
      x: one example, pixels in [0, 1].
      initial: 'prior', or 'encoder' for a Gaussian with the moments of q(z|x): those that the encoder tells, or else those of
        some draws. An implicit q(z|x) has no density of its own to weigh by.
      draws: of z that moments are taken from.
      inflation: of the standard deviation, since a proposal narrower than the posterior gives weights of unbounded variance.

    Raises:
      UserError: unknown `initial`.
    """
    if initial not in INITIAL:
        raise UserError(f"initial={initial!r}: must be one of {', '.join(INITIAL)}")
    if initial == "prior":
        return Normal(jnp.zeros(model.prior.dim), jnp.ones(model.prior.dim))
    noise = jax.random.normal(key, (draws, 1, model.noise_dim))
    params, stats = evaluation_variables(state)
    posterior, _ = encode(model, params.encoder, stats.encoder, x[None], noise, train=False)
    if posterior.mean is not None and posterior.std is not None:
        mean, std = posterior.mean[0], posterior.std[0]
    else:
        z = posterior.z[:, 0]
        mean, std = z.mean(axis=0), z.std(axis=0, ddof=1)
    return Normal(mean, jnp.maximum(inflation * std, SMALLEST_STD))
