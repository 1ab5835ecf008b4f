"""Adversarial Variational Bayes: Algorithm 1 of Mescheder, Nowozin & Geiger (2017)."""

import jax

from avb_jax import contrast, objectives, players
from avb_jax.methods.update import apply_gradients, finish_step
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Info, Players, State, Terms

__all__ = ["elbo_terms", "init", "reconstruct", "sample", "sample_posterior", "train_step"]


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One step of Algorithm 1: `adversary_steps - 1` updates of T alone, then all three players at once.

    In the joint update one draw z = enc(x, noise) serves all three gradients, each taken at the params before it.
    The updates of T that go first use noise and prior draws of their own, on the same x: the encoder's gradient then
    meets a T that has caught up with it (section 3.2).

    Args:
      key: a key of this step's own.
      state: the State before.
      batch: x [B, ...], pixels in [0, 1].
      model: networks, distributions and scales.
      optimizers: an optax optimiser per player.

    Returns:
      The State after, with all three players' new params, and the step's Info (per example, in nats).
    """
    for i in range(1, model.adversary_steps):
        draws = players.draw(jax.random.fold_in(key, i), model, batch)
        encoder = state.params.encoder, state.batch_stats.encoder
        posterior, _ = players.encode(model, *encoder, batch, draws.noise, train=True)
        z = contrast.apply(model, *encoder, batch, posterior, train=True).z
        gradient, (_, stats) = jax.grad(objectives.adversary_loss, has_aux=True)(
            state.params.adversary, state.batch_stats, draws, z, model=model
        )
        batch_stats = state.batch_stats._replace(adversary=stats)
        state = apply_gradients(state._replace(batch_stats=batch_stats), Players(adversary=gradient), optimizers)

    draws = players.draw(key, model, batch)
    beta = model.beta_at(state.step)
    generative = state.params._replace(adversary=None)
    gradients, (terms, z, stats) = jax.grad(objectives.negative_elbo_adversarial, has_aux=True)(
        generative, state.params.adversary, state.batch_stats, draws, model=model, beta=beta
    )
    gradient, (said, adversary_stats) = jax.grad(objectives.adversary_loss, has_aux=True)(
        state.params.adversary, state.batch_stats, draws, z, model=model
    )
    state = state._replace(batch_stats=stats._replace(adversary=adversary_stats))
    state = apply_gradients(state, gradients._replace(adversary=gradient), optimizers)
    info = Info(
        terms.elbo, terms.reconstruction, terms.kl, terms.kl_contrast, beta, said.loss, said.accuracy, said.saturation
    )
    return finish_step(state, model), info


def elbo_terms(key: Array, state: State, batch: Array, *, model: Model) -> Terms:
    """The ELBO's terms [B] at one draw per example, evaluation mode; `kl` is T's estimate and no bound."""
    params = players.evaluation_params(state)
    _, (terms, _, _) = objectives.negative_elbo_adversarial(
        params, params.adversary, state.batch_stats, players.draw(key, model, batch), model=model, train=False
    )
    return terms
