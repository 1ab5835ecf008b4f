"""Methods whose players all minimise one loss, a bound on the negative ELBO: no T, no game."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from numpyro.distributions import Distribution

from avb_jax import players
from avb_jax.distributions import Likelihood, normal
from avb_jax.method import Method, identity
from avb_jax.methods import generator
from avb_jax.methods.update import apply_gradients, mean_collections, warmup
from avb_jax.settings import at_least, check_settings
from avb_jax.types import Array, Draws, Players, Posterior, State, Terms, UserError


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats unless said otherwise."""

    elbo: Array
    reconstruction: Array  # -log p(x|z)
    kl: Array  # KL(q(z|x), p(z)), exact, estimated or bounded from above, as the method's loss has it
    beta: Array  # [] weight of the KL term in this step


def method_of_bound(
    name: str,
    loss: Callable,
    draws: int,
    extend: Callable[[Array, State, Draws], Draws] | None = None,
    *,
    networks: Players,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    beta: float,
    beta_warmup: int,
) -> Method:
    """A method of one loss.

    Args:
      name: of the method.
      loss: (params, collections, draws, networks=, prior=, likelihood=, beta=, train=) -> (loss [], `Generative`).
      draws: S, draws of noise per example in a step.
      extend: (key, state, draws) -> what the loss is given in their place, where more has to be drawn by the State.
      networks: the players, as the method was given them.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      beta: weight of the KL term once warmed up.
      beta_warmup: steps over which the weight rises linearly from 0.

    Raises:
      UserError: a setting out of its range.
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the decoder's output"),
        noise_dim=at_least(noise_dim, 1),
        beta=at_least(beta, 0),
        beta_warmup=at_least(beta_warmup, 0),
    )
    optimizers = generator.for_each(optimizers)
    networks = players.prepare(networks, optimizers, prior, ("encoder", "decoder"), learned=True)
    fixed = {"networks": networks, "prior": prior, "likelihood": likelihood}
    beta_at = warmup(beta, beta_warmup)

    def draw(key: Array, state: State, x: Array) -> Draws:
        drawn = players.draw(key, x, None, noise_dim, draws)
        return drawn if extend is None else extend(key, state, drawn)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, prior, noise_dim, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        beta, drawn = beta_at(state.step), draw(key, state, x)
        gradients, (terms, _, after) = jax.grad(loss, has_aux=True)(state.params, state.collections, drawn, beta=beta, **fixed)
        state = state._replace(collections=mean_collections(reduce, after))
        state = apply_gradients(state, reduce(gradients), optimizers)
        return state._replace(step=state.step + 1), Info(terms.elbo, terms.reconstruction, terms.kl, beta)

    def elbo(key: Array, state: State, x: Array) -> Terms:
        return loss(state.params, state.collections, draw(key, state, x), train=False, **fixed)[1].terms

    return Method(name, init, train_step, **generator.capabilities(networks, prior, likelihood, noise_dim), elbo=elbo)


def log_density(posterior: Posterior, networks: Players) -> Array:
    """Log q(z|x) [..., B] at the posterior's own draws, as the encoder says it, or of the Gaussian that it says q is.

    Raises:
      UserError: the encoder says neither, with its name and the remedy.
    """
    if posterior.log_q is not None:
        return posterior.log_q
    if posterior.gaussian:
        return normal(posterior.mean, posterior.std).log_prob(posterior.z)
    raise UserError(
        f"encoder={networks.encoder.name}: a VAE needs a density of q(z|x); return Posterior(z, log_q=...), or "
        "Posterior(z, mean, std, gaussian=True) where q is N(mean, diag std^2)"
    )


def check_semi_implicit(posterior: Posterior, networks: Players) -> None:
    """Refuses an encoder that does not say what z is given the rest of its noise.

    Raises:
      UserError: with its name and the remedy.
    """
    if posterior.conditional is None:
        raise UserError(
            f"encoder={networks.encoder.name}: is not semi-implicit; return Posterior(z, conditional=(mean, std)) where z is "
            "N(mean, diag std^2) given the rest of the noise, or use networks.SemiImplicitEncoder"
        )
