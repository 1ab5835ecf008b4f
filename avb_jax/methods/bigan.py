"""BiGAN (Donahue et al. 2016), or adversarially learned inference (Dumoulin et al. 2016); section 5.4 of the paper.

The adversary compares pairs (x, enc(x, noise)) of the data with pairs (dec(z), z) of the model: T* = log q(x, z) - log p(x, z).
There is no likelihood, and reconstructions come about only as far as encoder and decoder match.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import divergences, players
from avb_jax.distributions import Likelihood, deterministic
from avb_jax.method import Method, identity
from avb_jax.methods import generator
from avb_jax.methods.avb import adversary_terms
from avb_jax.methods.penalty import r1
from avb_jax.methods.update import Generative, adversarial_step
from avb_jax.settings import at_least, check_settings
from avb_jax.types import AdversaryTerms, Array, Draws, Players, PyTree, State


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats."""

    adversary_loss: Array
    adversary_accuracy: Array
    adversary_saturation: Array


def generative_loss(
    params: Players,
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    likelihood: Likelihood,
    generator_divergence: Callable = divergences.generate_non_saturating,
) -> tuple[Array, Generative]:
    """Each side's objective at its own pairs, by T; E softplus(T(x, enc(x))) + E softplus(-T(dec(z), z)) by default.

    Returns:
      The sum of the two, and a `Generative` without terms and with `compared` (z [1, B, Z] of the data, x [B, ...] of the
      model).
    """
    posterior, encoder = players.encode(
        networks.encoder, params.encoder, collections.encoder, draws.x, draws.noise, draws.z_prior.shape[-1], train=True
    )
    of_x, decoder = generator.decode(
        networks.decoder, likelihood, params.decoder, collections.decoder, draws.z_prior[0], train=True
    )
    compared = posterior.z, of_x.mean
    t, _ = both_sides(adversary, collections, draws, compared, networks=networks)
    loss = jnp.mean(generator_divergence(-t[0]) + generator_divergence(t[1]))
    return loss, Generative(None, compared, collections._replace(encoder=encoder, decoder=decoder))


def adversary_loss(
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    compared: tuple[Array, Array],
    *,
    networks: Players,
    divergence: Callable = divergences.jensen_shannon,
    gradient_penalty: float = 0.0,
) -> tuple[Array, tuple[AdversaryTerms, PyTree]]:
    """The adversary's loss over the two kinds of pairs, by the divergence; no gradient flows into `compared`.

    With `gradient_penalty` times `penalty.r1` at the data's pairs.
    """
    compared = jax.lax.stop_gradient(compared)
    t, after = both_sides(adversary, collections, draws, compared, networks=networks)
    loss, terms = adversary_terms(t, divergence)
    if gradient_penalty:

        def t_of(pair: tuple[Array, Array]) -> Array:
            x, z = pair
            return players.evaluate_pairs(networks.adversary, adversary, collections.adversary, x, z[None], train=True)[0][0]

        loss += gradient_penalty * jnp.mean(r1(t_of, (draws.x, compared[0][0])))
    return loss, (terms, after)


def both_sides(
    adversary: PyTree, collections: Players, draws: Draws, compared: tuple[Array, Array], *, networks: Players
) -> tuple[Array, PyTree]:
    """T [2, 1, B] at the data's pairs and at the model's, through one call, and the adversary's new collections."""
    z, x = compared
    pairs = jnp.concatenate([draws.x, x]), jnp.concatenate([z[0], draws.z_prior[0]])[None]
    t, after = players.evaluate_pairs(networks.adversary, adversary, collections.adversary, *pairs, train=True)
    return t.reshape(2, 1, -1), after


def bigan(
    encoder: Any,
    decoder: Any,
    adversary: Any,
    *,
    prior: Distribution,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    likelihood: Likelihood = deterministic,
    divergence: Callable = divergences.jensen_shannon,
    generator_divergence: Callable = divergences.generate_non_saturating,
    adversary_steps: int = 1,
    gradient_penalty: float = 0.0,
) -> Method:
    """A BiGAN.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> z [B, Z].
      decoder: z [B, Z] -> what `likelihood` takes.
      adversary: (x [B, ...], z [B, Z]) -> T [B].
      prior: p(z), a NumPyro distribution over vectors.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      likelihood: the decoder's output -> a distribution, of which the mean is what the model generates.
      divergence: the adversary's objective, one of `divergences`.
      generator_divergence: the encoder's and the decoder's objective, one of `divergences.GENERATOR_DIVERGENCES`.
      adversary_steps: adversary updates per step.
      gradient_penalty: weight of R1, see `penalty`.
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the decoder's output"),
        noise_dim=at_least(noise_dim, 1),
        generator_divergence=(generator_divergence, callable(generator_divergence), "a function of avb_jax.divergences"),
        adversary_steps=at_least(adversary_steps, 1),
        gradient_penalty=at_least(gradient_penalty, 0),
    )
    optimizers = generator.for_each(optimizers)
    networks = players.prepare(Players(encoder, decoder, adversary), optimizers, prior, Players._fields)
    loss = functools.partial(
        generative_loss, networks=networks, likelihood=likelihood, generator_divergence=generator_divergence
    )
    loss_of_t = functools.partial(adversary_loss, networks=networks, divergence=divergence, gradient_penalty=gradient_penalty)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, prior, noise_dim, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        state, _, terms = adversarial_step(
            key,
            state,
            draw=lambda key: players.draw(key, x, prior, noise_dim),
            loss=loss,
            adversary_loss=loss_of_t,
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            reduce=reduce,
        )
        return state, Info(terms.loss, terms.accuracy, terms.saturation)

    return Method("bigan", init, train_step, **generator.capabilities(networks, prior, likelihood, noise_dim, density=False))
