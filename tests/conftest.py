"""Four simulated CPU devices for every test, compiled fast rather than well, and small players shared by many."""

import math
import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from avb_jax import Bernoulli, Deterministic, Model, Players, StandardNormal, networks
from avb_jax.methods import METHODS


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


def small_model(
    method: str = "avb", *, conv: bool = False, batch_norm: bool = False, encoder=None, noise_dim: int = 3, **options
) -> Model:
    """A method's players for 6x6 images, 3 latents, a few hundred params each; `encoder` in the place of the usual head.

    `batch_norm` gives every player batch statistics, `conv` encoder and adversary (and takes far longer to compile).
    """

    def trunk():
        if batch_norm:
            return Normalised()
        return networks.ConvNet(channels=2, kernel_size=3) if conv else networks.MLP((8,), input_rank=2)

    kinds = METHODS[method].PLAYERS
    heads = {"gaussian": networks.GaussianEncoder, "density": networks.GaussianEncoder, None: lambda trunk, latents: None}
    head = (encoder or heads.get(kinds.encoder, networks.BlackBoxEncoder))(trunk(), 3)
    decoder = networks.ConvDecoder((6, 6), 1, 2, 3) if conv else networks.MLPDecoder((6, 6), 1, (8,))
    decoder = Normalised((6, 6, 1)) if batch_norm else decoder
    adversary = {
        "pairs": networks.InnerProductAdversary(trunk(), networks.MLP((8,)), 5), "latents": networks.LatentAdversary((8,)),
        "images": networks.ImageAdversary(trunk()), None: None,
    }[kinds.adversary]  # fmt: skip
    if batch_norm and kinds.adversary in ("pairs", "latents"):
        adversary = Normalised(())
    likelihood = Bernoulli() if kinds.decoder == "likelihood" else Deterministic()
    return Model(Players(head, decoder, adversary), StandardNormal(3), likelihood, noise_dim, **options)


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
