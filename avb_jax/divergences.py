"""Objectives of an adversary (section 5.3), and of a generator that has no likelihood (Poole et al. 2016).

An adversary's are losses that are least, pointwise, at T = log q(z|x) - log p(z). Any f-divergence between q and p has such a
loss, from its variational form (Nguyen et al. 2010; Nowozin et al. 2016; eq. 5.7) with the dual variable written as a function
of T. They differ away from the optimum: where q and p lie far apart, the ones with exponentials have large gradients of large
variance, and the logistic one none. Each takes T(x, z) at z ~ q(z|x) and at z ~ p(z), of any one shape, and returns the loss
per pair, of the same shape, in nats.

A generator's are functions of T = log data(x) - log model(x) at its own samples, whatever T was trained by (Poole et al. 2016,
"Improved generator objectives for GANs"). Of an f-divergence E_model[f(u)], u = data / model, the gradient is that of
E_model[f(u) - u f'(u)] with u held fixed: that is what is given here, so that a T at its optimum gives the gradient of the
divergence itself, not of a bound on it. Those that fall fast as u grows go where the generator has left something out, and
the others leave where it makes what the data does not have.
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


def generate_non_saturating(t: Array) -> Array:
    """-log sigma(T), which most GANs use (Goodfellow et al. 2014): of KL(model, data) less twice the Jensen-Shannon divergence.

    It is the difference of their objectives here, and keeps its gradient where T < 0, which theirs does not.
    """
    return jax.nn.softplus(-t)


def generate_jensen_shannon(t: Array) -> Array:
    """Of twice the Jensen-Shannon divergence, f = u log u - (1 + u) log((1 + u) / 2): log(1 - sigma(T)), which saturates."""
    return -jax.nn.softplus(t)


def generate_kl(t: Array) -> Array:
    """Of KL(data, model), as maximum likelihood has it, f = u log u: -e^T."""
    return -jnp.exp(t)


def generate_reverse_kl(t: Array) -> Array:
    """Of KL(model, data), f = -log u: -T."""
    return -t


def generate_pearson(t: Array) -> Array:
    """Of Pearson's chi^2, the mean of (data / model - 1)^2 under the model: -e^2T."""
    return -jnp.exp(2.0 * t)


def generate_hellinger(t: Array) -> Array:
    """Of the squared Hellinger distance, f = (sqrt(u) - 1)^2: -e^(T/2)."""
    return -jnp.exp(0.5 * t)


GENERATOR_DIVERGENCES = {
    "non_saturating": generate_non_saturating,
    "jensen_shannon": generate_jensen_shannon,
    "kl": generate_kl,
    "reverse_kl": generate_reverse_kl,
    "pearson": generate_pearson,
    "hellinger": generate_hellinger,
}
