"""Log-likelihood by annealed importance sampling with HMC, from below (forward) and from above (reverse).

Neal (2001); for decoders, Wu, Burda, Salakhutdinov & Grosse (2016). The path from an initial f_0 to f_1(z) = p(x, z) is
geometric, log f_beta = log f_0 + beta * excess with excess = log f_1 - log f_0, and beta climbs a sigmoid.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from avb_jax.evaluation import proposal
from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.evaluation.examples import sum_up
from avb_jax.method import Method
from avb_jax.settings import check_counts
from avb_jax.types import Array, State

TARGET_ACCEPTANCE = 0.65  # optimal for HMC in many dimensions (Neal 2011)
PILOTS = 2  # chains that choose the step size for the others
ADAPTATION_RATE = 0.05  # of the log step size, per unit of acceptance off target
FIRST_STEP_SIZE = 0.5  # in standard deviations of f_0
JITTER = 0.2  # relative; a fixed trajectory length returns to where it began on some Gaussians
INITIAL = "encoder"
SIGMOID_REACH = 4.0  # delta of Wu et al. (2016)
DIVERGED = 0.1  # share of a chain's transitions from which on the chain is reported

LogDensity = Callable[[Array], Array]  # z [Z] -> [] nats


class AnnealedEstimate(NamedTuple):
    """Per example, from K chains over T temperatures."""

    log_likelihood: Array  # [N] log-mean weight, nats: a stochastic lower bound on log p(x)
    standard_error: Array  # [N] of log_likelihood, nats
    effective_sample_size: Array  # [N] in [1, K]
    mean_log_weight: Array  # [N] a lower bound too, looser and less noisy
    log_weight: Array  # [N, K]
    divergent: Array  # [N, K] share of a chain's transitions with an energy error over 1,000 nats or not a number
    effective_sample_size_path: Array  # [N, T] of the weights up to each temperature
    acceptance: Array  # [N, T] mean acceptance probability of the chains
    step_size: Array  # [N, T] of the leapfrog integrator, in standard deviations of f_0


@dataclasses.dataclass(frozen=True)
class AIS(Estimator):
    """Estimates log p(x) of each example by annealed importance sampling.

    Two more chains than `chains` run along and choose the step size, towards an acceptance of 0.65. They have no part in the
    estimate: chains that chose their own step sizes would no longer leave each f_beta invariant, and the weights would be
    biased.

    Attributes:
      chains: K per example.
      temperatures: T, of which each has one HMC transition.
      leapfrog_steps: gradients of the decoder per transition.
      initial: f_0, 'prior' or 'encoder', see `proposal.proposal`.
      fit_draws: draws that 'encoder' is fitted to.
      inflation: of its standard deviation.

    Raises:
      UserError: a setting out of range.
    """

    chains: int = 16
    temperatures: int = 500
    leapfrog_steps: int = 10
    initial: str = INITIAL
    fit_draws: int = 64
    inflation: float = 1.2
    chunk: int = 20

    name: ClassVar[str] = "ais"
    requires: ClassVar[tuple[str, ...]] = ("log_joint",)

    def __post_init__(self):
        check_counts(
            chains=self.chains,
            temperatures=self.temperatures,
            leapfrog_steps=self.leapfrog_steps,
            chunk=self.chunk,
            images=self.images,
        )
        proposal.check(self.initial, self.fit_draws, self.inflation)

    def lacks(self, method: Method) -> str:
        """As `Estimator`'s; an encoder too, where f_0 is fitted to it, and a prior over all vectors, where chains can move."""
        return super().lacks(method) or proposal.lacks(self.initial, method) or proposal.lacks_all_vectors(method.prior)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> AnnealedEstimate:
        """The estimate for one example."""
        fit_key, chains_key = jax.random.split(key)
        start = proposal.proposal(fit_key, state, method, x, self.initial, self.fit_draws, self.inflation)
        log_density = lambda z: method.log_joint(state, x[None], z[None])[0]  # noqa: E731
        return forward(chains_key, log_density, start, schedule(self.temperatures), self.chains, self.leapfrog_steps)

    def numbers(self, subject, found: AnnealedEstimate) -> dict[tuple[str, str], Number]:
        note_divergence(subject, self.name, found.divergent)
        return {
            ("log_likelihood", self.name): mean(found.log_likelihood, found.standard_error),
            ("effective_sample_size", self.name): mean(found.effective_sample_size),
            ("acceptance", self.name): mean(found.acceptance.mean(axis=1)),
            ("divergent", self.name): mean(found.divergent.mean(axis=1)),
        }

    def describe(self, found: AnnealedEstimate) -> str:
        return so_far("log-likelihood", found.log_likelihood)


def note_divergence(subject, what: str, divergent: np.ndarray) -> None:
    """Notes chains [N, K] that diverged."""
    count = int(np.sum(divergent > DIVERGED))
    if count:
        subject.note(
            f"{what}: {count} of {divergent.size} chains diverged in more than {DIVERGED:.0%} of their transitions; they "
            "count, and lower the estimate; raise ais.temperatures, so that the step size has time to adapt"
        )


def schedule(temperatures: int) -> Array:
    """Inverse temperatures beta [T + 1] from 0 to 1 on a sigmoid, so that they are dense at both ends.

    Raises:
      UserError: none at all.
    """
    check_counts(temperatures=temperatures)
    sigmoid = jax.nn.sigmoid(SIGMOID_REACH * jnp.linspace(-1.0, 1.0, temperatures + 1))
    return (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0])


def forward(
    key: Array, log_density: LogDensity, start: Distribution, betas: Array, chains: int, leapfrog_steps: int
) -> AnnealedEstimate:
    """Anneals from f_0 = `start` to f_1 = exp `log_density`, for one example: fields without their [N]."""
    from blackjax.mcmc import hmc  # which starts JAX's backend where it is imported

    start_key, sweep_key = jax.random.split(key)
    z = start.sample(start_key, (PILOTS + chains,))
    states = jax.vmap(lambda z: hmc.init(z, _between(log_density, start, betas[1])))(z)
    first_weight = states.logdensity - start.log_prob(z)  # (beta_1 - 0) * excess
    after = jnp.append(betas[2:], 1.0)
    trace = _sweep(sweep_key, states, log_density, start, betas[1:], after, leapfrog_steps, None)
    log_weights = (first_weight + jnp.cumsum(trace.increment, axis=0))[:, PILOTS:]
    summary = sum_up(log_weights[-1])
    return AnnealedEstimate(
        *summary,
        log_weights[-1].mean(),
        log_weights[-1],
        trace.divergent[:, PILOTS:].mean(axis=0),
        jax.vmap(sum_up)(log_weights).effective_sample_size,
        trace.acceptance[:, PILOTS:].mean(axis=1),
        trace.step_size,
    )


def reverse(
    key: Array,
    log_density: LogDensity,
    start: Distribution,
    betas: Array,
    chains: int,
    leapfrog_steps: int,
    z: Array,
    step_size: Array,
) -> Array:
    """Anneals back from an exact posterior sample z [Z] to f_0: log weights [K] whose mean weight estimates 1 / p(x).

    `step_size` [T] must not depend on z: give it the forward chains'. The transitions at beta = 1, which come first, leave
    the posterior as it is and take the chains apart.
    """
    from blackjax.mcmc import hmc

    states = jax.vmap(lambda z: hmc.init(z, log_density))(jnp.broadcast_to(z, (chains, *z.shape)))
    return _sweep(key, states, log_density, start, betas[:0:-1], betas[-2::-1], leapfrog_steps, step_size[::-1]).increment.sum(
        axis=0
    )


class _Trace(NamedTuple):
    increment: Array  # [T, K] of the log weights
    divergent: Array  # [T, K]
    acceptance: Array  # [T, K]
    step_size: Array  # [T]


def _sweep(key, states, log_density, start, betas, after, leapfrog_steps, step_sizes) -> _Trace:
    """Transitions at each of `betas` [T], and from each to its neighbour in `after` [T] the log weights' increments.

    `states` are K chains at betas[0]. Where `step_sizes` is None, the first PILOTS chains adapt it.
    """
    from blackjax.mcmc import hmc

    kernel = hmc.build_kernel()
    try:
        variance = jnp.where(jnp.isfinite(start.variance), start.variance, 1.0)
    except NotImplementedError:  # of a prior that is a network, say
        variance = jnp.ones(start.event_shape)

    def body(carry, step):
        states, log_step = carry
        key, beta, next_beta, given = step
        step_size = jnp.exp(log_step) if given is None else given
        kernel_key, jitter_key = jax.random.split(key)
        keys = jax.random.split(kernel_key, len(states.logdensity))
        jittered = step_size * jax.random.uniform(jitter_key, keys.shape, minval=1.0 - JITTER, maxval=1.0 + JITTER)
        states, info = jax.vmap(
            lambda key, state, size: kernel(key, state, _between(log_density, start, beta), size, variance, leapfrog_steps)
        )(keys, states, jittered)
        # On the path all values follow from those at beta: no gradient is spent on a change of temperature.
        base, base_gradient = jax.vmap(jax.value_and_grad(start.log_prob))(states.position)
        ratio = next_beta / beta
        excess = states.logdensity - base  # times beta
        states = states._replace(
            logdensity=base + ratio * excess,
            logdensity_grad=base_gradient + ratio * (states.logdensity_grad - base_gradient),
        )
        log_step += ADAPTATION_RATE * (info.acceptance_rate[:PILOTS].mean() - TARGET_ACCEPTANCE)
        trace = _Trace((ratio - 1.0) * excess, info.is_divergent.astype(jnp.float32), info.acceptance_rate, step_size)
        return (states, log_step), trace

    keys = jax.random.split(key, len(betas))
    first = (states, jnp.log(FIRST_STEP_SIZE))
    return jax.lax.scan(body, first, (keys, betas, after, step_sizes))[1]


def _between(log_density: LogDensity, start: Distribution, beta: Array) -> LogDensity:
    def between(z: Array) -> Array:
        base = start.log_prob(z)
        return base + beta * (log_density(z) - base)

    return between
