"""The adversary's objectives (section 5.3), as losses that are least, pointwise, at T = log q(z|x) - log p(z).

Any f-divergence between q and p has such a loss, from its variational form (Nguyen et al. 2010; Nowozin et al. 2016; eq. 5.7)
with the dual variable written as a function of T. They differ away from the optimum: where q and p lie far apart, the ones with
exponentials have large gradients of large variance, and the logistic one none.

Each takes T(x, z) at z ~ q(z|x) and at z ~ p(z), of any one shape, and returns the loss per pair, of the same shape, in nats.
"""

import jax
import jax.numpy as jnp

from avb_jax.types import Array


def jensen_shannon(t_q: Array, t_p: Array) -> Array:
    """Eq. 3.3 (Mescheder et al. 2017) with its sign turned: -log sigma(T_q) - log(1 - sigma(T_p)); 2 log 2 where T = 0."""
    return jax.nn.softplus(-t_q) + jax.nn.softplus(t_p)


def kl(t_q: Array, t_p: Array) -> Array:
    """Eq. 5.10, of KL(q, p): e^T_p - 1 - T_q, where the paper's own T is 1 + ours.

    The zero-sum form: the loss's mean is the negative of a lower bound on KL(q(z|x), p(z)), and in the encoder's gradient that
    bound and E_q[T] are the same.
    """
    return jnp.exp(t_p) - 1.0 - t_q


def reverse_kl(t_q: Array, t_p: Array) -> Array:
    """Of KL(p, q): T_p - 1 + e^-T_q."""
    return t_p - 1.0 + jnp.exp(-t_q)


def pearson(t_q: Array, t_p: Array) -> Array:
    """Of Pearson's chi^2, the mean of (q/p - 1)^2 under p: e^2T_p - 1 - 2 (e^T_q - 1)."""
    return jnp.expm1(2.0 * t_p) - 2.0 * jnp.expm1(t_q)


def hellinger(t_q: Array, t_p: Array) -> Array:
    """Of the squared Hellinger distance, the mean of (sqrt(q/p) - 1)^2 under p: e^(T_p/2) - 1 - (1 - e^(-T_q/2))."""
    return jnp.expm1(0.5 * t_p) + jnp.expm1(-0.5 * t_q)


DIVERGENCES = {
    "jensen_shannon": jensen_shannon,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "pearson": pearson,
    "hellinger": hellinger,
}
