"""Times the two formulations of the convolution layers, alone and inside a scan, forward and backward.

    python benchmarks/conv.py

Prints a table of GFLOP/s: medians of alternating runs. The training loop is a scan, so its columns are the ones that count.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from avb_jax.networks.conv import conv, conv_transpose

BATCH, KERNEL, STEPS, REPEATS = 128, 5, 3, 5
LAYERS = {  # name: (function, input size, channels in, channels out, stride)
    "conv 28 -> 14, 1 -> 16": (conv, 28, 1, 16, 2),
    "conv 14 -> 7, 16 -> 32": (conv, 14, 16, 32, 2),
    "conv 7 -> 4, 32 -> 64": (conv, 7, 32, 64, 2),
    "transposed 4 -> 8, 64 -> 32": (conv_transpose, 4, 64, 32, 2),
    "transposed 7 -> 14, 32 -> 16": (conv_transpose, 7, 32, 16, 2),
}


def programs(function, stride: int, formulation: str) -> dict:
    """Compiled forward and forward-and-backward passes, alone and scanned; each takes (x, kernel)."""

    def forward(x, kernel):
        return jnp.sum(function(x, kernel, stride, formulation) ** 2)

    def scanned(f):
        def run(x, kernel):
            def body(total, _):  # the total enters, so that no pass can be hoisted out of the loop
                result = f(x + 1e-30 * total, kernel)
                return total + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result)), None

            return jax.lax.scan(body, 0.0, None, length=STEPS)[0]

        return run

    gradient = jax.grad(forward, (0, 1))
    return {
        "forward": (jax.jit(forward), 1, 1),
        "backward": (jax.jit(gradient), 3, 1),
        "forward, scan": (jax.jit(scanned(forward)), 1, STEPS),
        "backward, scan": (jax.jit(scanned(gradient)), 3, STEPS),
    }


def main() -> None:
    columns = ["forward", "backward", "forward, scan", "backward, scan"]
    print(f"GFLOP/s on {jax.devices()[0].device_kind}, batch {BATCH}, {KERNEL}x{KERNEL}, median of {REPEATS}")
    print(f"{'layer':30}{'formulation':13}" + "".join(f"{c:>16}" for c in columns))
    for name, (function, size, c_in, c_out, stride) in LAYERS.items():
        x = jax.random.normal(jax.random.key(0), (BATCH, size, size, c_in))
        kernel = jax.random.normal(jax.random.key(1), (KERNEL, KERNEL, c_in, c_out))
        positions = (-(-size // stride)) ** 2 if function is conv else size**2
        flops = 2 * BATCH * positions * KERNEL**2 * c_in * c_out
        candidates = {formulation: programs(function, stride, formulation) for formulation in ("lax", "matmul")}
        times = {(f, column): [] for f in candidates for column in columns}
        for repeat in range(REPEATS + 1):
            for formulation, compiled in candidates.items():
                for column in columns:
                    begun = time.perf_counter()
                    jax.block_until_ready(compiled[column][0](x, kernel))
                    if repeat:  # the first one compiles
                        times[formulation, column].append(time.perf_counter() - begun)
        for formulation, compiled in candidates.items():
            rates = [flops * compiled[c][1] * compiled[c][2] / statistics.median(times[formulation, c]) / 1e9 for c in columns]
            print(f"{name:30}{formulation:13}" + "".join(f"{rate:>16.1f}" for rate in rates), flush=True)


if __name__ == "__main__":
    main()
