"""The adversary's objectives, as losses to minimise over T. Each is least, pointwise, at T = log q(z|x) - log p(z)."""

import jax

from avb_jax.types import Array


def logistic(t_q: Array, t_p: Array) -> Array:
    """Jensen-Shannon, eq. 3.3 (Mescheder et al. 2017) with its sign turned: -log sigma(T_q) - log(1 - sigma(T_p)).

    Args:
      t_q: T(x, z) at z ~ q(z|x), any shape.
      t_p: T(x, z) at z ~ p(z), same shape.

    Returns:
      The loss per pair, same shape, in nats; 2 log 2 where T = 0.
    """
    return jax.nn.softplus(-t_q) + jax.nn.softplus(t_p)
