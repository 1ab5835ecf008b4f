"""The generative adversarial network (Goodfellow et al. 2014), with the DC-GAN's networks of Radford et al. (2015).

A decoder and an adversary of images (`networks.ImageAdversary`), no encoder and no likelihood: T* = log p_data(x) - log p(x).
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
from avb_jax.network import Network, as_network
from avb_jax.settings import at_least, check_settings
from avb_jax.types import AdversaryOutput, AdversaryTerms, Array, Draws, Players, PyTree, State


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
    """The decoder's objective at dec(z), z ~ p(z), by T; non-saturating by default, E softplus(-T(dec(z))).

    Returns:
      The loss, and a `Generative` without terms and with `compared` the generated images [1, B, ...].
    """
    of_x, decoder = generator.decode(
        networks.decoder, likelihood, params.decoder, collections.decoder, draws.z_prior[0], train=True
    )
    images = of_x.mean[None]
    output, _ = evaluate_images(networks.adversary, adversary, collections.adversary, draws.x, images)
    return jnp.mean(generator_divergence(output.t[1])), Generative(None, images, collections._replace(decoder=decoder))


def adversary_loss(
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    images: Array,
    *,
    networks: Players,
    divergence: Callable = divergences.jensen_shannon,
    gradient_penalty: float = 0.0,
) -> tuple[Array, tuple[AdversaryTerms, PyTree]]:
    """The adversary's loss, by the divergence: data [B, ...] against each of K sets of generated images [K, B, ...].

    With `gradient_penalty` times `penalty.r1` at the data.
    """
    output, after = evaluate_images(
        networks.adversary, adversary, collections.adversary, draws.x, jax.lax.stop_gradient(images)
    )
    real, generated = output.t[:1], output.t[1:]
    loss, terms = adversary_terms(jnp.stack([jnp.broadcast_to(real, generated.shape), generated]), divergence)
    if gradient_penalty:

        def t_of(x: Array) -> Array:
            return players.evaluate_adversary(networks.adversary, adversary, collections.adversary, x, None, train=True)[0].t

        loss += gradient_penalty * jnp.mean(r1(t_of, draws.x))
    return loss, (terms, after)


def evaluate_images(
    network: Network, params: PyTree, collections: dict, x: Array, images: Array
) -> tuple[AdversaryOutput, dict]:
    """T [1 + K, B], and the features [1 + K, B, F], of data x [B, ...] and K sets of images, through one call."""
    everything = jnp.concatenate([x[None], images])
    flat = everything.reshape(-1, *x.shape[1:])
    output, collections = players.evaluate_adversary(network, params, collections, flat, None, train=True)
    return jax.tree.map(lambda a: a.reshape(*everything.shape[:2], *a.shape[1:]), output), collections


def of_images(adversary: Any) -> Network | None:
    """An adversary of images alone, x [B, ...] -> T [B], as one of pairs that does not see z."""
    if (network := as_network(adversary)) is None:
        return None

    def init(key: Array, x: Array, z: Array) -> dict:
        del z
        return network.init(key, x)

    def apply(variables: dict, x: Array, z: Array | None, *, train: bool):
        del z
        return network.apply(variables, x, train=train)

    return network._replace(init=init, apply=apply)


def gan(
    decoder: Any,
    adversary: Any,
    *,
    prior: Distribution,
    optimizers: Players | optax.GradientTransformation,
    likelihood: Likelihood = deterministic,
    divergence: Callable = divergences.jensen_shannon,
    generator_divergence: Callable = divergences.generate_non_saturating,
    adversary_steps: int = 1,
    gradient_penalty: float = 0.0,
) -> Method:
    """A generative adversarial network.

    Args:
      decoder: z [B, Z] -> what `likelihood` takes.
      adversary: x [B, ...] -> T [B].
      prior: p(z), a NumPyro distribution over vectors.
      optimizers: an optax optimiser per player, or one for all.
      likelihood: the decoder's output -> a distribution, of which the mean is what the model generates.
      divergence: the adversary's objective, one of `divergences`.
      generator_divergence: the decoder's objective, one of `divergences.GENERATOR_DIVERGENCES`.
      adversary_steps: adversary updates per step.
      gradient_penalty: weight of R1, see `penalty`.
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the decoder's output"),
        generator_divergence=(generator_divergence, callable(generator_divergence), "a function of avb_jax.divergences"),
        adversary_steps=at_least(adversary_steps, 1),
        gradient_penalty=at_least(gradient_penalty, 0),
    )
    optimizers = generator.for_each(optimizers)
    networks = players.prepare(Players(None, decoder, of_images(adversary)), optimizers, prior, ("decoder", "adversary"))
    loss = functools.partial(
        generative_loss, networks=networks, likelihood=likelihood, generator_divergence=generator_divergence
    )
    loss_of_t = functools.partial(adversary_loss, networks=networks, divergence=divergence, gradient_penalty=gradient_penalty)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, prior, 1, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        state, _, terms = adversarial_step(
            key,
            state,
            draw=lambda key: players.draw(key, x, prior, 1),
            loss=loss,
            adversary_loss=loss_of_t,
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            reduce=reduce,
        )
        return state, Info(terms.loss, terms.accuracy, terms.saturation)

    return Method("gan", init, train_step, **generator.capabilities(networks, prior, likelihood, density=False))
