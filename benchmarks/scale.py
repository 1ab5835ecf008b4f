"""What a training step costs per example against batch, image size, latents, noise draws, seeds and devices: table and plot.

    python -m benchmarks.scale [--out=docs/scale.png] [--seconds=1] [--rounds=3]

Faces with small networks and adaptive contrast (`celeba.py:smoke`), one quantity changed at a time. Devices are simulated: all
of them share this machine's cores, so that a flat line is what no overhead looks like.
"""

import json
import os
import subprocess
import sys

import jax
import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks.step import Case, Ours, medians

OUT = flags.DEFINE_string("out", "", "Where to draw the plot.")
DEVICES = flags.DEFINE_string(
    "devices", "", "MODE:COUNT of one measurement, which is printed as JSON; used by the benchmark itself."
)
SWEEPS = {
    "batch_size": (8, 16, 32, 64, 128),
    "data.size": (16, 32, 48, 64),
    "latent_dim": (4, 16, 64, 256),
    "noise_draws": (1, 2, 4, 8),
    "num_seeds": (1, 2, 4),
}
COUNTS = (1, 2, 4, 8)
BATCH = 32  # where devices vary, of all of them


def microseconds(mode: str = "jit", **fields) -> float:
    """Per example and seed, of a step with these fields."""
    config = Case("celeba", "smoke", "avb").config()
    config.update_from_flattened_dict({"data.flip": False, **fields})
    ours = Ours(config)
    steps, _ = ours.compile(flags.FLAGS.seconds, mode)
    return 1e6 * medians({"ours": ours.run})["ours"] / (steps * config.batch_size * config.num_seeds)


def on_devices(mode: str, count: int) -> float:
    """The same in a process with so many simulated devices."""
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    options = [f"--devices={mode}:{count}", f"--seconds={flags.FLAGS.seconds}", f"--rounds={flags.FLAGS.rounds}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *options], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    """The tables, and the plot."""
    del argv
    if DEVICES.value:
        print(json.dumps(microseconds(DEVICES.value.partition(":")[0], batch_size=BATCH)))
        return
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}: microseconds per example (and seed)")
    curves = {}
    for field, values in SWEEPS.items():
        curves[field] = {value: microseconds(**{field: value}) for value in values}
        print(f"{field:24}" + "".join(f"{value:>6}: {cost:<9,.0f}" for value, cost in curves[field].items()), flush=True)
    for mode in ("sharded", "pmap"):
        name = f"devices, {mode}"
        curves[name] = {count: on_devices(mode, count) for count in COUNTS}
        print(f"{name:24}" + "".join(f"{value:>6}: {cost:<9,.0f}" for value, cost in curves[name].items()), flush=True)
    if OUT.value:
        figure, axes = plt.subplots(1, len(curves), figsize=(2.6 * len(curves), 2.8), layout="constrained")
        for axis, (name, curve) in zip(axes, curves.items(), strict=True):
            axis.semilogx(list(curve), list(curve.values()), "o-")
            axis.set_xticks(list(curve), [str(value) for value in curve])
            axis.minorticks_off()
            axis.set_title(name)
            axis.set_ylim(0, 1.1 * max(curve.values()))
            axis.yaxis.set_major_formatter("{x:,.0f}")
        axes[0].set_ylabel("microseconds per example")
        figure.savefig(OUT.value, dpi=110)


if __name__ == "__main__":
    app.run(main)
