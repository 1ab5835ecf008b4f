"""Where sampling estimators start: the prior, a Gaussian fitted to the encoder's draws, or the encoder's own components."""

import jax.numpy as jnp
from numpyro.distributions import Categorical, Distribution, Independent, MixtureSameFamily, constraints

from avb_jax.distributions import normal
from avb_jax.method import Method, prior_at
from avb_jax.types import Array, State, UserError

INITIAL = ("encoder", "prior", "semi_implicit")
BROAD = 0.1  # share of the Gaussian of q's moments next to a semi-implicit q's own components
SMALLEST_STD = 1e-4  # an encoder that ignores its noise would leave a proposal without a density


def check(initial: str, fit_draws: int, inflation: float) -> None:
    """Refuses settings of `proposal` that are out of range.

    Raises:
      UserError: with the field, the value and the remedy.
    """
    if initial not in INITIAL:
        raise UserError(f"initial={initial!r}: must be one of {', '.join(INITIAL)}")
    if fit_draws < 2:
        raise UserError(f"fit_draws={fit_draws}: must be at least 2")
    if not inflation > 0:
        raise UserError(f"inflation={inflation}: must be positive")


def proposal(key: Array, state: State, method: Method, x: Array, initial: str, draws: int, inflation: float) -> Distribution:
    """The distribution over z that an estimator for the example x [*x] starts from.

    Args:
      key: of the encoder's noise.
      state: one run's, without a leading axis of seeds.
      method: with a prior, and for 'encoder' an encoder.
      x: one example.
      initial: 'prior'; 'encoder' for a Gaussian with the moments of q(z|x): those that the encoder gives, or else those of
        some draws; or 'semi_implicit' for a mixture of a semi-implicit encoder's conditionals at some draws of its noise, and
        for a tenth that Gaussian. An implicit q(z|x) has no density of its own to weigh by.
      draws: of z that moments are taken from; of noise that the mixture has a component of each of.
      inflation: of the standard deviation, since a proposal narrower than the posterior gives weights of unbounded variance.

    Raises:
      UserError: not 'prior' where the prior does not cover all vectors, as a Gaussian does.
    """
    if initial == "prior":
        return prior_at(method, state)
    if lacking := lacks_all_vectors(method.prior):
        raise UserError(f"initial={initial!r}: fits a Gaussian, but {method.name} {lacking}")
    posterior = method.encode(key, state, x[None], draws)
    if posterior.mean is not None and posterior.std is not None:
        mean, std = posterior.mean[0], posterior.std[0]
    else:
        z = posterior.z[:, 0]
        mean, std = z.mean(axis=0), z.std(axis=0, ddof=1)
    std = jnp.maximum(inflation * std, SMALLEST_STD)
    if initial == "encoder":
        return normal(mean, std)
    means, stds = (moment[:, 0] for moment in posterior.conditional)
    components = normal(jnp.concatenate([means, mean[None]]), jnp.concatenate([inflation * stds, std[None]]))
    shares = jnp.append(jnp.full(draws, (1.0 - BROAD) / draws), BROAD)
    return MixtureSameFamily(Categorical(probs=shares), components)


def lacks(initial: str, method: Method) -> str:
    """What the method does not have that `proposal` needs; '' where it has all."""
    if initial == "prior":
        return "has no prior to start from" if method.prior is None else ""
    if method.encode is None:
        return "has no encoder to fit a proposal to; use initial='prior'"
    if initial == "semi_implicit" and not method.semi_implicit:
        return "has no encoder that is semi-implicit; use initial='encoder'"
    return lacks_all_vectors(method.prior)


def lacks_all_vectors(prior: Distribution | None) -> str:
    """That a prior does not cover all vectors, in words; '' where it does, or is not known."""
    if prior is None or prior.support in (constraints.real_vector, constraints.independent(constraints.real, 1)):
        return ""
    kind = type(prior.base_dist if isinstance(prior, Independent) else prior).__name__
    return f"has a prior that does not cover all vectors, {kind}; use ImportanceSampling(initial='prior')"
