"""Four simulated CPU devices for every test, compiled fast rather than well, and small players shared by many."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jax.numpy as jnp
import optax
import pytest

from avb_jax import Bernoulli, Deterministic, Model, Players, StandardNormal, networks
from avb_jax.methods import METHODS


def small_model(method: str = "avb", *, conv: bool = False, encoder=None, **options) -> Model:
    """A method's players for 6x6 images, 3 latents, a few hundred params each; `encoder` in the place of the usual head."""

    def trunk():
        return networks.ConvNet(channels=2, kernel_size=3) if conv else networks.MLP((8,), input_rank=2)

    kinds = METHODS[method].PLAYERS
    heads = {"gaussian": networks.GaussianEncoder, "density": networks.GaussianEncoder, None: lambda trunk, latents: None}
    head = (encoder or heads.get(kinds.encoder, networks.BlackBoxEncoder))(trunk(), 3)
    decoder = networks.ConvDecoder((6, 6), 1, 2, 3) if conv else networks.MLPDecoder((6, 6), 1, (8,))
    adversary = {
        "pairs": networks.InnerProductAdversary(trunk(), networks.MLP((8,)), 5), "latents": networks.LatentAdversary((8,)),
        "images": networks.ImageAdversary(trunk()), None: None,
    }[kinds.adversary]  # fmt: skip
    likelihood = Bernoulli() if kinds.decoder == "likelihood" else Deterministic()
    return Model(Players(head, decoder, adversary), StandardNormal(3), likelihood, 3, **options)


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
