"""Priors p(z) that are learned with the decoder: a flow, or a mixture of the encoder's own posteriors.

A `Learned` prior stands where a fixed distribution would, in `avb`, `aae`, `vae` and the methods of one bound; its params are
the decoder's, under `prior`, and `at` makes the distribution of a State's params. The ELBO is what trains it: E_q[log p(z)] is
the only term that it is in. T's optimum stays log q(z|x) - log p(z), of the prior as it is, and since T's params are held
fixed, AVB adds the gradient of -log p(z) at the encoder's draws, which T does not have.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from numpyro import distributions as dist
from numpyro.distributions import constraints

from avb_jax.network import Network, call
from avb_jax.types import Array, Players, Posterior, PyTree


class Learned(dist.Distribution):
    """A prior whose distribution depends on params: `priors.Learned(networks.FlowPrior(8))`.

    Args:
      network: a Linen module with `latent_dim`, `log_prob` (z [..., Z], encode -> [...]) and `draw` (key, count, encode -> z
        [count, Z]), of which `log_prob` makes the params; such as `networks.FlowPrior` and `networks.VampPrior`.
    """

    support = constraints.real_vector

    def __init__(self, network: nn.Module):
        self.network = network
        super().__init__((), (network.latent_dim,))


class AtParams(dist.Distribution):
    """A learned prior's distribution."""

    support = constraints.real_vector
    pytree_data_fields = ("params", "of_encoder")
    pytree_aux_fields = ("network", "encoder")

    def __init__(self, network: nn.Module, params: PyTree, encoder: Network | None, of_encoder: tuple):
        self.network, self.params, self.encoder, self.of_encoder = network, params, encoder, of_encoder
        super().__init__((), (network.latent_dim,))

    def log_prob(self, value: Array) -> Array:
        return self.network.apply({"params": self.params}, value, self._encode, method="log_prob")

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        count = math.prod(sample_shape)
        z = self.network.apply({"params": self.params}, key, count, self._encode, method="draw")
        return z.reshape(*sample_shape, *self.event_shape)

    def _encode(self, x: Array) -> Posterior:
        noise = jnp.zeros((len(x), self.network.latent_dim))  # of which a Gaussian's moments take nothing
        params, collections = self.of_encoder
        out, _ = call(self.encoder, params, collections, x, noise, train=False)
        return out if isinstance(out, Posterior) else Posterior(out)


def at(prior: dist.Distribution, networks: Players, params: Players, collections: Players) -> dist.Distribution:
    """The distribution of z at these params; a fixed prior is what it is."""
    if not isinstance(prior, Learned):
        return prior
    return AtParams(prior.network, params.decoder["prior"], networks.encoder, (params.encoder, collections.encoder))


def with_prior(decoder: Network, prior: Learned) -> Network:
    """The decoder with the prior's params next to its own: {'decoder': ..., 'prior': ...}."""

    def init(key: Array, z: Array) -> dict:
        variables = dict(decoder.init(key, z))
        of_prior = prior.network.init(jax.random.fold_in(key, 1), z, None, method="log_prob")
        own = variables.pop("params", {})
        return {"params": {"decoder": own, "prior": of_prior.get("params", {})}, **variables}

    def apply(variables: dict, z: Array, *, train: bool) -> tuple[Any, dict]:
        return decoder.apply({**variables, "params": variables["params"]["decoder"]}, z, train=train)

    return decoder._replace(init=init, apply=apply)
