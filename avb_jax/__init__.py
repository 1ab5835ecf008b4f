"""Adversarial Variational Bayes in JAX and Flax (Mescheder, Nowozin & Geiger 2017)."""

from avb_jax import data, distributions, methods, networks, objectives, parallel, releases
from avb_jax.distributions import Bernoulli, Deterministic, Gaussian, StandardNormal
from avb_jax.loop import Interrupted, fit
from avb_jax.players import Model
from avb_jax.types import Diverged, Draws, Info, Judgement, Players, Posterior, State, Terms, UserError

__all__ = [
    "Bernoulli", "Deterministic", "Diverged", "Draws", "Gaussian", "Info", "Interrupted", "Judgement", "Model", "Players",
    "Posterior", "StandardNormal", "State", "Terms", "UserError", "data", "distributions", "fit", "methods", "networks",
    "objectives", "parallel",
]  # fmt: skip

releases.warn()
