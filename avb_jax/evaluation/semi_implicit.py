"""The ELBO of a semi-implicit q(z|x) between two stochastic bounds, whatever a T says of it."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.method import Method, prior_at
from avb_jax.semi_implicit import log_conditional
from avb_jax.settings import check_counts
from avb_jax.types import Array, State


class SemiImplicitEstimate(NamedTuple):
    """Per example, in nats."""

    elbo_lower: Array  # [N] on average below the ELBO
    elbo_upper: Array  # [N] on average above it
    kl_lower: Array  # [N] of KL(q(z|x), p(z)), likewise
    kl_upper: Array  # [N]
    standard_error: Array  # [N] of elbo_lower, from the spread of the draws


@dataclasses.dataclass(frozen=True)
class SemiImplicit(Estimator):
    """Bounds the ELBO and KL(q(z|x), p(z)) of a semi-implicit encoder from both sides (`avb_jax.semi_implicit`).

    They hold of q itself, without T, k-NN or a fitted density: an ELBO under T that lies outside is wrong. Their distance,
    `width`, falls as `inner` grows, and says how sharply q's draws of u lie apart.

    Attributes:
      draws: of z per example.
      inner: K, further draws of u that each of them is scored by.
      inner_chunk: of these at once, which changes memory, not what is estimated.

    Raises:
      UserError: a setting out of range.
    """

    draws: int = 16
    inner: int = 1000
    inner_chunk: int = 250
    chunk: int = 20

    name: ClassVar[str] = "semi_implicit"
    requires: ClassVar[tuple[str, ...]] = ("log_joint", "encode")

    def __post_init__(self):
        check_counts(draws=self.draws, inner=self.inner, inner_chunk=self.inner_chunk, chunk=self.chunk, images=self.images)

    def lacks(self, method: Method) -> str:
        """As `Estimator`'s; an encoder that is semi-implicit too."""
        return super().lacks(method) or ("" if method.semi_implicit else "has no encoder that is semi-implicit")

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> SemiImplicitEstimate:
        """The bounds for one example."""
        own_key, inner_key = jax.random.split(key)
        posterior = method.encode(own_key, state, x[None], self.draws)
        z = posterior.z[:, 0]
        own = log_conditional(posterior.z, posterior.conditional)[..., 0].diagonal()  # [draws] at each draw's own u

        def more(key: Array) -> Array:
            others = method.encode(key, state, x[None], size).conditional
            return jax.nn.logsumexp(log_conditional(posterior.z, others)[..., 0], axis=1)

        size = min(self.inner_chunk, self.inner)
        count = -(-self.inner // size)
        others = jax.nn.logsumexp(jax.lax.map(more, jax.random.split(inner_key, count)), axis=0)
        lower = others - jnp.log(count * size)
        upper = jnp.logaddexp(others, own) - jnp.log(count * size + 1)
        log_joint, log_prior = (
            method.log_joint(state, jnp.broadcast_to(x, (len(z), *x.shape)), z),
            prior_at(method, state).log_prob(z),
        )
        below = log_joint - upper
        spread = jnp.std(below, ddof=1) if self.draws > 1 else jnp.nan
        return SemiImplicitEstimate(
            below.mean(),
            (log_joint - lower).mean(),
            (lower - log_prior).mean(),
            (upper - log_prior).mean(),
            spread / jnp.sqrt(self.draws),
        )

    def numbers(self, subject, found: SemiImplicitEstimate) -> dict[tuple[str, str], Number]:
        quantities = {name: mean(getattr(found, name)) for name in ("elbo_upper", "kl_lower", "kl_upper")}
        quantities = {"elbo_lower": mean(found.elbo_lower, found.standard_error)} | quantities
        quantities["elbo_width"] = mean(np.asarray(found.elbo_upper) - np.asarray(found.elbo_lower))
        return {(quantity, self.name): number for quantity, number in quantities.items()}

    def describe(self, found: SemiImplicitEstimate) -> str:
        return f"{so_far('ELBO at least', found.elbo_lower)}, {so_far('at most', found.elbo_upper)}"
