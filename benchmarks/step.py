"""What a training step costs for every shipped config, next to the same networks in PyTorch where that is installed.

    python -m benchmarks.step [--cases=mnist,synthetic:paper] [--set=precision=bfloat16] [--rounds=5] [--torch=eager,compile]

Alternating, `--rounds` times each: a compiled block of our steps as `fit` runs them, and PyTorch's steps (`torch_players`:
channels_last, fused Adam, T's forward pass shared by both losses, the same binarisation and moving averages), about
`--seconds` of each; medians. PyTorch's are eager; or their losses go through torch.compile; or, on a GPU, a whole step is
captured as a CUDA graph and replayed. On a GPU both multiply in TF32. Before that, parameter counts and both losses at equal
params and draws are asserted to be equal, in float32.
GFLOP is XLA's count of one step with plain convolutions, also as a multiple of one forward pass of all players (whose backward
passes cost twice as much, less the gradients of images); the peak, that of a 2048 x 2048 float32 matrix product. Images are
random.
"""

import functools
import gc
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import avb_jax
from avb_jax import build, data, players
from avb_jax.methods import avb, vae
from avb_jax.network import as_network
from avb_jax.networks import conv
from avb_jax.networks.dcgan import layer_sizes
from avb_jax.training import blocks
from avb_jax.types import Draws, Players

CASES = flags.DEFINE_list("cases", [], "Prefixes of config:variant:method; all but celeba::avb and celeba::vae by default.")
SET = flags.DEFINE_list("set", [], "Text fields of the configs to change, field=value; without PyTorch then.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each.")
SECONDS = flags.DEFINE_float("seconds", 1.0, "Of one measurement, about.")
TORCH = flags.DEFINE_list("torch", ["eager"], "How PyTorch runs, where it is installed: eager, compile, capture.")
flags.register_validator("torch", lambda kinds: {*kinds} <= {"eager", "compile", "capture"}, "eager, compile or capture")
FORMULATION = flags.DEFINE_string("formulation", None, "Of all convolutions, in the place of what training takes.")
COUNT = flags.DEFINE_bool("count", True, "XLA's count of operations and memory: two more compilations.")
EXAMPLES = 2048  # stored
BLOCK = 20  # steps that are compiled as one
SHAPES = {"four_points": (2, 2), "digits": (8, 8), "mnist": (28, 28)}


class Case(NamedTuple):
    """A config's variant, with one of its methods."""

    experiment: str
    variant: str
    method: str

    @property
    def name(self) -> str:
        return ":".join(self)

    def config(self):
        config = importlib.import_module(f"experiments.configs.{self.experiment}").get_config(self.variant)
        config.method, config.num_seeds = self.method, 1
        config.update_from_flattened_dict(dict(change.split("=", 1) for change in SET.value))
        return config


def cases() -> list[Case]:
    found = []
    for experiment in ("synthetic", "mnist", "celeba"):
        module = importlib.import_module(f"experiments.configs.{experiment}")
        for variant in module.VARIANTS:
            for method in module.get_config(variant).method.split(","):
                found.append(Case(experiment, variant, method))
    if CASES.value:
        return [case for case in found if any(f"{case.name}:".startswith(f"{prefix}:") for prefix in CASES.value)]
    return [case for case in found if case.experiment != "celeba" or "small" in case.variant or "smoke" in case.variant]


def dataset(config) -> data.Dataset:
    size = config.data.get("size")
    shape = (size, size, 3) if size else SHAPES[config.data.name]
    stored = np.random.default_rng(0).integers(0, 256, (EXAMPLES, *shape), dtype=np.uint8)
    return data.from_arrays(stored, binarize=config.data.binarize)


def medians(runs: dict[str, Callable]) -> dict[str, float]:
    """Seconds of each function in `runs`, called in turn."""
    times = {name: [] for name in runs}
    for _ in range(ROUNDS.value):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def peak() -> float:
    """FLOP/s of a matrix product, the best of ten."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2 * 2048**3 / min(timed(lambda: jax.block_until_ready(product(a))) for _ in range(10))


class Ours:
    """A config's method and blocks of its steps, compiled."""

    def __init__(self, config):
        self.config = config
        self.data = dataset(self.config)
        self.method = build.method(self.config, config.method, self.data.x_shape)
        self.modules, self.settings = self._given()
        self.key, self.batch = jax.random.key(0), self.config.batch_size
        self.state = jax.jit(self.method.init)(self.key, jnp.zeros((2, *self.data.x_shape)))

    def _given(self) -> tuple[Players, dict]:
        """What the method's constructor is given: the players' modules, and its settings."""
        plain = self.config.copy_and_resolve_references()
        plain.ema_decay = None
        with mock.patch.object(avb_jax, self.config.method, lambda *modules, **settings: (Players(*modules), settings)):
            return build.method(plain, self.config.method, self.data.x_shape)

    def losses(self, state, draws: Draws) -> list:
        """Of encoder and decoder, and of T."""
        settings = self.settings
        of_game = {"networks": Players(*map(as_network, self.modules)), "prior": settings["prior"]}
        of_x = {**of_game, "likelihood": settings["likelihood"]}
        if self.config.method == "vae":
            return [vae.negative_elbo(state.params, state.collections, draws, **of_x)[0]]
        of_t = {name: settings[name] for name in ("contrast", "minus_log_prior")}
        loss, generative = avb.negative_elbo_adversarial(
            state.params,
            state.params.adversary,
            state.collections,
            draws,
            **of_x,
            **of_t,
            adversary_floor=settings["adversary_floor"],
        )
        of_adversary, _ = avb.adversary_loss(
            state.params.adversary, state.collections, draws, generative.compared, **of_game, **of_t
        )
        return [loss, of_adversary]

    def draw(self, key: jax.Array, x: jax.Array) -> Draws:
        """What a step draws."""
        settings = self.settings
        base = settings["contrast"].base(settings["prior"]) if "contrast" in settings else settings["prior"]
        return players.draw(key, x, base, settings["noise_dim"], self.config.noise_draws)

    def cost(self) -> tuple[float, float, float]:
        """FLOP of one step and of a forward pass, with plain convolutions, and bytes of temporary memory of a step."""
        x = jnp.zeros((self.batch, *self.data.x_shape))

        def compiled(function: Callable):
            # A function of its own, which nothing is cached for.
            return jax.jit(functools.partial(function)).lower(self.key, self.state, x).compile()

        def forward(key, state, x):
            """Encoder and T at all draws, decoder at the first."""
            return self.losses(state, self.draw(key, x))

        with mock.patch.object(conv, "formulation_of", return_value="lax"):
            plain, passed = (compiled(function).cost_analysis()["flops"] for function in (self.method.train_step, forward))
        return plain, passed, compiled(self.method.train_step).memory_analysis().temp_size_in_bytes

    def compile(self, seconds: float, mode: str = "jit") -> tuple[int, float]:
        """Finds how many steps take about that long; returns them, and the seconds of compiling a block of some."""
        several = self.config.num_seeds if self.config.num_seeds > 1 else None
        compiled = blocks.compile_blocks(
            self.method, self.data.prepare, self.data.train, mode=mode, batch_size=self.batch, num_seeds=several
        )
        state, key = self.state, self.key
        if several:
            state, key = jax.tree.map(lambda a: jnp.stack([a] * several), state), jax.random.split(key, several)
        self.state = compiled.place(state)
        shape = (BLOCK, self.batch) if several is None else (several, BLOCK, self.batch)
        batches = compiled.fetch(np.random.default_rng(0).integers(0, EXAMPLES, shape, dtype=np.int32))

        def run(count: int = 1) -> None:
            for _ in range(count):
                self.state, observed = compiled.run(key, self.state, batches)
            jax.block_until_ready(observed.info)

        first, second = timed(run), timed(run)
        count = max(1, round(seconds / second))
        self.run = functools.partial(run, count)
        return count * BLOCK, first - second


def timed(run: Callable) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def kinds_of_torch() -> list[str]:
    """How PyTorch runs, if it does."""
    return TORCH.value if importlib.util.find_spec("torch") is not None and not SET.value else []


class Torch:
    """The same in PyTorch, of the same params; imported here because PyTorch is an extra."""

    def __init__(self, ours: Ours, kind: str):
        import torch

        from benchmarks import torch_players

        self.torch, self.mirror, self.config, self.batch = torch, torch_players, ours.config, ours.batch
        torch.set_default_device("cuda" if jax.default_backend() == "gpu" else "cpu")
        self.noise_dim, params = ours.settings["noise_dim"], ours.state.params
        self.modules = torch_players.mirror(ours.modules, params, layer_sizes(*ours.data.x_shape[:2]), self.noise_dim)
        for name, module in self.modules.items():
            count = sum(a.size for a in jax.tree.leaves(getattr(params, name)))
            assert sum(p.numel() for p in module.parameters()) == count, f"{name}: other params than ours"
        self.weights = {name: list(module.parameters()) for name, module in self.modules.items()}
        options = ours.config.optimizer
        self.adams = {
            name: torch.optim.Adam(
                weights, options[f"{name}_rate"], (options.b1, options.b2), fused=True, capturable=kind == "capture"
            )
            for name, weights in self.weights.items()
        }
        self.averages = {name: [p.detach().clone() for p in weights] for name, weights in self.weights.items()}
        self.stored = torch_players.images(torch_players.tensor(ours.data.train))
        self.losses = torch_players.losses
        self.base_dim = ours.draw(jax.random.key(0), jnp.zeros((1, *ours.data.x_shape))).z_prior.shape[-1]

    def losses_at(self, draws: Draws) -> list[float]:
        """Both losses, padded as ours, in float32."""
        x, noise, z_prior = (self.mirror.tensor(a) for a in draws)
        self.multiply_in("highest")
        with mock.patch.object(self.mirror, "EXACT", True):
            found = self.mirror.losses(self.modules, self.mirror.images(x), noise, z_prior, self.config)
        self.multiply_in("high")
        return [float(loss.detach()) for loss in found if loss is not None]

    def multiply_in(self, precision: str) -> None:
        """'highest' is float32; 'high' is TF32 on GPUs, and float32 on CPUs."""
        self.torch.set_float32_matmul_precision(precision if self.on_gpu() else "highest")
        self.torch.backends.cudnn.allow_tf32 = precision == "high"

    def on_gpu(self) -> bool:
        return self.stored.is_cuda

    def prepare(self, kind: str, seconds: float) -> None:
        """Compiles or captures; finds how many steps take about that long."""
        if kind == "compile":
            self.losses = self.torch.compile(self.losses)
        if kind == "capture":
            if not self.on_gpu():
                raise app.UsageError("--torch=capture: is for GPUs; leave it out")
            side = self.torch.cuda.Stream()
            side.wait_stream(self.torch.cuda.current_stream())
            with self.torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            self.torch.cuda.current_stream().wait_stream(side)
            graph = self.torch.cuda.CUDAGraph()
            with self.torch.cuda.graph(graph):
                self.step()
            self.step = graph.replay
        self.steps = 2
        self.run()
        self.steps = max(2, round(2 * seconds / timed(self.run)))

    def run(self) -> None:
        for _ in range(self.steps):
            self.step()
        if self.on_gpu():
            self.torch.cuda.synchronize()

    def step(self) -> None:
        torch, options, adversarial = self.torch, self.config, "adversary" in self.modules
        x = self.stored[torch.randint(0, EXAMPLES, (self.batch,))].float().div_(255.0)
        x = x.contiguous(memory_format=torch.channels_last)
        if options.data.binarize == "dynamic":
            x = torch.bernoulli(x)
        if options.data.get("flip"):
            x = torch.where(torch.rand(self.batch, 1, 1, 1) < 0.5, x, x.flip(3))
        for last in [*[False] * (options.adversary_steps - 1) * adversarial, True]:
            noise = torch.randn(options.noise_draws, self.batch, self.noise_dim)
            z_prior = torch.randn(options.noise_draws, self.batch, self.base_dim)
            loss, of_t = self.losses(self.modules, x, noise, z_prior, options)
            moved = list(self.modules) if last else ["adversary"]
            generative = [p for name in moved if name != "adversary" for p in self.weights[name]]
            gradients = list(torch.autograd.grad(loss, generative, retain_graph=adversarial)) if generative else []
            if adversarial:
                gradients += torch.autograd.grad(of_t, self.weights["adversary"])
            for p, gradient in zip([p for name in moved for p in self.weights[name]], gradients, strict=True):
                p.grad = gradient
            for name in moved:
                self.adams[name].step()
        if options.ema_decay:
            with torch.no_grad():
                for name, averages in self.averages.items():
                    torch._foreach_lerp_(averages, self.weights[name], 1 - options.ema_decay)


def measure(case: Case, peak_flops: float) -> str:
    """A case's line."""
    ours = Ours(case.config())
    draws = ours.draw(jax.random.key(1), ours.data.prepare(jax.random.key(2), jnp.asarray(ours.data.train[:32])))
    with jax.default_matmul_precision("highest"):
        expected = [float(loss) for loss in jax.jit(ours.losses)(ours.state, draws)]
    flop, forward, memory = ours.cost() if COUNT.value else [math.nan] * 3
    others = {kind: Torch(ours, kind) for kind in kinds_of_torch()}
    for kind, other in others.items():
        np.testing.assert_allclose(other.losses_at(draws), expected, rtol=2e-4, err_msg=case.name)
        other.prepare(kind, SECONDS.value)
    steps, compiling = ours.compile(SECONDS.value)
    seconds = medians({"ours": ours.run} | {kind: other.run for kind, other in others.items()})
    own = seconds.pop("ours") / steps
    line = f"{case.name:24}{1e3 * own:>9.2f}{1 / own:>9.1f}{ours.batch / own:>10,.0f}{flop / 1e9:>8.2f}{flop / forward:>7.2f}"
    line += f"{flop / own / 1e9:>8.0f}"
    line += f"{flop / own / peak_flops:>7.0%}{memory / 2**20:>8.0f}{compiling:>9.1f}"
    of_others = {kind: value / others[kind].steps for kind, value in seconds.items()}
    return line + "".join(f"{1e3 * value:>10.2f}{value / own:>7.2f}" for value in of_others.values())


def main(argv: list[str]) -> None:
    """The table."""
    del argv
    peak_flops = peak()
    versions = [f"jax {jax.__version__}"]
    columns = f"{'case':24}{'ms':>9}{'steps/s':>9}{'images/s':>10}{'GFLOP':>8}{'passes':>7}{'GFLOP/s':>8}"
    columns += f"{'peak':>7}{'MiB':>8}{'compile':>9}"
    if kinds := kinds_of_torch():
        import torch

        versions.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        columns += "".join(f"{kind:>10}{'ratio':>7}" for kind in kinds)
    device = jax.devices()[0].device_kind
    print(f"{device}, {os.cpu_count()} cores, {', '.join(versions)}, float32 matmul {peak_flops / 1e9:.0f} GFLOP/s")
    print(f"medians of {ROUNDS.value} alternating runs; ms per step, MiB of temporary memory, seconds to compile a block")
    print(columns, flush=True)
    taken = {"return_value": FORMULATION.value} if FORMULATION.value else {"wraps": conv.formulation_of}
    for case in cases():
        with mock.patch.object(conv, "formulation_of", **taken):
            print(measure(case, peak_flops), flush=True)
        gc.collect()
        jax.clear_caches()


if __name__ == "__main__":
    app.run(main)
