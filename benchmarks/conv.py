"""Times the formulations of the convolution layers inside a scan, forward and backward, next to PyTorch where it is installed.

    python -m benchmarks.conv [--layers=transposed,8] [--batch=128] [--rounds=5]

Alternating, medians; milliseconds for one layer's outputs and both gradients. `auto` is what training takes; the training
loop is a scan. PyTorch: channels_last, eager, padded alike on both sides.
"""

import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from avb_jax.networks import onednn
from avb_jax.networks.conv import FORMULATIONS, conv, conv_transpose

CHOSEN = flags.DEFINE_list("layers", [""], "Beginnings of the layers' names; all by default.")
BATCH = flags.DEFINE_integer("batch", 128, "Images.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each.")
STEPS = 10  # in a scan
LAYERS = {  # (function, input size, channels in, channels out, kernel, stride)
    "28 -> 14, 1 -> 16": (conv, 28, 1, 16, 5, 2),
    "14 -> 7, 16 -> 32": (conv, 14, 16, 32, 5, 2),
    "7 -> 4, 32 -> 64": (conv, 7, 32, 64, 5, 2),
    "4 -> 2, 64 -> 128": (conv, 4, 64, 128, 5, 2),
    "transposed 2 -> 4, 128 -> 64": (conv_transpose, 2, 128, 64, 5, 2),
    "transposed 4 -> 8, 64 -> 32": (conv_transpose, 4, 64, 32, 5, 2),
    "transposed 7 -> 14, 32 -> 16": (conv_transpose, 7, 32, 16, 5, 2),
    "transposed 14 -> 28, 16 -> 1": (conv_transpose, 14, 16, 1, 5, 2),
    "8, 32 -> 32": (conv, 8, 32, 32, 3, 1),
    "8, 64 -> 64": (conv, 8, 64, 64, 3, 1),
    "16, 32 -> 32": (conv, 16, 32, 32, 3, 1),
    "32, 16 -> 16": (conv, 32, 16, 16, 3, 1),
}


def ours(function, x, kernel, stride: int, formulation: str):
    """A compiled scan over the layer's gradients."""

    def run(x, kernel, cotangent):
        def body(total, _):  # the total enters, so that no pass can be hoisted out of the loop
            y, backward = jax.vjp(lambda x, w: function(x, w, stride, formulation), x + 1e-30 * total, kernel)
            return total + sum(jnp.sum(gradient) for gradient in backward(y + cotangent)), None

        return jax.lax.scan(body, 0.0, None, length=STEPS)[0]

    cotangent = jnp.ones(jax.eval_shape(lambda x, w: function(x, w, stride), x, kernel).shape)
    compiled = jax.jit(run)
    return lambda: jax.block_until_ready(compiled(x, kernel, cotangent))


def pytorch(function, x, kernel, stride: int):
    """The same layer's gradients in PyTorch."""
    import torch
    from torch.nn import functional as F

    def tensor(array, order):
        found = torch.from_numpy(np.array(array)).to("cuda" if on_gpu else "cpu").permute(*order)
        return found.contiguous(memory_format=torch.channels_last).requires_grad_()

    on_gpu, pad = jax.default_backend() == "gpu", (kernel.shape[0] - 1) // 2
    if function is conv:
        layer, order = functools.partial(F.conv2d, stride=stride, padding=pad), (3, 2, 0, 1)
    else:
        layer, order = functools.partial(F.conv_transpose2d, stride=stride, padding=pad, output_padding=1), (2, 3, 0, 1)
    given = [tensor(x, (0, 3, 1, 2)), tensor(kernel, order)]

    def run() -> None:
        for _ in range(STEPS):
            y = layer(*given)
            torch.autograd.grad(y, given, torch.ones_like(y))
        if on_gpu:
            torch.cuda.synchronize()

    return run


def main(argv: list[str]) -> None:
    """The table."""
    del argv
    others = ["PyTorch"] if importlib.util.find_spec("torch") is not None else []
    can = jax.default_backend() == "cpu" and onednn.available()
    names = [name for name in FORMULATIONS if name != "auto" and (can or name != "onednn")] + ["auto", *others]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: ms per layer, forward and backward, batch {BATCH.value}")
    print(f"{'layer':30}" + "".join(f"{name:>10}" for name in names))
    for label, (function, size, c_in, c_out, k, stride) in LAYERS.items():
        if not label.startswith(tuple(CHOSEN.value)):
            continue
        x = jax.random.normal(jax.random.key(0), (BATCH.value, size, size, c_in))
        kernel = jax.random.normal(jax.random.key(1), (k, k, c_in, c_out))
        runs = {name: ours(function, x, kernel, stride, name) for name in names if name != "PyTorch"}
        runs |= {name: pytorch(function, x, kernel, stride) for name in others}
        times = {name: [] for name in runs}
        for repeat in range(ROUNDS.value + 1):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                if repeat:  # the first one compiles
                    times[name].append(1e3 * (time.perf_counter() - begun) / STEPS)
        print(f"{label:30}" + "".join(f"{statistics.median(times[name]):>10.3f}" for name in names), flush=True)


if __name__ == "__main__":
    app.run(main)
