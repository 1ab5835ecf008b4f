"""Importance weights: the logarithm of their mean, and a gradient of its expectation that needs no score of q.

The importance weighted bound is E log (1 / S) sum_s w_s of draws z_s ~ q(z|x) with weights w = p(x, z) / q(z|x) (Burda,
Grosse & Salakhutdinov 2016).
"""

import jax
import jax.numpy as jnp

from avb_jax.types import Array


def log_mean(log_weight: Array, axis: int) -> Array:
    """The logarithm of the mean of exp(log_weight) over an axis."""
    return jax.nn.logsumexp(log_weight, axis=axis) - jnp.log(log_weight.shape[axis])


@jax.custom_vjp
def weighed_twice(z: Array, zero: Array, beta: Array | float = 1.0) -> tuple[Array, Array]:
    """Z [S, B, Z] and `zero` [S, B] as they are; the gradient of z is multiplied by 1 - beta + beta w.

    Where `zero` is added to the log weights whose log mean is the loss, its share in `zero`'s gradient is a draw's normalised
    weight w, which the gradient of z has as a factor already. With w (1 - beta + beta w), at beta = 1 with w^2, it is the
    gradient of E[log mean weight] by what z is made of, although log q, of which the weights have the power -beta, is held
    fixed in them (doubly reparameterised: Tucker et al. 2019): log q's own params need no gradient, and a T in its place has
    none to give.
    """
    del beta
    return z, zero


def _backward(beta: Array | float, slopes: tuple[Array, Array]) -> tuple[Array, Array, None]:
    of_z, of_weight = slopes
    total = jnp.sum(of_weight, axis=0)
    share = of_weight / jnp.where(total == 0.0, 1.0, total)  # 0 where the loss does not depend on the example
    return of_z * (1.0 - beta + beta * share)[..., None], of_weight, None


weighed_twice.defvjp(lambda z, zero, beta: ((z, zero), beta), _backward)
