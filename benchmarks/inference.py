"""What a step of AVB for a density costs, next to NumPyro's SVI with its guides, on eight schools.

    python -m benchmarks.inference [--draws=512] [--rounds=5]

Alternating: compiled blocks of our steps at `inference.fit`'s default sizes, and of `SVI.update` with as many particles as ours
has draws, `--rounds` times each; medians. Ours updates T twice a step. What the draws are worth afterwards is another question:
see `python -m experiments.eight_schools`.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import initialize_model

from avb_jax import inference, networks
from avb_jax.transforms import with_ema
from experiments.eight_schools import SIGMA, Y, schools

DRAWS = flags.DEFINE_integer("draws", 512, "Of z per step.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each.")
STEPS = 200
GUIDES = (AutoNormal, AutoMultivariateNormal, AutoIAFNormal, AutoBNAFNormal)


def ours():
    """The method of `inference.fit` for the model, and its first State."""
    info = initialize_model(jax.random.key(0), schools, model_args=(Y, SIGMA))
    flat, unravel = jax.flatten_util.ravel_pytree(info.param_info.z)
    method = inference.density_method(
        lambda z: -info.potential_fn(unravel(z)),
        flat.size,
        networks.Sampler(flat.size),
        networks.LatentAdversary(),
        optimizers=optax.chain(optax.clip_by_global_norm(10.0), optax.adam(2e-4)),
        noise_dim=2 * flat.size + 16,
        adversary_steps=2,
    )
    method = with_ema(method, inference.EMA_DECAY)
    return method, method.init(jax.random.key(0), jnp.zeros((2, 0)))


def blocks() -> dict:
    """Compiled blocks of `STEPS` steps by name, each a function of a State, and the States."""
    method, state = ours()
    x = jnp.zeros((DRAWS.value, 0))
    found = {"AVB, adaptive contrast": (lambda state: method.train_step(jax.random.key(1), state, x)[0], state)}
    for guide in GUIDES:
        svi = SVI(schools, guide(schools), optax.adam(5e-3), Trace_ELBO(DRAWS.value))
        found[f"SVI, {guide.__name__}"] = (
            lambda state, svi=svi: svi.update(state, Y, SIGMA)[0],
            svi.init(jax.random.key(0), Y, SIGMA),
        )
    return {
        name: (jax.jit(lambda s, f=f: jax.lax.fori_loop(0, STEPS, lambda _, s: f(s), s)), s) for name, (f, s) in found.items()
    }


def main(argv: list[str]) -> None:
    """The table."""
    del argv
    compiled, times, compiling = blocks(), {}, {}
    for repeat in range(ROUNDS.value + 1):
        for name, (block, state) in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(block(state))
            seconds = time.perf_counter() - begun
            if repeat:
                times.setdefault(name, []).append(seconds / STEPS)
            else:
                compiling[name] = seconds
    print(
        f"eight schools, {DRAWS.value} draws a step, {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"medians of {ROUNDS.value}"
    )
    print(f"{'':28}{'ms/step':>9}{'draws/s':>12}{'first block, s':>16}")
    for name, values in times.items():
        seconds = statistics.median(values)
        print(f"{name:28}{1e3 * seconds:>9.3f}{DRAWS.value / seconds:>12,.0f}{compiling[name]:>16.1f}")


if __name__ == "__main__":
    app.run(main)
