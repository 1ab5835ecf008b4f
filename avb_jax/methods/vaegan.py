"""VAE/GAN (Larsen et al. 2016): a VAE whose reconstructions are measured in a layer of an adversary of images.

The adversary (`networks.ImageAdversary`) compares data with reconstructions and with samples, and lends its features f to
-log N(f(x); f(dec(z)), I), which stands in the place of -log p(x|z). So there is no likelihood of x, and no ELBO of x.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import divergences, players
from avb_jax.distributions import Likelihood, deterministic, kl_divergence, normal
from avb_jax.method import Method, identity
from avb_jax.methods import gan, generator
from avb_jax.methods.update import Generative, adversarial_step, of_both, warmup
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Draws, Players, PyTree, State, UserError


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats unless said otherwise."""

    feature_distance: Array  # 1/2 |f(x) - f(dec(z))|^2 in the adversary's features
    kl: Array  # KL(q(z|x), p(z))
    beta: Array  # [] weight of the KL term in this step
    adversary_loss: Array
    adversary_accuracy: Array
    adversary_saturation: Array


def losses(
    params: Players,
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    prior: Distribution,
    likelihood: Likelihood,
    feature_weight: float = 1.0,
    generator_divergence: Callable = divergences.generate_non_saturating,
    beta: Array | float = 1.0,
) -> tuple[Players, Generative]:
    """One loss per player (algorithm 1 of Larsen et al. 2016).

        encoder  beta KL(q(z|x), p(z)) + 1/2 |f(x) - f(dec(z))|^2
        decoder  gamma 1/2 |f(x) - f(dec(z))|^2 + g(T(dec(z))) + g(T(dec(z_prior)))

    gamma is `feature_weight`, and g the `generator_divergence`, softplus(-T) by default. A squared distance in features is
    -log N(f(x); f(dec(z)), I) up to a constant.

    Returns:
      The two losses, and a `Generative` with `terms` (feature distance, KL) [B] and `compared` reconstructions and samples
      [2, B, ...].

    Raises:
      UserError: the posterior is not Gaussian, or the adversary has no features.
    """
    posterior, encoder = players.encode(
        networks.encoder, params.encoder, collections.encoder, draws.x, draws.noise, prior.event_shape[0], train=True
    )
    if not posterior.gaussian:
        raise UserError(
            f"encoder={networks.encoder.name}: a VAE/GAN needs an encoder that returns Posterior(z, mean, std, gaussian=True)"
        )
    z = jnp.concatenate([posterior.z[0], draws.z_prior[0]])
    of_x, decoder = generator.decode(networks.decoder, likelihood, params.decoder, collections.decoder, z, train=True)
    images = of_x.mean.reshape(2, *draws.x.shape)
    output, _ = gan.evaluate_images(networks.adversary, adversary, collections.adversary, draws.x, images)
    if output.features is None:
        raise UserError(
            f"adversary={networks.adversary.name}: a VAE/GAN needs features; return AdversaryOutput(t, features [B, F])"
        )
    distance = 0.5 * jnp.sum(jnp.square(output.features[0] - output.features[1]), axis=-1)
    q = normal(posterior.mean, posterior.std)
    kl = kl_divergence(q, prior)
    kl = jnp.mean(q.log_prob(posterior.z) - prior.log_prob(posterior.z), axis=0) if kl is None else kl
    fooling = jnp.sum(generator_divergence(output.t[1:]), axis=0)
    by_player = Players(jnp.mean(beta * kl + distance), jnp.mean(feature_weight * distance + fooling))
    return by_player, Generative((distance, kl), images, collections._replace(encoder=encoder, decoder=decoder))


def gradients(losses: Callable, params: Players, *arguments) -> tuple[Players, Generative]:
    """Each player's gradient of its own loss, and the second part of `losses`."""
    by_player, pull, generative = jax.vjp(lambda params: losses(params, *arguments), params, has_aux=True)
    one, zero = jnp.ones_like(by_player.encoder), jnp.zeros_like(by_player.encoder)
    (encoder,), (decoder,) = pull(Players(one, zero)), pull(Players(zero, one))
    return Players(encoder.encoder, decoder.decoder), generative


def vaegan(
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
    feature_weight: float = 1.0,
    adversary_steps: int = 1,
    gradient_penalty: float = 0.0,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """A VAE/GAN.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` that says that it is Gaussian.
      decoder: z [B, Z] -> what `likelihood` takes.
      adversary: x [B, ...] -> an `AdversaryOutput` with features.
      prior: p(z), a NumPyro distribution over vectors.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      likelihood: the decoder's output -> a distribution, of which the mean is what the model generates.
      divergence: the adversary's objective, one of `divergences`.
      generator_divergence: the decoder's adversarial objective, one of `divergences.GENERATOR_DIVERGENCES`.
      feature_weight: gamma, of the feature distance in the decoder's loss.
      adversary_steps: adversary updates per step.
      gradient_penalty: weight of R1, see `penalty`.
      beta: weight of the KL term once warmed up.
      beta_warmup: steps over which the weight rises linearly from 0.
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the decoder's output"),
        noise_dim=at_least(noise_dim, 1),
        generator_divergence=(generator_divergence, callable(generator_divergence), "a function of avb_jax.divergences"),
        feature_weight=at_least(feature_weight, 0),
        adversary_steps=at_least(adversary_steps, 1),
        gradient_penalty=at_least(gradient_penalty, 0),
        beta=at_least(beta, 0),
        beta_warmup=at_least(beta_warmup, 0),
    )
    optimizers = generator.for_each(optimizers)
    networks = players.prepare(Players(encoder, decoder, gan.of_images(adversary)), optimizers, prior, Players._fields)
    loss = functools.partial(
        losses,
        networks=networks,
        prior=prior,
        likelihood=likelihood,
        feature_weight=feature_weight,
        generator_divergence=generator_divergence,
    )
    loss_of_t = functools.partial(
        gan.adversary_loss, networks=networks, divergence=divergence, gradient_penalty=gradient_penalty
    )
    beta_at = warmup(beta, beta_warmup)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, prior, noise_dim, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        beta = beta_at(state.step)
        weighted = functools.partial(loss, beta=beta)
        state, (distance, kl), terms = adversarial_step(
            key,
            state,
            draw=lambda key: players.draw(key, x, prior, noise_dim),
            loss=weighted,
            adversary_loss=loss_of_t,
            gradients=functools.partial(of_both, of_players=functools.partial(gradients, weighted)),
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            reduce=reduce,
        )
        return state, Info(distance, kl, beta, terms.loss, terms.accuracy, terms.saturation)

    return Method("vaegan", init, train_step, **generator.capabilities(networks, prior, likelihood, noise_dim, density=False))
