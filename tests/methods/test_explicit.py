"""Models with a likelihood of their own: maximum likelihood, dequantisation, and what evaluation says of them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avb_jax
from avb_jax import UserError, distributions, models, networks
from avb_jax.evaluation import Exact, ImportanceSampling
from avb_jax.transforms import over_seeds, with_ema


def pixelcnn(shape, rate=0.02):
    net = networks.GatedPixelCNN(shape, 1, channels=8, layers=2, kernel_size=3)
    likelihood = models.autoregressive(net, distributions.bernoulli)
    return avb_jax.explicit(networks.ModelDecoder(None, net), likelihood=likelihood, optimizers=optax.adam(rate))


def test_it_learns_a_distribution_of_which_the_entropy_is_known():
    """2x2 images of which the diagonals alone occur, one three times as often: log p(x) comes to minus the entropy."""
    x = np.array([[[1, 0], [0, 1]]] * 3 + [[[0, 1], [1, 0]]], np.float32)
    method = pixelcnn((2, 2))
    state = avb_jax.fit(method, x, steps=300, batch_size=4, quiet=True, parallel="jit")
    report = avb_jax.evaluate(method, state, x, [Exact()], quiet=True)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert report["log_likelihood", "exact"].mean == pytest.approx(-entropy, abs=0.02)
    drawn = method.sample(jax.random.key(0), state, 400)
    assert np.mean(np.all(np.asarray(drawn) == x[0], axis=(1, 2))) == pytest.approx(0.75, abs=0.08)


@pytest.mark.slow
def test_dequantisation_bounds_whole_numbers():
    """A uniform density gives each of K values of each of D pixels K^-D, exactly; a trained one no more than they have."""
    net = networks.RealNVP((1, 2), channels=8, layers=2, scales=1)
    options = {"likelihood": models.flow(net), "optimizers": optax.adam(5e-3)}
    method = avb_jax.explicit(networks.ModelDecoder(None, net), levels=2, **options)
    x = np.array([[[0, 0]], [[0, 0]], [[1, 1]], [[0, 1]]], np.float32)
    state = avb_jax.fit(method, x, steps=1500, batch_size=4, quiet=True, parallel="jit")
    found = avb_jax.evaluate(method, state, x, [Exact(draws=200)], quiet=True)["log_likelihood", "exact"].mean
    entropy = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    assert -entropy - 0.4 < found < -entropy + 0.02
    drawn = method.sample(jax.random.key(0), state, 400).reshape(-1, 2)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert np.mean(np.all(np.asarray(drawn) == 0, axis=1)) == pytest.approx(0.5, abs=0.15)
    # By hand, at one draw of the noise.
    key = jax.random.key(3)
    noise = jax.random.uniform(key, (4, 1, 2))
    density = method.decode(state, jnp.zeros((4, 0))).log_prob((x + noise) / 2)
    np.testing.assert_allclose(method.log_likelihood(key, state, x), density - 2 * math.log(2), rtol=1e-5)


@pytest.mark.slow
def test_its_step_is_maximum_likelihood():
    """The gradient of -log p, and transformations take it along."""
    method = pixelcnn((3, 3))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 3, 3)), jnp.float32)
    state = jax.jit(method.init)(jax.random.key(0), x)
    net = networks.GatedPixelCNN((3, 3), 1, channels=8, layers=2, kernel_size=3)

    @jax.jit
    def by_hand(params):
        def loss(params):
            return -distributions.bernoulli(net.apply({"params": params["model"]}, x)).log_prob(x).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, optax.adam(0.02).update(gradient, optax.adam(0.02).init(params), params)[0]

    loss, updates = by_hand(state.params.decoder)
    after, info = jax.jit(method.train_step)(jax.random.key(1), state, x)
    jax.tree.map(
        lambda a, p, u: np.testing.assert_allclose(a, p + u, rtol=1e-4, atol=1e-6),
        after.params.decoder,
        state.params.decoder,
        updates,
    )
    np.testing.assert_allclose(info.log_likelihood.mean(), -loss, rtol=1e-5)
    averaged = with_ema(method, 0.9)
    of_seeds = over_seeds(averaged, 2)
    states = jax.eval_shape(of_seeds.init, jax.random.key(0), x)
    assert jax.eval_shape(of_seeds.log_likelihood, jax.random.key(1), states, x).shape == (2, 6)
    assert jax.eval_shape(lambda key, states: of_seeds.sample(key, states, 3), jax.random.key(1), states).shape == (2, 3, 3, 3)


def test_slips_are_named(images):
    net = networks.RealNVP((6, 6), channels=2)
    with pytest.raises(UserError, match="levels=1: must be None, or at least 2"):
        avb_jax.explicit(networks.ModelDecoder(None, net), likelihood=models.flow(net), optimizers=optax.adam(1e-3), levels=1)
    with pytest.raises(UserError, match="give whole numbers"):
        avb_jax.fit(pixelcnn((6, 6)), images, steps=1, batch_size=4, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "avb"])
def test_a_decoder_that_reads_earlier_pixels_in_any_method(name):
    """Estimators take it: the importance bound of a decoder that ignores z is log p(x) of the model itself."""
    net = networks.GatedPixelCNN((3, 3), 1, channels=4, layers=2, kernel_size=3)
    decoder = networks.ModelDecoder(networks.MLPDecoder((3, 3), 2, (4,)), net)
    trunk = networks.MLP((4,), input_rank=2)
    options = {
        "prior": distributions.standard_normal(2),
        "likelihood": models.autoregressive(net, distributions.bernoulli),
        "optimizers": optax.adam(1e-2),
        "noise_dim": 2,
    }
    if name == "vae":
        method = avb_jax.vae(networks.GaussianEncoder(trunk, 2), decoder, **options)
    else:
        adversary = networks.InnerProductAdversary(trunk, networks.MLP((4,)), 3)
        method = avb_jax.avb(networks.BlackBoxEncoder(trunk, 2), decoder, adversary, **options)
    x = np.random.default_rng(0).integers(0, 2, (8, 3, 3)).astype(np.float32)
    state = avb_jax.fit(method, x, steps=3, batch_size=4, quiet=True, parallel="jit")
    silent = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if "condition_" in jax.tree_util.keystr(path) else a, state.params.decoder
    )
    state = state._replace(params=state.params._replace(decoder=silent))
    every = np.array(list(itertools.product((0.0, 1.0), repeat=9)), np.float32).reshape(-1, 3, 3)[::32]
    report = avb_jax.evaluate(method, state, every, [ImportanceSampling(samples=8, initial="prior")], quiet=True)
    exact = models.Autoregressive(net, distributions.bernoulli, jnp.zeros((1, 3, 3, 0)), {"params": silent["model"]})
    found = report["log_likelihood", "importance"].mean
    assert found == pytest.approx(float(exact.log_prob(every).mean()), abs=1e-3)
    assert method.sample(jax.random.key(0), state, 2).shape == (2, 3, 3)
