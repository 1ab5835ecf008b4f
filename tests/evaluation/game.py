"""A game whose every quantity is known: Gaussian encoder, linear-Gaussian decoder, exact log-ratio plus an offset as T.

x [2]; z = m x + c + s noise in 2 latents, so that q(z|x) = N(m x + c, s^2 I), which the encoder does not say; p(z) = N(0, I);
p(x|z) = N(w z, sigma^2 I).
"""

import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import avb_jax
from avb_jax import Network, Players, State
from avb_jax.distributions import gaussian, normal, standard_normal

M, C, S, W, SIGMA = 0.8, -0.3, np.exp(-0.5), 0.9, 0.7
OFFSET = 1.0  # by which T is off
PARAMS = Players(
    {"m": jnp.full(2, M), "c": jnp.full(2, C), "log_s": jnp.full(2, np.log(S))},
    {"w": jnp.full(2, W)},
    {"m": jnp.full(2, M), "c": jnp.full(2, C), "log_s": jnp.full(2, np.log(S)), "offset": jnp.zeros(())},
)


def network(params, function) -> Network:
    """A network that starts at given params."""
    return Network(lambda key, *inputs: {"params": params}, lambda v, *inputs, train: (function(v["params"], *inputs), {}))


def moments(p, x):
    """Of q(z|x)."""
    return p["m"] * x + p["c"], jnp.exp(p["log_s"])


def encoder(p, x, noise):
    """A draw from q(z|x)."""
    mean, std = moments(p, x)
    return mean + std * noise


def log_ratio(p, x, z):
    """T* = log q(z|x) - log p(z), and the offset."""
    return p["offset"] + normal(*moments(p, x)).log_prob(z) - standard_normal(2).log_prob(z)


def method(**settings) -> avb_jax.Method:
    """AVB's method of the game; a fresh T starts at its optimum."""
    return avb_jax.avb(
        network(PARAMS.encoder, encoder),
        network(PARAMS.decoder, lambda p, z: (p["w"] * z)[..., None]),
        network(PARAMS.adversary, log_ratio),
        **{
            "prior": standard_normal(2),
            "likelihood": gaussian(SIGMA),
            "optimizers": optax.sgd(1e-3),
            "noise_dim": 2,
            **settings,
        },
    )


def state(offset: float = OFFSET, **decoder) -> State:
    """What was trained, with T off by `offset`."""
    params = PARAMS._replace(
        adversary={**PARAMS.adversary, "offset": jnp.asarray(offset)}, decoder={**PARAMS.decoder, **decoder}
    )
    return State(jnp.zeros((), jnp.int32), params, Players(), Players({}, {}, {}))


def points(count: int = 60) -> np.ndarray:
    """Data; the second of the two pixels hardly moves, so that one of two latents is active."""
    return np.float32(np.random.default_rng(0).standard_normal((count, 2)) * [1.0, 0.05] + [1.0, -1.0])


def log_evidence(x):
    """Log p(x) [N]."""
    return np.sum(stats.norm.logpdf(np.float64(x), 0, np.hypot(W, SIGMA)), axis=-1)


def posterior_kl(x):
    """KL(q(z|x), p(z)) [N]."""
    return 0.5 * np.sum((M * np.float64(x) + C) ** 2 + S**2 - 1 - 2 * np.log(S), axis=-1)


def elbo(x):
    """The ELBO [N] of an exact T."""
    mean = M * np.float64(x) + C
    square = (x - W * mean) ** 2 + (W * S) ** 2
    return -posterior_kl(x) - np.sum(square / (2 * SIGMA**2) + 0.5 * np.log(2 * np.pi * SIGMA**2), axis=-1)


def monte_carlo(x, draws: int = 20_000):
    """Draws z ~ q(z|x) and z ~ p(z) [N, draws, 2], and the exact log q(z|x) - log p(z) as a function of z."""
    noise = np.random.default_rng(1).standard_normal((2, len(x), draws, 2))
    mean = M * np.float64(x)[:, None] + C
    return (
        mean + S * noise[0],
        noise[1],
        lambda z: np.sum(stats.norm.logpdf(z, mean, S) - stats.norm.logpdf(z), axis=-1),
    )
