"""Slips through the Python API: an error that names the argument, its value and the remedy, and no stack trace of JAX's."""

import numpy as np
import optax
import pytest
from numpyro import distributions as dist

import avb_jax
from avb_jax import UserError, networks
from avb_jax.evaluation import ELBO

X = np.zeros((20, 3), np.float32)
NETWORK = networks.MLP((4,))
PARTS = {
    "encoder": networks.BlackBoxEncoder(NETWORK, latent_dim=1),
    "decoder": networks.MLPDecoder(x_shape=(3,), parameters=1, widths=(4,)),
    "adversary": networks.InnerProductAdversary(NETWORK, networks.MLP((4,))),
    "prior": avb_jax.distributions.standard_normal(1),
    "likelihood": avb_jax.distributions.gaussian(std=0.5),
    "optimizers": optax.adam(1e-2),
    "noise_dim": 1,
}


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (
            {"optimizers": (optax.adam(1e-3),) * 3},
            "optimizers=tuple: give an optax optimiser for all, or avb_jax.Players of one",
        ),
        ({"optimizers": 1e-3}, "optimizers=float: give an optax"),
        ({"optimizers": avb_jax.Players(optax.adam(1e-3), 3.0, None)}, r"optimizers\.decoder=float"),
        ({"adversary": None}, "adversary=None: this method has this player"),
        ({"encoder": None}, "encoder=None: this method"),
        ({"encoder": print}, "network=builtin_function_or_method: give a flax.linen module"),
        ({"prior": None}, "prior=NoneType: give one NumPyro distribution"),
        ({"likelihood": None}, "likelihood=None: must be a function of the decoder's output"),
        ({"likelihood": "gaussian"}, "likelihood='gaussian': must be a function"),
        ({"noise_dim": 0}, "noise_dim=0: must be at least 1"),
        ({"noise_dim": "3"}, "noise_dim='3': must be a number of at least 1"),
        ({"beta": "1"}, "beta='1': must be a number of at least 0"),
        ({"contrast": "adaptive"}, "contrast='adaptive': must be a contrast of avb_jax.contrast"),
        ({"divergence": "kl"}, "divergence='kl': must be a function of avb_jax.divergences"),
    ],
)
def test_of_a_method(slip, message):
    with pytest.raises(UserError, match=message):
        avb_jax.avb(**{**PARTS, **slip})


@pytest.mark.parametrize("name", ["aae", "gan", "vaegan", "iwhvi"])
def test_a_player_that_is_missing(name):
    parts = {key: value for key, value in PARTS.items() if key not in ("encoder", "decoder", "adversary")}
    players = [PARTS["encoder"], PARTS["decoder"], None][name == "gan" :]
    if name in ("gan", "vaegan"):
        del parts["likelihood"]
    if name == "gan":
        del parts["noise_dim"]
    with pytest.raises(UserError, match=r"adversary=None: this method has|reverse_model=None: must be a network"):
        getattr(avb_jax, name)(*players, **parts)


def test_a_prior_over_single_numbers():
    parts = {key: value for key, value in PARTS.items() if key != "adversary"}
    with pytest.raises(UserError, match=r"prior=Normal of batch shape .* give one NumPyro distribution over vectors"):
        avb_jax.uivi(**{**parts, "prior": dist.Normal(0.0, 1.0)})


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ({"method": "avb"}, "method='avb': give a Method, such as avb_jax.avb"),
        ({"steps": "10"}, "steps='10': must be a whole number"),
        ({"state": {"a": 1.0}}, "state: .* is no such array, and the method has"),
        ({"callbacks": avb_jax.Callback()}, r"callbacks=.*: give a list of avb_jax\.Callback"),
        ({"callbacks": [print]}, r"callbacks=.*: give a list of avb_jax\.Callback"),
        ({"workdir": 3}, "workdir=3: give the path of a folder"),
        ({"workdir": __file__}, "workdir=.*: cannot be written to"),
        ({"data": X[:0]}, "give a non-empty array"),
        ({"data": np.zeros((20, 4))}, "x .* needs"),
        ({"devices": 2}, r"devices=2: give a list of some of jax\.devices\(\)"),
        ({"parallel": "gpu"}, "parallel='gpu': must be one of"),
    ],
)
@pytest.mark.slow
def test_of_a_training(slip, message):
    arguments = {"method": avb_jax.avb(**PARTS), "data": X, "steps": 4, "batch_size": 8, "quiet": True, **slip}
    with pytest.raises(UserError, match=message):
        avb_jax.fit(**arguments)


def test_of_an_evaluation():
    method = avb_jax.avb(**PARTS)
    state = avb_jax.fit(method, X, steps=0, batch_size=8, quiet=True)
    for estimators in (ELBO(), ["elbo"]):
        with pytest.raises(UserError, match=r"estimators=.*: give a list of those of avb_jax\.evaluation"):
            avb_jax.evaluate(method, state, X, estimators, quiet=True)
    with pytest.raises(UserError, match="method=None: give a Method"):
        avb_jax.evaluate(None, state, X, [ELBO()], quiet=True)


def test_an_encoder_without_a_gradient():
    class Rounding(networks.BlackBoxEncoder):
        def __call__(self, x, noise):
            return super().__call__(x, noise).astype("int32")

    method = avb_jax.avb(**{**PARTS, "encoder": Rounding(NETWORK, latent_dim=1)})
    with pytest.raises(UserError, match="encoder: z of type int32, through which no gradient comes back"):
        avb_jax.fit(method, X, steps=2, batch_size=8, quiet=True)
