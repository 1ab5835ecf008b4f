"""The variational autoencoder with a Gaussian posterior (Kingma & Welling 2013): AVB's baseline (section 4)."""

import jax

from avb_jax import objectives, players
from avb_jax.methods.update import apply_gradients, finish_step
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Info, Players, State, Terms

__all__ = ["elbo_terms", "init", "reconstruct", "sample", "sample_posterior", "train_step"]


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One gradient step on the negative ELBO with its closed-form KL; arguments and returns as in `avb.train_step`."""
    beta = model.beta_at(state.step)
    gradients, (terms, _, stats) = jax.grad(objectives.negative_elbo_gaussian, has_aux=True)(
        state.params, state.batch_stats, players.draw(key, model, batch), model=model, beta=beta
    )
    state = apply_gradients(state._replace(batch_stats=stats), gradients, optimizers)
    return finish_step(state, model), Info(terms.elbo, terms.reconstruction, terms.kl, beta=beta)


def elbo_terms(key: Array, state: State, batch: Array, *, model: Model) -> Terms:
    """The ELBO's terms [B] at one draw per example, evaluation mode; `kl` is exact for each x."""
    draws = players.draw(key, model, batch)
    params = players.evaluation_params(state)
    _, (terms, _, _) = objectives.negative_elbo_gaussian(params, state.batch_stats, draws, model=model, train=False)
    return terms
