"""AVB for densities next to its rivals: how near their draws come to the density in equal seconds.

    python -m benchmarks.densities [--targets=banana,torus] [--methods=avb,iaf] [--seeds=5] [--seconds=20] [--out=FILE.jsonl]

Each method trains for as many seconds (compiling not counted, what it checks on the way counted), and is compared with exact
draws of the density, or with those of long NUTS chains: the sliced Wasserstein distance (order 2, 10,000 draws), the mean
Wasserstein distance of single dimensions in standard deviations, KL(q, p) by nearest neighbours, and the log of the density's
integral where the method estimates it. What equal distributions give is in the row `exact`. With `--out` a run that was
interrupted goes on, and more seeds or methods are added. With `--steps` our own take so many, on any machine.

`german_credit` reads UCI's file german.data-numeric (`--german_credit=FILE`; Hofmann 1994, CC BY 4.0): the posterior is the
inference gym's, whose means and standard deviations NUTS gives again. `wide_banana`, `x_shaped` and `two_gaussians` are those
of Yin & Zhou (2018); `wide_banana`, `x_shaped` and `four_gaussians` those of Lim & Johansen (2024), whose code takes the sliced
distance as it is taken here: order 2, 100 directions, 10,000 draws (github.com/jenninglim/pvi, scripts/sec_5.2/run.py and
src/problems/toy.py at 1ea81b7).
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from absl import app, flags
from blackjax.vi import pathfinder, svgd
from jax.scipy.stats import multivariate_normal, norm
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoBNAFNormal, AutoDAIS, AutoIAFNormal, AutoMultivariateNormal, AutoNormal

from avb_jax import Callback, inference
from avb_jax.evaluation import knn
from avb_jax.evaluation.image_quality import sliced_wasserstein
from avb_jax.inference import fitting, watch
from avb_jax.types import UserError
from experiments import launch
from experiments.eight_schools import SIGMA, Y, log_evidence, schools

TARGETS_OF = flags.DEFINE_list("targets", None, "Which densities; all by default.")
METHODS_OF = flags.DEFINE_list("methods", None, "Which methods; all by default.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each.")
SECONDS = flags.DEFINE_float("seconds", 20.0, "Of training.")
STEPS = flags.DEFINE_integer("steps", None, "Of ours, in the place of seconds.")
OUT = flags.DEFINE_string("out", None, "Where to keep a line per run.")
SCALE = flags.DEFINE_enum("scale", "near", ("near", "1", "nearest"), "How ours begin: `fit`'s default, or `scale`.")
GERMAN_CREDIT = flags.DEFINE_string("german_credit", None, "UCI's german.data-numeric, for that density.")

DRAWS = 10_000
PARTICLES = 512  # of a step, for all that have steps
CHAINS, WARMUP = 8, 2000  # of NUTS


@dataclasses.dataclass(frozen=True)
class Target:
    """A density over R^dim, and what is known of it."""

    dim: int
    log_density: Callable
    draw: Callable  # (key, count) -> [count, dim]
    log_evidence: float | None = None


def banana(key, count):
    """(v_1, v_1^2 + v_2 + 1) with v ~ N(0, [[1, .9], [.9, 1]])."""
    v = jax.random.multivariate_normal(key, jnp.zeros(2), jnp.array([[1.0, 0.9], [0.9, 1.0]]), (count,))
    return jnp.stack([v[:, 0], v[:, 0] ** 2 + v[:, 1] + 1.0], axis=1)


def log_banana(z):
    return multivariate_normal.logpdf(
        jnp.stack([z[0], z[1] - z[0] ** 2 - 1.0]), jnp.zeros(2), jnp.array([[1.0, 0.9], [0.9, 1.0]])
    )


def wide_banana() -> Target:
    """z_1 ~ N(0, 2^2) and z_2 - z_1^2 / 4 ~ N(0, 1), independent."""

    def draw(key, count):
        v = jax.random.normal(key, (count, 2))
        return jnp.stack([2 * v[:, 0], v[:, 0] ** 2 + v[:, 1]], axis=1)

    return Target(2, lambda z: norm.logpdf(z[0], scale=2.0) + norm.logpdf(z[1] - z[0] ** 2 / 4), draw, 0.0)


def mixture(means, covariances, weights=(0.5, 0.5)):
    """A target of Gaussian parts in two dimensions."""
    means, covariances, weights = jnp.asarray(means), jnp.asarray(covariances), jnp.asarray(weights)

    def log_density(z):
        return jax.nn.logsumexp(jax.vmap(lambda m, c: multivariate_normal.logpdf(z, m, c))(means, covariances), b=weights)

    def draw(key, count):
        which_key, z_key = jax.random.split(key)
        which = jax.random.choice(which_key, len(means), (count,), p=weights)
        factors = jnp.linalg.cholesky(covariances)
        return means[which] + jnp.einsum("nij,nj->ni", factors[which], jax.random.normal(z_key, (count, 2)))

    return Target(2, log_density, draw, 0.0)


def torus() -> Target:
    """A tube about the circle of radius 2: the density of the radius r is r exp(-((r - 2) / 0.3)^2 / 2), z_3 normal."""
    grid = np.linspace(0, 5, 100_001)
    weight = grid * np.exp(-0.5 * ((grid - 2) / 0.3) ** 2)
    mass = weight.sum() * grid[1]

    def log_density(z):
        radius = jnp.sqrt(z[0] ** 2 + z[1] ** 2 + 1e-12)
        return -0.5 * ((radius - 2) / 0.3) ** 2 - 0.5 * (z[2] / 0.3) ** 2

    def draw(key, count):
        keys = jax.random.split(key, 3)
        radius = jnp.interp(jax.random.uniform(keys[0], (count,)), np.cumsum(weight) / weight.sum(), grid)
        angle = 2 * jnp.pi * jax.random.uniform(keys[1], (count,))
        z = 0.3 * jax.random.normal(keys[2], (count,))
        return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), z], axis=1)

    return Target(3, log_density, draw, float(np.log(2 * np.pi * mass * 0.3 * np.sqrt(2 * np.pi))))


def rosenbrock() -> Target:
    """z_1 ~ N(0, 1) and z_2 - z_1^2 ~ N(0, 0.5^2), independent."""

    def draw(key, count):
        v = jax.random.normal(key, (count, 2))
        return jnp.stack([v[:, 0], v[:, 0] ** 2 + 0.5 * v[:, 1]], axis=1)

    return Target(2, lambda z: norm.logpdf(z[0]) + norm.logpdf(z[1] - z[0] ** 2, scale=0.5), draw, 0.0)


def of_model(model, *args, log_evidence: float | None = None) -> Target:
    """The posterior of a NumPyro model over its unconstrained space, and draws of long NUTS chains."""
    info = numpyro.infer.util.initialize_model(jax.random.key(0), model, model_args=args)
    flat, unravel = jax.flatten_util.ravel_pytree(info.param_info.z)

    def log_density(z):
        return -info.potential_fn(unravel(z))

    @functools.cache
    def chains(count):
        kernel = NUTS(potential_fn=lambda z: -log_density(z))
        chains = MCMC(
            kernel, num_warmup=WARMUP, num_samples=count, num_chains=CHAINS, chain_method="vectorized", progress_bar=False
        )
        start = jax.random.normal(jax.random.key(1), (CHAINS, flat.size))
        chains.run(jax.random.key(2), init_params=start)
        return np.asarray(chains.get_samples()).reshape(-1, flat.size)

    def draw(key, count):
        drawn = chains(5 * DRAWS // CHAINS)
        return drawn[np.asarray(jax.random.permutation(key, len(drawn))[:count])]

    return Target(flat.size, log_density, draw, log_evidence)


def waves(x, y):
    """Logistic regression of two of Breiman's wave forms."""
    weights = numpyro.sample("weights", dist.Normal(0.0, 10.0).expand([x.shape[1]]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def wave_forms(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Breiman et al.'s wave forms (1984): convex combinations of two of three triangles, with noise; 21 numbers and a 1."""
    generator, at = np.random.default_rng(0), np.arange(1, 22)
    triangles = [np.maximum(6 - np.abs(at - center), 0) for center in (7, 15, 11)]
    y, share = generator.integers(0, 2, count), generator.random((count, 1))
    other = np.where(y[:, None] == 0, triangles[1], triangles[2])
    x = share * triangles[0] + (1 - share) * other + generator.standard_normal((count, 21))
    return np.hstack([np.ones((count, 1)), (x - x.mean(axis=0)) / x.std(axis=0)]).astype(np.float32), y


def credit(x, y):
    """Logistic regression as the inference gym's: N(0, 1) weights, the last one of a 1."""
    weights = numpyro.sample("weights", dist.Normal().expand([x.shape[1]]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def german_credit(file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """24 standardised numbers and a 1 of 1,000 borrowers, and whether each was a bad risk.

    Raises:
      UserError: no such file.
    """
    if file is None or not pathlib.Path(file).is_file():
        raise UserError(f"german_credit={file!r}: no such file; give UCI's german.data-numeric (Statlog German Credit Data)")
    data = np.loadtxt(file)
    x = (data[:, :-1] - data[:, :-1].mean(axis=0)) / data[:, :-1].std(axis=0)
    return np.hstack([x, np.ones((len(x), 1))]).astype(np.float32), data[:, -1].astype(int) - 1


def volatility(returns):
    """Stochastic volatility (Kim, Shephard & Chib 1998), not centred."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(0.5))
    persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
    noise = numpyro.sample("noise", dist.Normal().expand([len(returns)]))

    def step(h, e):
        h = persistence * h + scale * e
        return h, h

    first = scale * noise[0] / jnp.sqrt(1.0 - persistence**2)
    h = jnp.append(first, jax.lax.scan(step, first, noise[1:])[1])
    numpyro.sample("returns", dist.Normal(0.0, jnp.exp((mean + h) / 2)), obs=returns)


def simulated_returns(days: int = 40) -> np.ndarray:
    generator, h, found = np.random.default_rng(3), 0.0, []
    for _ in range(days):
        h = 0.95 * h + 0.3 * generator.standard_normal()
        found.append(math.exp(h / 2) * generator.standard_normal())
    return np.asarray(found, np.float32)


EYE = np.eye(2)
TARGETS = {
    "banana": lambda: Target(2, log_banana, banana, 0.0),
    "wide_banana": wide_banana,
    "two_gaussians": lambda: mixture([[-2.0, 0.0], [2.0, 0.0]], [EYE, EYE]),
    "four_gaussians": lambda: mixture(
        [[2.0, 2.0], [-2.0, -2.0], [2.0, -2.0], [-2.0, 2.0]], [EYE] * 4, [1 / 8, 1 / 8, 1 / 2, 1 / 4]
    ),
    "x_shaped": lambda: mixture(np.zeros((2, 2)), [[[2.0, 1.8], [1.8, 2.0]], [[2.0, -1.8], [-1.8, 2.0]]]),
    "torus": torus,
    "rosenbrock": rosenbrock,
    "eight_schools": lambda: of_model(schools, Y, SIGMA, log_evidence=log_evidence()),
    "waves": lambda: of_model(waves, *wave_forms()),
    "german_credit": lambda: of_model(credit, *german_credit(GERMAN_CREDIT.value)),
    "volatility": lambda: of_model(volatility, simulated_returns()),
}


class Rate(Callback):
    """Steps a second, of the blocks that nothing compiles in."""

    def __init__(self):
        self.rates = []

    def report(self, step, numbers, examples_per_second):
        if examples_per_second:
            self.rates.append(examples_per_second / PARTICLES)


def ours(method: str, target: Target, seed: int, seconds: float):
    """Draws, the log evidence and its error, and what `Diagnostics` doubts."""
    rate, options = Rate(), {"method": method, "batch_size": PARTICLES, "tolerance": 0, "quiet": True}
    options["scale"] = {"near": None, "1": 1.0}.get(SCALE.value, SCALE.value)
    steps = STEPS.value
    if steps is None:
        inference.fit(target.log_density, target.dim, steps=300, callbacks=[rate], **options)
        steps = max(100, int(seconds * np.median(rate.rates)))
    fit = inference.fit(target.log_density, target.dim, seed=seed, steps=steps, **options)
    return fit.sample(jax.random.key(seed), DRAWS), {
        "log_evidence": fit.log_evidence,
        "elbo": fit.bound,
        "doubts": len(fit.diagnostics.doubts),
        "steps": steps,
    }


def guided(guide, target: Target, seed: int, seconds: float, particles: int = PARTICLES):
    """NumPyro's SVI with a guide; Adam's rate falls from 5e-3 along a cosine."""

    def model():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,)))
        with handlers.block():  # a NumPyro model's own sites, where the density has some
            log_density = target.log_density(z)
        numpyro.factor("density", log_density)

    made = guide(model, init_loc_fn=init_to_value(values={"z": jnp.zeros(target.dim)}))
    block = 50

    def run(optimizer, blocks):
        svi = SVI(model, made, optimizer, Trace_ELBO(particles))
        many = jax.jit(lambda state: jax.lax.fori_loop(0, block, lambda _, state: svi.update(state)[0], state))
        state = many(svi.init(jax.random.key(seed)))
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for _ in range(blocks):
            state = many(state)
        jax.block_until_ready(state)
        return svi, state, time.perf_counter() - begun

    blocks = max(1, int(seconds / (run(optax.adam(5e-3), 3)[2] / 3)))
    svi, state, _ = run(optax.adam(optax.cosine_decay_schedule(5e-3, block * (blocks + 1))), blocks)
    params = svi.get_params(state)
    draws = made.sample_posterior(jax.random.key(seed), params, sample_shape=(DRAWS,))["z"]
    loss = Trace_ELBO(2000).loss(jax.random.key(seed), params, model, made)
    return draws, {"elbo": -float(loss), "steps": block * (blocks + 1)}


def by_pathfinder(target: Target, seed: int, seconds: float):
    """One path of quasi-Newton's method, which takes as long as it takes."""
    del seconds
    start, sample = jax.random.split(jax.random.key(seed))
    state, _ = pathfinder.approximate(start, target.log_density, jax.random.normal(start, (target.dim,)), 1000)
    return pathfinder.sample(sample, state, DRAWS)[0], {"elbo": float(state.elbo)}


def by_svgd(target: Target, seed: int, seconds: float):
    """Particles as many as a step's elsewhere: draws are these, again and again."""
    algorithm = svgd.as_top_level_api(jax.grad(target.log_density), optax.adam(0.05))
    state = algorithm.init(jax.random.normal(jax.random.key(seed), (PARTICLES, target.dim)))
    many = jax.jit(lambda state: jax.lax.fori_loop(0, 20, lambda _, state: algorithm.step(state), state))
    jax.block_until_ready(many(state))
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        state = jax.block_until_ready(many(state))
    return jnp.asarray(state.particles), {}


METHODS = {
    "avb": functools.partial(ours, "avb"),
    "sivi": functools.partial(ours, "sivi"),
    "uivi": functools.partial(ours, "uivi"),
    "normal": functools.partial(guided, AutoNormal),
    "multivariate_normal": functools.partial(guided, AutoMultivariateNormal),
    "iaf": functools.partial(guided, AutoIAFNormal),
    "bnaf": functools.partial(guided, AutoBNAFNormal),
    "dais": functools.partial(guided, AutoDAIS),
    "pathfinder": by_pathfinder,
    "svgd": by_svgd,
}
COLUMNS = {
    "sliced": "sliced W.",
    "marginal": "marginal W.",
    "kl": "KL, k-NN",
    "log_evidence": "log Z - truth",
    "elbo": "ELBO - truth",
}


def distances(drawn, exact: np.ndarray, scale: np.ndarray) -> dict[str, float]:
    drawn = np.asarray(drawn, np.float32)
    marginal = [
        sliced_wasserstein(drawn[:, [i]] / scale[i], exact[:, [i]] / scale[i], projections=1) for i in range(len(scale))
    ]
    found = {"sliced": sliced_wasserstein(drawn, exact, 100, order=2), "marginal": float(np.mean(marginal))}
    try:
        found["kl"] = knn.kl_divergence(drawn, exact)
    except UserError:  # draws that coincide
        found["kl"] = None
    return found


def table(lines: list[dict]) -> str:
    """A row per density and method: means over seeds, and their standard errors."""
    text = [f"{'':38}{'seeds':>6}" + "".join(f"{name:>20}" for name in COLUMNS.values())]
    for target in dict.fromkeys(line["target"] for line in lines):
        for method in dict.fromkeys(line["method"] for line in lines if line["target"] == target):
            own = [line for line in lines if (line["target"], line["method"]) == (target, method)]
            row = f"{target + ', ' + method:38}{len(own):>6}"
            for column in COLUMNS:
                values = np.array([line[column] for line in own if line.get(column) is not None])
                spread = f" +- {values.std(ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
                row += f"{f'{values.mean():.3f}{spread}' if len(values) else '-':>20}"
            text.append(row)
    return "\n".join(text)


def main(argv: list[str]) -> None:
    """The table."""
    del argv
    with launch.errors_in_one_line():
        compare()


def compare() -> None:
    """Runs what is not in `--out` yet, and prints the table of all.

    Raises:
      UserError: a density's file is not there.
    """
    launch.keep_programs()
    fitting.DRAWS, watch.WATCHED = 2000, 250  # its bounds are not what takes the time
    out = pathlib.Path(OUT.value) if OUT.value else None
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    there = {(line["target"], line["method"], line["seed"]) for line in lines}

    def keep(target: str, method: str, seed: int, found: dict) -> None:
        lines.append({"target": target, "method": method, "seed": seed, **found})
        print(f"{target} {method} seed {seed}: {found}", flush=True)
        if out:
            with out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")

    for name in TARGETS_OF.value or [name for name in TARGETS if name != "german_credit" or GERMAN_CREDIT.value]:
        target = TARGETS[name]()
        for seed in range(SEEDS.value):
            exact, again = (np.asarray(target.draw(jax.random.fold_in(jax.random.key(9), 2 * seed + i), DRAWS)) for i in (0, 1))
            scale = exact.std(axis=0)
            if (name, "exact", seed) not in there:
                keep(name, "exact", seed, distances(again, exact, scale))
            for method in METHODS_OF.value or METHODS:
                if (name, method, seed) in there:
                    continue
                begun = time.perf_counter()
                try:
                    drawn, extra = METHODS[method](target, seed, SECONDS.value)
                    found = distances(drawn, exact, scale)
                except (UserError, RuntimeError, ValueError) as error:
                    keep(name, method, seed, {"failed": f"{type(error).__name__}: {error}"[:200]})
                    continue
                for quantity in ("elbo", "log_evidence"):
                    if target.log_evidence is None or extra.get(quantity) is None:
                        extra.pop(quantity, None)
                    else:
                        extra[quantity] -= target.log_evidence
                seconds = {"seconds": time.perf_counter() - begun}
                keep(name, method, seed, {**found, **extra, **seconds})
    training = f"{SECONDS.value:g} seconds" if STEPS.value is None else f"{STEPS.value} steps"
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}; {training} of training, {DRAWS:,} draws")
    print(table(lines))


if __name__ == "__main__":
    app.run(main)
