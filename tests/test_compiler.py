"""What the compiler makes of the library's expressions, against the same uncompiled and in 64 bits.

A release of jaxlib may compute wrong numbers without a word (`avb_jax.releases`), and for some sizes only: for rows past a
power of two, say. The tests' own interpreter compiles without optimisation and for four devices (`conftest`), which is not what
users run. So another one compares everything as they have it compiled; `python -m tests.test_compiler` prints what differs.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from avb_jax import distributions, divergences, inference, networks
from avb_jax.evaluation.examples import sum_up

ROOT = pathlib.Path(__file__).parents[1]
TOLERANCE = 1e-4  # of a number or of its array's root mean square; rounding to 32 bits is 2e-6 here at most
ROWS = (1_023, 16_385, 32_769)
ELEMENTWISE = [
    ("exp", jnp.exp, np.exp),
    ("expm1", jnp.expm1, np.expm1),
    ("tanh", jnp.tanh, np.tanh),
    ("log", lambda x: jnp.log(jnp.abs(x)), lambda x: np.log(np.abs(x))),
    ("log1p", lambda x: jnp.log1p(jnp.abs(x)), lambda x: np.log1p(np.abs(x))),
    ("sigmoid", jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    ("softplus", jax.nn.softplus, lambda x: np.logaddexp(0, x)),
]
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def filled(module, *inputs):
    """Variables for the module, no zeros among them."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda a: normal(*a.shape) / np.sqrt(max(a.shape[:-1], default=4)), shapes)


def quadratic(z, p):
    """A log density of a user's: it is given one z [Z] and vmapped."""
    return -0.5 * jnp.sum(jnp.square(p @ z))


def of_rows(dim):
    """Expressions that take each row of z [rows, dim] by itself: (name, function of z and parameters, parameters)."""
    p, mean, z = normal(dim, dim), normal(dim), normal(2, dim)
    yield "density", lambda z, p: jax.vmap(quadratic, (0, None))(z, p), (p,)
    if dim != 3:
        return
    yield "its gradient", lambda z, p: jax.vmap(jax.grad(quadratic), (0, None))(z, p), (p,)

    prior = distributions.standard_normal(dim)

    def with_a_prior(z, p):
        return inference.Density(lambda z: quadratic(z, p), dim).log_prob(z) - prior.log_prob(z)

    yield "density with a prior", with_a_prior, (p,)
    yield "normal", lambda z, m: distributions.normal(m, jnp.exp(m)).log_prob(z), (mean,)
    yield "log-sum-exp", lambda z, p: jax.nn.logsumexp(z @ p, axis=-1), (p,)
    codes = networks.LatentAdversary((8,), nn.tanh)
    yield "T of codes", lambda z, v: codes.apply(v, z, z) + 0.5 * jnp.sum(jnp.square(z), axis=-1), (filled(codes, z, z),)
    pairs = networks.InnerProductAdversary(networks.MLP((8,), nn.tanh), networks.MLP((8,), nn.tanh), 5)
    yield "T of pairs", lambda z, v: pairs.apply(v, z, jnp.stack([z, -z])), (filled(pairs, z, z),)
    encoder = networks.FullCovarianceEncoder(networks.MLP((8,), nn.tanh), dim)
    yield "full covariance", lambda z, v: encoder.apply(v, z, -z).log_q, (filled(encoder, z, z),)


def others():
    """Further expressions: (name, function, arguments), all randomness in the arguments."""
    z, p = normal(32_769, 3), normal(3, 3)
    yield "weights", lambda z, p: sum_up(jax.vmap(quadratic, (0, None))(z, p)), (z, p)

    def anneal(z, p):
        def step(z, beta):
            z = z + 0.1 * beta * jax.vmap(jax.grad(quadratic), (0, None))(z, p)
            return z, jax.vmap(quadratic, (0, None))(z, p)

        return jax.lax.scan(step, z, jnp.linspace(0.0, 1.0, 3))

    yield "annealing", anneal, (z, p)
    pairs = networks.InnerProductAdversary(networks.MLP((8,), nn.tanh), networks.MLP((8,), nn.tanh), 5)

    def loss(v, z):
        return jnp.mean(divergences.jensen_shannon(*pairs.apply(v, z, jnp.stack([z, -z]))))

    yield "the adversary's gradients", jax.grad(loss, (0, 1)), (filled(pairs, z, z), z[:16_385])
    likelihoods = {
        "Bernoulli": (distributions.bernoulli, 1),
        "Gaussian": (distributions.gaussian(), 2),
        "discretised logistic": (distributions.discretized_logistic(), 2),
    }
    for name, (likelihood, parameters) in likelihoods.items():

        def of_chains(output, x, likelihood=likelihood):  # as annealing has photographs: examples, chains, one z
            return jax.vmap(lambda of, x: jax.vmap(lambda one: likelihood(one).log_prob(x[None])[0])(of))(output, x)

        x = jnp.asarray(RNG.integers(0, 256, (5, 7, 9, 3)) / 255, jnp.float32)
        output = normal(5, 3, 1, *x.shape[1:], parameters)
        yield f"{name} of chains", of_chains, (output, x)


def uncompiled(function, *arguments):
    """Its value operation by operation, in 64 bits."""
    with jax.enable_x64(True), jax.disable_jit():
        return function(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments))


def off(got, expected):
    """The largest error of the trees' arrays, in tolerances."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b) / (TOLERANCE * np.maximum(np.abs(b), np.sqrt(np.mean(np.square(b)))))
        worst = max(worst, np.max(np.where(np.isfinite(error), error, np.inf)))
    return worst


def compare():
    """Yields (name, largest error in tolerances) of everything."""
    for dim in (2, 3, 8):
        z = normal(ROWS[-1], dim)
        for name, function, parameters in of_rows(dim):
            of_all = np.asarray(uncompiled(function, z, *parameters))
            for rows in ROWS:
                expected = of_all[tuple(slice(rows if size == len(z) else None) for size in of_all.shape)]
                yield f"{name} [{rows}, {dim}]", off(jax.jit(function)(z[:rows], *parameters), expected)
    for name, function, arguments in others():
        yield name, off(jax.jit(function)(*arguments), uncompiled(function, *arguments))
    for size in range(1, 71):  # each function at ten sizes, which leave every remainder by 2, 4 and 8 numbers
        x = 3.0 * normal(size)
        name, of_jax, of_numpy = ELEMENTWISE[size % len(ELEMENTWISE)]
        yield f"{name} [{size}]", off(jax.jit(of_jax)(x), of_numpy(np.asarray(x, np.float64)))
    for name, of_jax, of_numpy in ELEMENTWISE:
        yield f"{name} [70] without jit", off(of_jax(x), of_numpy(np.asarray(x, np.float64)))


def main():
    """Prints a line per difference, and at last how much was compared."""
    count, largest = 0, 0.0
    for name, error in compare():
        count, largest = count + 1, max(largest, error)
        if error > 1.0:
            print(f"{name}: off by {TOLERANCE * error:.2g}")
    print(f"{count} comparisons, the largest error {largest:.2g} tolerances")


def test_what_is_compiled_equals_what_is_not():
    own = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in own} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_compiler"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    *differences, last = done.stdout.splitlines()
    assert not differences, "\n".join([*differences, last])
    assert int(last.split()[0]) > 100, last


if __name__ == "__main__":
    main()
