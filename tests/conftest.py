"""Four simulated CPU devices for every test, compiled fast rather than well, and small players shared by many."""

import gc
import importlib.metadata
import inspect
import math
import os
import pathlib

COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") < "0.11":  # later ones compile faster, and do not have this flag
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
FOUR_DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FOUR_DEVICES} {COMPILE_FAST}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import avb_jax
from avb_jax import Method, Players, distributions, networks
from avb_jax.inference import checks, fitting, watch
from avb_jax.methods import gan
from avb_jax.network import as_network
from avb_jax.transforms import with_ema

gc.freeze()  # a tenth of the tests' time was in collecting what JAX traces
gc.set_threshold(200_000, 20, 100)

fitting.DRAWS, watch.WATCHED, checks.BLOCK = 2000, 125, 125  # of fitted densities: enough to check, in less time
LATENTS = 3
METHODS = {name: getattr(avb_jax, name) for name in ("avb", "vae", "aae", "bigan", "gan", "vaegan")}  # the constructors
WITH_LIKELIHOOD = ("avb", "vae", "aae")
GAUSSIAN = ("vae", "vaegan")  # those whose encoder has a density
ADVERSARIAL = [name for name in METHODS if name != "vae"]


class Normalised(nn.Module):
    """A dense layer of its flattened inputs, with batch normalisation: a trunk, and with `shape` a decoder or an adversary."""

    shape: tuple[int, ...] | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, *inputs, train=False):
        h = jnp.concatenate([a.reshape(len(a), -1) for a in inputs if a is not None], axis=-1)
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(nn.Dense(6)(h))
        h = nn.tanh(h)
        return h if self.shape is None else nn.Dense(math.prod(self.shape))(h).reshape(-1, *self.shape)


def small_modules(name: str = "avb", *, conv: bool = False, batch_norm: bool = False, encoder=None, axis_name=None) -> Players:
    """A method's players as Linen modules, for 6x6 images and 3 latents, a few hundred params each.

    `encoder`, a function of a trunk and of the number of latents, stands in the place of the usual one. `batch_norm` gives
    every player batch statistics (over `axis_name`), `conv` encoder and adversary (and takes far longer to compile).
    """

    def trunk():
        if batch_norm:
            return Normalised(axis_name=axis_name)
        return networks.ConvNet(2, 3, axis_name=axis_name) if conv else networks.MLP((8,), input_rank=2)

    head = encoder or (networks.GaussianEncoder if name in GAUSSIAN else networks.BlackBoxEncoder)
    if batch_norm:
        decoder = Normalised((6, 6, 1), axis_name)
    else:
        decoder = networks.ConvDecoder((6, 6), 1, 2, 3) if conv else networks.MLPDecoder((6, 6), 1, (8,))
    if name == "vae":
        adversary = None
    elif name in ("gan", "vaegan"):
        adversary = networks.ImageAdversary(trunk())
    elif batch_norm:
        adversary = Normalised((), axis_name)
    elif name == "aae":
        adversary = networks.LatentAdversary((8,))
    else:
        adversary = networks.InnerProductAdversary(trunk(), networks.MLP((8,)), 5)
    return Players(None if name == "gan" else head(trunk(), LATENTS), decoder, adversary)


def small_networks(name: str = "avb", **options) -> Players:
    """The same as the pure losses take them."""
    modules = small_modules(name, **options)
    if name in ("gan", "vaegan"):
        modules = modules._replace(adversary=gan.of_images(modules.adversary))
    return Players(*map(as_network, modules))


def method_of(name: str, players: Players, *, ema_decay: float | None = None, **settings) -> Method:
    """A method of the players by its constructor, given those of the settings that it has; `noise_dim` is for all."""
    constructor = METHODS[name]
    accepted = inspect.signature(constructor).parameters
    given = {player: network for player, network in players._asdict().items() if player in accepted}
    if "noise_dim" not in accepted:
        settings.pop("noise_dim")
    method = constructor(**given, **settings)
    return method if ema_decay is None else with_ema(method, ema_decay)


def small_method(
    name: str = "avb",
    *,
    conv: bool = False,
    batch_norm: bool = False,
    encoder=None,
    noise_dim: int = 3,
    likelihood=None,
    optimizers=None,
    axis_name: str | None = None,
    ema_decay: float | None = None,
    **settings,
) -> Method:
    """A method of `small_modules`, of Bernoulli pixels where it has a likelihood, trained by Adam unless said otherwise."""
    if likelihood is None and name in WITH_LIKELIHOOD:
        likelihood = distributions.bernoulli
    return method_of(
        name,
        small_modules(name, conv=conv, batch_norm=batch_norm, encoder=encoder, axis_name=axis_name),
        prior=distributions.standard_normal(LATENTS),
        optimizers=optax.adam(1e-3) if optimizers is None else optimizers,
        noise_dim=noise_dim,
        ema_decay=ema_decay,
        **({} if likelihood is None else {"likelihood": likelihood}),
        **settings,
    )


@pytest.fixture
def sgd() -> Players:
    """Plain gradient descent at rate 1 for every player, so that an update is a gradient."""
    return Players(*[optax.sgd(1.0)] * 3)


@pytest.fixture
def images() -> jax.Array:
    """Eight 6x6 images in [0, 1]."""
    return jax.random.uniform(jax.random.key(7), (8, 6, 6)).astype(jnp.float32)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real data sets that AVB_JAX_DATA names; skips the test where it does not."""
    folder = os.environ.get("AVB_JAX_DATA")
    if not folder:
        pytest.skip("AVB_JAX_DATA is not set: no real data to test on")
    return pathlib.Path(folder)
