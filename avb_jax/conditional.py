"""Plug & play sampling: codes of a trained model under a condition that the user gives (Nguyen et al. 2016).

Draws from p(z | condition), proportional to p(z) exp(log_condition(p(x|z))), by Hamiltonian Monte Carlo over any method with a
decoder: the condition may be a classifier's log probability of a class, a known part of the image, or any score. Nothing is
trained. With one leapfrog step a transition is MALA, of which the paper's sampler is an approximation.

The method's own encoder can be asked about a known part as well (`by_encoder`), although it was trained on whole images.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution, Independent

from avb_jax.distributions import log_likelihood
from avb_jax.evaluation.proposal import lacks_all_vectors
from avb_jax.method import Method, prior_at
from avb_jax.models import has_mean
from avb_jax.settings import at_least, check_settings
from avb_jax.streams import stream
from avb_jax.types import Array, State, UserError

DECAY = 0.6  # transition t adapts the log step size by t^-DECAY times how far acceptance is from its target (Robbins-Monro)
JITTER = 0.2  # of the step size, either way, without which a chain may return to where it came from
FIRST_STEP_SIZE = 0.1


class Conditional(NamedTuple):
    """Draws of independent chains."""

    z: Array  # [count, Z]
    log_condition: Array  # [count] at z
    acceptance: Array  # [count] mean over the second half of the transitions; a chain near 0 has not moved


def sample(
    key: Array,
    method: Method,
    state: State,
    log_condition: Callable[[Distribution], Array],
    *,
    count: int = 16,
    steps: int = 500,
    leapfrog_steps: int = 10,
    starts: int = 64,
    acceptance: float = 0.8,
) -> Conditional:
    """Draws z from p(z | condition), each the end of a chain of its own.

    A chain begins at one of `starts` draws from the prior, chosen by how well they meet the condition; its step size is adapted
    over the first half of its transitions.

    Args:
      key: of all that is random.
      method: with a decoder and a prior over all vectors.
      state: of one seed.
      log_condition: p(x|z) of one code, a distribution with batch shape [1] -> log c [], nats, up to a constant; such as
        `known` and `of_class` make.
      count: chains.
      steps: transitions of each.
      leapfrog_steps: of a transition; 1 is MALA.
      starts: prior draws that a chain may begin at.
      acceptance: that the step size is adapted to.

    Raises:
      UserError: a setting out of its range, or a method without a decoder or such a prior.
    """
    check_settings(
        count=at_least(count, 1),
        steps=at_least(steps, 2),
        leapfrog_steps=at_least(leapfrog_steps, 1),
        starts=at_least(starts, 1),
        acceptance=(acceptance, 0 < acceptance < 1, "between 0 and 1"),
    )
    if method.decode is None or method.prior is None:
        raise UserError(f"method={method.name!r}: has no codes to draw; take one with a decoder of latents")
    if lacking := lacks_all_vectors(method.prior):
        raise UserError(f"method={method.name!r}: {lacking.partition(';')[0]}")
    from blackjax.mcmc import hmc  # which starts JAX's backend where it is imported

    prior, kernel = prior_at(method, state), hmc.build_kernel()

    def score(z: Array) -> Array:
        return log_condition(method.decode(state, z[None]))

    def log_density(z: Array) -> Array:
        return prior.log_prob(z) + score(z)

    def chain(key: Array) -> Conditional:
        start_key, choice_key, run_key = (stream(key, name) for name in ("start", "choice", "run"))
        candidates = prior.sample(start_key, (starts,))
        first = candidates[jax.random.categorical(choice_key, jax.lax.map(score, candidates))]
        variance = jnp.ones_like(first)

        def transition(carry: tuple, given: tuple) -> tuple[tuple, Array]:
            chain_state, log_step = carry
            key, rate = given
            kernel_key, jitter_key = jax.random.split(key)
            size = jnp.exp(log_step) * jax.random.uniform(jitter_key, minval=1.0 - JITTER, maxval=1.0 + JITTER)
            chain_state, info = kernel(kernel_key, chain_state, log_density, size, variance, leapfrog_steps)
            log_step += rate * (info.acceptance_rate - acceptance)
            return (chain_state, log_step), info.acceptance_rate

        number = jnp.arange(1, steps + 1)
        rates = jnp.where(number <= steps // 2, number**-DECAY, 0.0)
        begin = hmc.init(first, log_density), jnp.log(FIRST_STEP_SIZE)
        (end, _), accepted = jax.lax.scan(transition, begin, (jax.random.split(run_key, steps), rates))
        return Conditional(end.position, score(end.position), accepted[steps // 2 :].mean())

    return jax.jit(jax.vmap(chain))(jax.random.split(key, count))


def by_encoder(key: Array, method: Method, state: State, x: Array, mask: Array, *, count: int = 16, rounds: int = 50) -> Array:
    """Draws z [count, Z] given the part of an image x [*x] where the mask is 1, by the encoder: z ~ q(z|x), the rest ~ p(x|z).

    Each is the end of a chain of its own that alternates between the two, from a draw of the prior (Rezende, Mohamed & Wierstra
    2014, appendix F). Where q(z|x) is the posterior, p(z | the known part) is what the chain settles to.

    Args:
      key: of all that is random.
      method: with an encoder and a decoder.
      state: of one seed.
      x: the image [*x], pixels in [0, 1]; where the mask is 0 it is not read.
      mask: 1 where it is known [*x].
      count: chains.
      rounds: of each: a draw of the rest, and one of z.

    Raises:
      UserError: a setting out of its range, or a method without an encoder or a decoder.
    """
    check_settings(count=at_least(count, 1), rounds=at_least(rounds, 1))
    if method.encode is None or method.decode is None:
        raise UserError(f"method={method.name!r}: has no encoder and decoder to alternate between; take one that has both")

    def alternate(z: Array, key: Array) -> tuple[Array, None]:
        image_key, encoder_key = jax.random.split(key)
        images = method.decode(state, z).sample(image_key)
        return method.encode(encoder_key, state, jnp.where(mask > 0, x, images)).z, None

    first = prior_at(method, state).sample(stream(key, "prior"), (count,))
    return jax.lax.scan(alternate, first, jax.random.split(stream(key, "rounds"), rounds))[0]


def known(x: Array, mask: Array) -> Callable[[Distribution], Array]:
    """The condition that an image is x [*x] where the mask is 1, by p(x|z) of those pixels.

    Raises:
      UserError: where it is called, a p(x|z) whose pixels are not independent given z.
    """

    def log_condition(of_x: Distribution) -> Array:
        if not isinstance(of_x, Independent):
            raise UserError(
                f"known: pixels of {type(of_x).__name__} are not independent given z; take an independent likelihood"
            )
        base, dims = of_x.base_dist, of_x.reinterpreted_batch_ndims
        # What is not known has no part in gradients, either, whatever is in its place.
        by_pixel = log_likelihood(base, jnp.where(mask > 0, x, 0.5)[None])
        if by_pixel.ndim != dims + 1:
            raise UserError(f"known: log p(x|z) has shape {by_pixel.shape}, not one number per pixel")
        return jnp.sum(jnp.where(mask[None] > 0, by_pixel, 0.0))

    return log_condition


def of_class(log_probabilities: Callable[[Array], Array], label: int | Array) -> Callable[[Distribution], Array]:
    """The condition that a classifier, x [1, *x] -> log probabilities [1, classes], sees a class in the mean of p(x|z).

    Raises:
      UserError: where it is called, a p(x|z) without a mean in closed form.
    """

    def log_condition(of_x: Distribution) -> Array:
        if not has_mean(of_x):
            raise UserError(f"of_class: {type(of_x).__name__} has no mean to show to a classifier; take independent pixels")
        return log_probabilities(of_x.mean)[0, label]

    return log_condition
