"""Likelihoods p(x|z) that are themselves networks of x: what makes distributions of a `networks.ModelDecoder`'s output."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from avb_jax.distributions import Likelihood, base_distribution, standard_normal
from avb_jax.types import Array


def autoregressive(network: Any, likelihood: Likelihood) -> Likelihood:
    """p(x|z) = prod_i p(x_i | x_<i, z).

    Args:
      network: the `ModelDecoder`'s model, a `networks.GatedPixelCNN` or `networks.RowLSTM`.
      likelihood: of that network's outputs [B, *x, P], pixel by pixel: `bernoulli`, `discretized_logistic()`, `gaussian(...)`.
    """
    return lambda output: Autoregressive(network, likelihood, output.features, output.variables)


def flow(network: Any) -> Likelihood:
    """The density of x whose image under an invertible network is N(0, I).

    Args:
      network: the `ModelDecoder`'s model, a `networks.RealNVP`.
    """
    return lambda output: Flow(network, output.features, output.variables)


class _Model(dist.Distribution):
    """What both have: a network with variables, and features [B, ...] whose first axis is the batch."""

    def __init__(self, network, features, variables, *, validate_args: bool | None = None):
        self.network, self.features, self.variables = network, features, variables
        super().__init__(features.shape[:1], tuple(network.x_shape), validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Images [*sample_shape, B, *x]."""
        keys = jax.random.split(key, math.prod(sample_shape))
        return jax.vmap(self._images)(keys).reshape(*sample_shape, *self.batch_shape, *self.event_shape)


class Autoregressive(_Model):
    """Images x [B, H, W] or [B, H, W, C] whose pixels depend on those above and to the left; made by `autoregressive`.

    `log_prob` is exact, of all pixels at once; images are drawn pixel by pixel in one compiled loop. There is no mean in closed
    form.
    """

    pytree_data_fields = ("features", "variables")
    pytree_aux_fields = ("network", "likelihood")

    def __init__(self, network, likelihood, features, variables, *, validate_args: bool | None = None):
        self.likelihood = likelihood
        super().__init__(network, features, variables, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.likelihood(jnp.zeros((1, *self.event_shape, self.network.parameters))).support

    def log_prob(self, value: Array) -> Array:
        """Log p(x) [B] of x [B, *x], nats."""
        return self.likelihood(self.network.apply(self.variables, value, self.features)).log_prob(value)

    def _images(self, key: Array) -> Array:
        def pixel(key: Array, output: Array) -> Array:
            return self.likelihood(output).sample(key).astype(jnp.float32)

        return self.network.apply(self.variables, key, self.batch_shape[0], self.features, pixel, method="draw")


class Flow(_Model):
    """Images x [B, *x] in [0, 1] with an exact density; made by `flow`. There is no mean in closed form."""

    pytree_data_fields = ("features", "variables")
    pytree_aux_fields = ("network",)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.unit_interval, len(self.event_shape))

    def log_prob(self, value: Array) -> Array:
        """Log density [B] of x [B, *x], nats."""
        u, log_det = self.network.apply(self.variables, value)
        return standard_normal(u.shape[-1]).log_prob(u) + log_det

    def _images(self, key: Array) -> Array:
        u = jax.random.normal(key, (self.batch_shape[0], math.prod(self.event_shape)))
        return self.network.apply(self.variables, u, method="inverse")


def has_mean(of_x: dist.Distribution) -> bool:
    """Whether a p(x|z) has means in closed form, which models of x and distributions over categories do not."""
    return not isinstance(base_distribution(of_x), _Model | dist.CategoricalLogits | dist.CategoricalProbs)


def images_of(key: Array, of_x: dist.Distribution) -> Array:
    """What p(x|z) looks like: its means [B, *x], or draws where these have no closed form."""
    return of_x.mean if has_mean(of_x) else of_x.sample(key)
