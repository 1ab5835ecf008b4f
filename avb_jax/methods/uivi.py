"""Unbiased implicit variational inference (Titsias & Ruiz 2019): AVB's rival that samples where T estimates.

The gradient of log q(z|x) of a semi-implicit q is the mean of that of log q(z|x, noise) over noise from q(noise|x, z), which
Hamiltonian Monte Carlo draws from. It begins at the noise that z was made of, an exact draw already; but the gradient needs
draws that are independent of that noise given z, and so the first ones are left out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood, log_likelihood, normal, standard_normal
from avb_jax.importance import log_mean
from avb_jax.method import Method
from avb_jax.methods import generator
from avb_jax.methods.bound import check_semi_implicit, method_of_bound
from avb_jax.methods.update import Generative
from avb_jax.network import as_network
from avb_jax.priors import at
from avb_jax.semi_implicit import log_conditional, smoothed
from avb_jax.settings import at_least, check_settings
from avb_jax.streams import stream
from avb_jax.types import Array, Draws, Players, State, Terms


def negative_elbo_unbiased(
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
    """A loss with the gradient of the negative ELBO (Titsias & Ruiz 2019), whose own value says nothing.

    Args:
      params: the encoder's and the decoder's.
      collections: every player's.
      draws: x [B, ...] and noise [2 + M, B, N]: z is drawn given the first, by the first Z numbers of the second, and the
        others are draws from q(noise|x, z). (What the encoder itself makes z of depends on z in another way.)
      networks: every player's.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      beta: weight of the KL term.
      train: whether batch normalisation uses this batch (and updates its statistics).

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B], whose kl is on average too large, since it has the harmonic mean
      of q(z|x, noise) for q(z|x), and `compared` z [1, B, Z].

    Raises:
      UserError: the encoder gives no conditional moments.
    """
    prior = at(prior, networks, params, collections)
    posterior, encoder = players.encode(
        networks.encoder, params.encoder, collections.encoder, draws.x, draws.noise, prior.event_shape[0], train=train
    )
    check_semi_implicit(posterior, networks)
    z = smoothed(posterior.conditional, draws.noise)
    of_x, decoder = generator.decode(networks.decoder, likelihood, params.decoder, collections.decoder, z, train=train)
    reconstruction = -log_likelihood(of_x, draws.x)

    log_q, harmonic = log_density_of_chains(z, tuple(moment[2:] for moment in posterior.conditional))
    kl = log_q - prior.log_prob(z)
    terms = Terms(reconstruction, harmonic - prior.log_prob(jax.lax.stop_gradient(z)))
    after = collections._replace(encoder=encoder, decoder=decoder)
    return jnp.mean(reconstruction + beta * kl), Generative(terms, z[None], after)


def uivi(
    encoder: Any,
    decoder: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    burn_in: int = 5,
    chain_steps: int = 5,
    leapfrog_steps: int = 5,
    step_size: float = 0.1,
    beta: float = 1.0,
    beta_warmup: int = 0,
) -> Method:
    """Unbiased implicit variational inference.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> a `Posterior` with conditional moments, such as `networks.SemiImplicitEncoder`'s.
        The chains see it in evaluation mode.
      decoder: z [B, Z] -> what `likelihood` takes.
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      burn_in: steps of the chain before those, which forget the noise that z was made of.
      chain_steps: M, of Hamiltonian Monte Carlo on the noise, over whose states the gradient is averaged.
      leapfrog_steps: of each.
      step_size: of these; the noise is N(0, I) before z is known, and narrower after.
      beta: weight of the KL term once warmed up; 1 is the ELBO.
      beta_warmup: steps over which the weight rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(
        burn_in=at_least(burn_in, 0),
        chain_steps=at_least(chain_steps, 1),
        leapfrog_steps=at_least(leapfrog_steps, 1),
        step_size=(step_size, step_size > 0, "positive"),
    )
    network = as_network(encoder)

    def with_chains(key: Array, state: State, draws: Draws) -> Draws:
        x = draws.x

        def encode(x: Array, noise: Array):
            of_encoder = state.params.encoder, state.collections.encoder
            return players.encode(network, *of_encoder, x, noise, prior.event_shape[0], train=False)[0]

        posterior = encode(x, draws.noise[:1])
        check_semi_implicit(posterior, Players(network))
        z = smoothed(posterior.conditional, draws.noise)

        def given(x: Array, noise: Array) -> tuple[Array, Array]:
            mean, std = encode(x[None], noise[None, None]).conditional
            return mean[0, 0], std[0, 0]

        steps = {"burn_in": burn_in, "chain_steps": chain_steps, "leapfrog_steps": leapfrog_steps, "step_size": step_size}
        noise = chains_of_noise(stream(key, "chains"), given, x, z, draws.noise[0], **steps)
        return draws._replace(noise=jnp.concatenate([draws.noise, noise]))

    return method_of_bound(
        "uivi",
        negative_elbo_unbiased,
        2,
        with_chains,
        networks=Players(network, decoder),
        prior=prior,
        likelihood=likelihood,
        optimizers=optimizers,
        noise_dim=noise_dim,
        beta=beta,
        beta_warmup=beta_warmup,
    )


def chains_of_noise(
    key: Array,
    given: Callable[[Array, Array], tuple[Array, Array]],
    x: Array,
    z: Array,
    noise: Array,
    *,
    burn_in: int,
    chain_steps: int,
    leapfrog_steps: int,
    step_size: float,
) -> Array:
    """States [chain_steps, B, N] of chains that leave q(noise|x, z) as it is, begun at the noise [B, N] that z was made of.

    Args:
      key: of the chains.
      given: (x [...], noise [N]) -> the moments [Z] of z given that noise.
      x: [B, ...].
      z: [B, Z].
      noise: [B, N].
      burn_in: states that are left out, the first ones.
      chain_steps: states after these.
      leapfrog_steps: of Hamiltonian Monte Carlo, for each state.
      step_size: of these.
    """
    from blackjax.mcmc import hmc  # which starts JAX's backend where it is imported

    kernel = hmc.build_kernel()

    def chain(key: Array, x: Array, z: Array, noise: Array) -> Array:
        def log_density(noise: Array) -> Array:
            return normal(*given(x, noise)).log_prob(z) + standard_normal(len(noise)).log_prob(noise)

        def body(state, key: Array):
            state = kernel(key, state, log_density, step_size, jnp.ones_like(noise), leapfrog_steps)[0]
            return state, state.position

        return jax.lax.scan(body, hmc.init(noise, log_density), jax.random.split(key, burn_in + chain_steps))[1]

    return jax.vmap(chain, out_axes=1)(jax.random.split(key, len(z)), x, z, noise)[burn_in:]


def log_density_of_chains(z: Array, conditional: tuple[Array, Array]) -> tuple[Array, Array]:
    """What chains on the noise say of log q(z|x) at z [B, Z], where z given their M states has these moments [M, B, Z].

    Returns:
      What has the gradient of log q(z|x) by z, and a value that says nothing [B]; and the harmonic mean of q(z|x, noise), on
      average at least log q(z|x) [B], without a gradient: over noise from q(noise|x, z), E 1 / q(z|x, noise) = 1 / q(z|x).
    """
    fixed, given = jax.lax.stop_gradient((z, conditional))
    score = jax.grad(lambda z: jnp.sum(jnp.mean(normal(*given).log_prob(z), axis=0)))(fixed)  # [B, Z]
    return jnp.sum(score * z, axis=-1), -log_mean(-log_conditional(fixed[None], given)[0], axis=0)
