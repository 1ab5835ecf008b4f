"""Priors p(z) that are learned with the decoder: a flow, or a mixture of the encoder's own posteriors.

A `Learned` prior stands where a fixed distribution would, in `avb`, `vae`, `sivi`, `uivi`, `iwhvi` and `aae`; its params are
the decoder's, under `prior`, and `at` makes the distribution of a State's params. The ELBO is what trains it: E_q[log p(z)] is
the only term that it is in. T's optimum stays log q(z|x) - log p(z), of the prior as it is, and since T's params are held
fixed, AVB adds the gradient of -log p(z) at the encoder's draws, which T does not have.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from numpyro import distributions as dist
from numpyro.distributions import constraints

from avb_jax.distributions import normal, standard_normal
from avb_jax.network import Network, call
from avb_jax.networks.mlp import MLP
from avb_jax.types import Array, Players, Posterior, PyTree, UserError

Encode = Callable[[Array], Posterior]  # x [K, ...] -> what the encoder knows of q(.|x)


class Learned(dist.Distribution):
    """A prior whose distribution depends on params: `priors.Learned(priors.Flow(8))`.

    Args:
      network: a Linen module with `latent_dim`, `log_prob` (z [..., Z], encode -> [...]) and `draw` (key, count, encode -> z
        [count, Z]), of which `log_prob` makes the params; such as `Flow` and `Vamp`.
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
        noise = jnp.zeros((len(x), self.network.latent_dim))  # of which moments take nothing
        params, collections = self.of_encoder
        out, _ = call(self.encoder, params, collections, x, noise, train=False)
        return out if isinstance(out, Posterior) else Posterior(out)


class Flow(nn.Module):
    """N(0, I) pushed through affine couplings of one half of z and the other by turns (Dinh et al. 2016); it starts as N(0, I).

    Raises:
      UserError: fewer than 2 latents.
    """

    latent_dim: int
    flows: int = 4
    widths: Sequence[int] = (64, 64)

    def setup(self):
        if self.latent_dim < 2:
            raise UserError(f"latent_dim={self.latent_dim}: a flow prior couples two halves; use 2 or more")
        half = self.latent_dim // 2
        sizes = [(self.latent_dim - half) if k % 2 == 0 else half for k in range(self.flows)]  # of what changes
        self.hidden = [MLP(self.widths, nn.tanh) for _ in sizes]
        self.heads = [nn.Dense(2 * size, kernel_init=nn.initializers.zeros) for size in sizes]
        self.scales = [self.param(f"scale_{k}", nn.initializers.ones, (size,)) for k, size in enumerate(sizes)]

    def log_prob(self, z: Array, encode: Encode | None = None) -> Array:
        """Log p(z) [...], nats: back through the couplings."""
        del encode
        first, second = jnp.split(z, [self.latent_dim // 2], axis=-1)
        log_det = jnp.zeros(z.shape[:-1])
        for k in reversed(range(self.flows)):
            kept, changed = (first, second) if k % 2 == 0 else (second, first)
            s, t = self._coupling(k, kept)
            changed = (changed - t) * jnp.exp(-s)
            log_det -= jnp.sum(s, axis=-1)
            first, second = (kept, changed) if k % 2 == 0 else (changed, kept)
        return standard_normal(self.latent_dim).log_prob(jnp.concatenate([first, second], axis=-1)) + log_det

    def draw(self, key: Array, count: int, encode: Encode | None = None) -> Array:
        """Draws z [count, Z]."""
        del encode
        first, second = jnp.split(jax.random.normal(key, (count, self.latent_dim)), [self.latent_dim // 2], axis=-1)
        for k in range(self.flows):
            kept, changed = (first, second) if k % 2 == 0 else (second, first)
            s, t = self._coupling(k, kept)
            changed = changed * jnp.exp(s) + t
            first, second = (kept, changed) if k % 2 == 0 else (changed, kept)
        return jnp.concatenate([first, second], axis=-1)

    def _coupling(self, k: int, kept: Array) -> tuple[Array, Array]:
        s, t = jnp.split(self.heads[k](self.hidden[k](kept)), 2, axis=-1)
        return self.scales[k] * jnp.tanh(s), t


class Vamp(nn.Module):
    """VampPrior (Tomczak & Welling 2018): a mixture of q(z|u_k) at inputs u_k [K, *x] in [0, 1] that are learned.

    Of encoders that give q's moments, Gaussian or nearly so; gradients flow into the encoder as well.

    Raises:
      UserError: the encoder gives no moments.
    """

    latent_dim: int
    x_shape: Sequence[int]
    components: int = 100

    def setup(self):
        self.logits = self.param("inputs", nn.initializers.normal(1.0), (self.components, *self.x_shape))

    def log_prob(self, z: Array, encode: Encode) -> Array:
        """Log p(z) [...], nats."""
        mean, std = self._moments(encode)
        of_each = normal(mean, std).log_prob(z[..., None, :])
        return jax.nn.logsumexp(of_each, axis=-1) - math.log(self.components)

    def draw(self, key: Array, count: int, encode: Encode) -> Array:
        """Draws z [count, Z]."""
        which_key, noise_key = jax.random.split(key)
        mean, std = self._moments(encode)
        which = jax.random.randint(which_key, (count,), 0, self.components)
        return mean[which] + std[which] * jax.random.normal(noise_key, (count, self.latent_dim))

    def _moments(self, encode: Encode) -> tuple[Array, Array]:
        if self.is_initializing():
            return jnp.zeros((self.components, self.latent_dim)), jnp.ones((self.components, self.latent_dim))
        posterior = encode(nn.sigmoid(self.logits))
        if posterior.mean is None or posterior.std is None:
            raise UserError("prior: a Vamp prior needs an encoder that gives q's moments, such as networks.GaussianEncoder")
        return posterior.mean, posterior.std


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
