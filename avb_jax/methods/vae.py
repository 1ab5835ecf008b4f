"""The variational autoencoder (Kingma & Welling 2013), for any posterior whose density the encoder knows: AVB's baseline.

Gaussian, as in section 4 of the paper, or more flexible: `networks.posteriors`.
"""

import jax

from avb_jax import objectives, players
from avb_jax.methods.update import apply_gradients, finish_step
from avb_jax.players import Model, init, reconstruct, sample, sample_posterior
from avb_jax.types import Array, Info, Players, State, Terms

__all__ = ["PLAYERS", "elbo_terms", "init", "reconstruct", "sample", "sample_posterior", "train_step"]

PLAYERS = Players("density", "likelihood", None)


def train_step(key: Array, state: State, batch: Array, *, model: Model, optimizers: Players) -> tuple[State, Info]:
    """One gradient step on the negative ELBO; arguments and returns as in `avb.train_step`."""
    beta = model.beta_at(state.step)
    gradients, (terms, _, stats) = jax.grad(objectives.negative_elbo, has_aux=True)(
        state.params, state.batch_stats, players.draw(key, model, batch), model=model, beta=beta
    )
    state = apply_gradients(state._replace(batch_stats=stats), gradients, optimizers)
    return finish_step(state, model), Info(terms.elbo, terms.reconstruction, terms.kl, beta=beta)


def elbo_terms(key: Array, state: State, batch: Array, *, model: Model) -> Terms:
    """The ELBO's terms [B] in evaluation mode; `kl` is exact for a Gaussian posterior, else estimated, see `negative_elbo`."""
    draws = players.draw(key, model, batch)
    params, stats = players.evaluation_variables(state)
    _, (terms, _, _) = objectives.negative_elbo(params, stats, draws, model=model, train=False)
    return terms
