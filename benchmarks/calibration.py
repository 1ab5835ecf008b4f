"""Simulation-based calibration (Talts et al. 2018): whether posteriors are as wide as they should be, on average over data.

    python -m benchmarks.calibration [--models=regression,schools] [--methods=avb,sivi] [--count=200] [--steps=2000]

Parameters come from a model's prior, data from them, and a method fits the posterior given these data: among its draws the
parameters' ranks are uniform where it is the posterior. Per model and method, over the parameters:

- p: the least p-value of a chi-squared test of uniform ranks, times the number of parameters (Bonferroni);
- spread: the mean of 12 (rank - 1/2)^2 for ranks in [0, 1]: 1 where widths are right, above it where q is too narrow;
- bias: the largest distance of a mean rank from 1/2, in standard errors.

`exact` draws from a posterior in closed form, which shows what the test itself does.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from blackjax import nuts, window_adaptation
from jax.scipy.stats import norm
from scipy import stats

from avb_jax.inference import fitting
from avb_jax.streams import stream
from experiments import launch
from experiments.eight_schools import SIGMA

MODELS_OF = flags.DEFINE_list("models", None, "Which models; all by default.")
METHODS_OF = flags.DEFINE_list("methods", None, "Which methods; all by default.")
COUNT = flags.DEFINE_integer("count", 200, "Data sets.")
STEPS = flags.DEFINE_integer("steps", 2000, "Of each fit.")

DRAWS = 199  # of each posterior
BINS = 10  # of the ranks; DRAWS + 1 is a multiple
BATCH = 128  # draws of a step
AT_A_TIME = 10  # fits side by side
TRANSITIONS = 10  # of NUTS, from one draw to the next


@dataclasses.dataclass(frozen=True)
class Model:
    """A prior over z [dim], data given z, and log p(z, data)."""

    dim: int
    prior: Callable  # key -> z
    simulate: Callable  # (key, z) -> data
    log_joint: Callable  # (z, data) -> nats
    exact: Callable | None = None  # (key, data, count) -> draws of the posterior [count, dim]


def regression() -> Model:
    """Y ~ N(x w, s^2), 1 / s^2 ~ Gamma(2, 1), w ~ N(0, s^2): z = (w, log s), with skewed margins and a closed form."""
    x = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    x[:, 2] += 1.5 * x[:, 1]  # two slopes that depend on each other
    precision = np.eye(3) + x.T @ x
    covariance = np.linalg.inv(precision)

    def prior(key):
        of_w, of_s = jax.random.split(key)
        s = jax.random.gamma(of_s, 2.0) ** -0.5
        return jnp.append(s * jax.random.normal(of_w, (3,)), jnp.log(s))

    def simulate(key, z):
        return x @ z[:3] + jnp.exp(z[3]) * jax.random.normal(key, (len(x),))

    def log_joint(z, y):
        w, log_s = z[:3], z[3]
        s, inverse = jnp.exp(log_s), jnp.exp(-2.0 * log_s)
        of_s = 2.0 * jnp.log(inverse) - inverse  # Gamma(2, 1) of 1 / s^2, and the Jacobian of its logarithm
        return norm.logpdf(y, x @ w, s).sum() + norm.logpdf(w, 0.0, s).sum() + of_s

    def exact(key, y, count):
        of_w, of_s = jax.random.split(key)
        mean = covariance @ (x.T @ y)
        rate = 1.0 + 0.5 * (y @ y - mean @ precision @ mean)
        s = (jax.random.gamma(of_s, 2.0 + len(x) / 2, (count,)) / rate) ** -0.5
        w = mean + s[:, None] * jax.random.multivariate_normal(of_w, jnp.zeros(3), covariance, (count,))
        return jnp.concatenate([w, jnp.log(s)[:, None]], axis=1)

    return Model(4, prior, simulate, log_joint, exact)


def schools() -> Model:
    """The eight schools of `experiments.eight_schools`: z = (mu, tau, eta), with two modes."""

    def log_joint(z, y):
        return norm.logpdf(z).sum() + norm.logpdf(y, z[0] + z[1] * z[2:], SIGMA).sum()

    def simulate(key, z):
        return z[0] + z[1] * z[2:] + SIGMA * jax.random.normal(key, (8,))

    return Model(10, lambda key: jax.random.normal(key, (10,)), simulate, log_joint)


def ours(method: str, model: Model, key, data):
    """Draws of a sampler that this library fits; T with two layers of 128."""
    settings = {"adversary_widths": (128, 128)} if method == "avb" else {}
    game = fitting.game(lambda z: model.log_joint(z, data), model.dim, method=method, steps=STEPS.value, **settings)
    nothing = jnp.zeros((BATCH, 0))

    def step(state, key):
        return game.method.train_step(key, state, nothing)[0], None

    first = game.method.init(stream(key, "players"), nothing)
    state = jax.lax.scan(step, first, jax.random.split(stream(key, "steps"), STEPS.value))[0]
    return game.method.sample(stream(key, "draws"), state, DRAWS)


def gaussian(model: Model, key, data):
    """Draws of a Gaussian with all covariances, by the ELBO of as many steps."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS.value))
    rows = np.tril_indices(model.dim)

    def draw(params, key, count):
        mean, of_root = params
        root = jnp.zeros((model.dim, model.dim)).at[rows].set(of_root)
        root = jnp.tril(root, -1) + jnp.diag(jnp.exp(jnp.diagonal(root)))
        return mean + jax.random.normal(key, (count, model.dim)) @ root.T, jnp.log(jnp.diagonal(root)).sum()

    def loss(params, key):
        z, log_scale = draw(params, key, BATCH)
        return -jnp.mean(jax.vmap(lambda z: model.log_joint(z, data))(z)) - log_scale

    def step(carry, key):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], key), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    params = jnp.zeros(model.dim), jnp.zeros(len(rows[0]))
    keys = jax.random.split(stream(key, "steps"), STEPS.value)
    params = jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]
    return draw(params, stream(key, "draws"), DRAWS)[0]


def by_nuts(model: Model, key, data):
    """The ends of runs of `TRANSITIONS` transitions of one chain."""

    def log_density(z):
        return model.log_joint(z, data)

    start = jax.random.normal(stream(key, "start"), (model.dim,))
    (state, found), _ = window_adaptation(nuts, log_density).run(stream(key, "warmup"), start, 500)
    kernel = nuts(log_density, **found).step

    def step(state, key):
        return jax.lax.scan(lambda s, k: (kernel(k, s)[0], None), state, jax.random.split(key, TRANSITIONS))[0], state.position

    return jax.lax.scan(step, state, jax.random.split(stream(key, "chain"), DRAWS + 1))[1][1:]


MODELS = {"regression": regression, "schools": schools}
METHODS = {
    "exact": lambda model, key, data: model.exact(key, data, DRAWS),
    "nuts": by_nuts,
    "avb": functools.partial(ours, "avb"),
    "sivi": functools.partial(ours, "sivi"),
    "uivi": functools.partial(ours, "uivi"),
    "gaussian": gaussian,
}


def ranks(model: Model, method: Callable, count: int) -> np.ndarray:
    """How many of the draws lie below the parameters that the data were made with, [count, dim]."""

    def one(key):
        z = model.prior(stream(key, "prior"))
        drawn = method(model, stream(key, "method"), model.simulate(stream(key, "data"), z))
        return jnp.sum(drawn < z, axis=0)

    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=AT_A_TIME))(keys))


def summary(ranks: np.ndarray) -> dict[str, float]:
    """What the table has of ranks [count, dim]."""
    count, dim = ranks.shape
    bins = np.apply_along_axis(np.bincount, 0, ranks * BINS // (DRAWS + 1), minlength=BINS)
    share = (ranks + 0.5) / (DRAWS + 1)
    return {
        "p": min(1.0, dim * stats.chisquare(bins).pvalue.min()),
        "spread": 12 * np.mean((share - 0.5) ** 2),
        "bias": np.abs(share.mean(axis=0) - 0.5).max() * np.sqrt(12 * count),
    }


def main(argv: list[str]) -> None:
    """The table."""
    del argv
    launch.keep_programs()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {COUNT.value} data sets, {STEPS.value} steps of {BATCH}")
    print(f"{'':24}{'p':>10}{'spread':>10}{'bias':>10}{'seconds':>10}")
    for name in MODELS_OF.value or MODELS:
        model = MODELS[name]()
        for method in METHODS_OF.value or METHODS:
            if method == "exact" and model.exact is None:
                continue
            begun = time.perf_counter()
            found = summary(ranks(model, METHODS[method], COUNT.value))
            seconds = time.perf_counter() - begun
            numbers = f"{found['p']:>10.2g}{found['spread']:>10.3f}{found['bias']:>10.2f}{seconds:>10.0f}"
            print(f"{f'{name}, {method}':24}{numbers}", flush=True)


if __name__ == "__main__":
    app.run(main)
