"""`over_devices`: the multi-device gradient against one device's full batch, with SGD (Adam would hide a factor)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Draws, contrast, distributions, players
from avb_jax.methods import avb
from avb_jax.transforms import over_devices
from tests.conftest import METHODS, small_method, small_networks

AXIS, COUNT, SHARE = "devices", 4, 2
KEY = jax.random.key(5)
PRIOR = distributions.standard_normal(3)


@pytest.fixture
def shares(images):
    """Each device's images [4, 2, 6, 6]."""
    return images.reshape(COUNT, SHARE, 6, 6)


def step(method, state, shares):
    """A step of all devices from one State; what is returned has a leading axis of them."""
    mapped = jax.pmap(
        over_devices(method, AXIS).train_step, AXIS, in_axes=(None, None, 0), devices=jax.devices()[: len(shares)]
    )
    return mapped(KEY, state, shares)


def first(tree):
    return jax.tree.map(lambda a: a[0], tree)


assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("avb", "vaegan"))) for name in METHODS]
)
def test_a_step_is_the_mean_of_the_devices_steps(name, sgd, images, shares):
    """By plain gradient descent, of what each device's share and randomness alone would have made; the same on each device."""
    method = small_method(name, optimizers=sgd)
    state = jax.jit(method.init)(KEY, images)
    after, info = step(method, state, shares)
    alone = jax.jit(method.train_step)
    parts = [alone(jax.random.fold_in(KEY, d), state, shares[d]) for d in range(COUNT)]
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *[part.params for part, _ in parts])
    for device in range(COUNT):
        assert_close(jax.tree.map(lambda a, d=device: a[d], after.params), mean)
    assert int(after.step[0]) == 1
    means = [{field: np.mean(value) for field, value in i._asdict().items() if value is not None} for _, i in parts]
    for field, value in info._asdict().items():
        if value is not None:
            assert value.shape == (COUNT,)
            np.testing.assert_allclose(value[0], np.mean([numbers[field] for numbers in means]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_norm", "adaptive", "weighted"),
    [
        (False, contrast.PriorContrast(), False),
        (True, contrast.PriorContrast(), False),
        (True, contrast.GaussianContrast(), False),
        (False, contrast.GaussianContrast(), True),
    ],
)
@pytest.mark.slow
def test_the_full_batch_gradient_is_taken(batch_norm, adaptive, weighted, sgd, images, shares):
    """Each device draws noise of its own: the full batch is made of the devices' draws put together.

    Networks that normalise over the batch are given the axis, and then normalise over all of it.
    """
    settings = {"contrast": adaptive, "noise_draws": 2, "optimizers": sgd, "importance_weighted": weighted}
    method = small_method("avb", batch_norm=batch_norm, axis_name=AXIS, **settings)
    plain = small_method("avb", batch_norm=batch_norm, **settings)
    state = jax.jit(plain.init)(KEY, images)
    after, info = step(method, state, shares)
    draws = [players.draw(jax.random.fold_in(KEY, d), shares[d], PRIOR, 3, 2) for d in range(COUNT)]
    draws = Draws(*(jnp.concatenate(parts, axis) for axis, parts in zip((0, 1, 1), zip(*draws, strict=True), strict=True)))
    of_t = {"networks": small_networks("avb", batch_norm=batch_norm), "prior": PRIOR, "contrast": adaptive}

    @jax.jit
    def by_hand(params, collections, draws):
        bound = functools.partial(
            avb.negative_elbo_adversarial, likelihood=distributions.bernoulli, importance_weighted=weighted
        )
        gradients, found = jax.grad(bound, has_aux=True)(params, params.adversary, collections, draws, **of_t)
        of_loss = jax.grad(avb.adversary_loss, has_aux=True)
        gradient, (_, of_adversary) = of_loss(params.adversary, collections, draws, found.compared, **of_t)
        return gradients, gradient, found.collections, of_adversary, found.terms.elbo.mean()

    gradients, gradient, collections, of_adversary, elbo = by_hand(state.params, state.collections, draws)
    expected = jax.tree.map(lambda p, g: p - g, state.params, gradients._replace(adversary=gradient))
    assert_close(first(after.params), expected)
    assert_close(first(after.collections), collections._replace(adversary=of_adversary))
    np.testing.assert_allclose(info.elbo[0], elbo, rtol=1e-4)


class Unaware(nn.Module):
    """A module that normalises and does not know of the axis, and counts its batches."""

    latent_dim: int = 3

    @nn.compact
    def __call__(self, x, noise, train=False):
        self.variable("counts", "batches", lambda: jnp.zeros((), jnp.int32)).value += train
        h = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.reshape(len(x), -1))
        return nn.Dense(self.latent_dim)(jnp.concatenate([h, noise], -1))


def test_batch_statistics_of_a_module_without_an_axis_are_averaged(images):
    """A user's own normalisation sees its device's share alone; its running statistics are the devices' mean, everywhere."""
    method = small_method("avb", encoder=lambda trunk, latents: Unaware(latents), optimizers=optax.sgd(1.0), ema_decay=0.9)
    shares = images.reshape(2, 4, 6, 6)
    after, _ = step(method, method.init(KEY, images), shares)
    flat = np.asarray(shares).reshape(2, 4, 36)
    mean, variance = 0.5 * flat.mean(axis=1).mean(axis=0), 0.5 + 0.5 * flat.var(axis=1).mean(axis=0)
    rate = 0.1  # of the moving averages' first step
    for device in range(2):
        found = jax.tree.map(lambda a, d=device: a[d], after.collections.encoder)
        np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4)
        np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["var"], variance, rtol=1e-4)
        assert int(found["counts"]["batches"]) == 1
        averaged = jax.tree.map(lambda a, d=device: a[d], after.ema.collections.encoder)
        np.testing.assert_allclose(averaged["batch_stats"]["BatchNorm_0"]["mean"], (1 - rate) * mean, rtol=1e-4)
        assert int(averaged["counts"]["batches"]) == 1


def test_all_but_the_step_is_the_method(images):
    method = small_method("avb")
    mapped = over_devices(method, AXIS)
    assert mapped._replace(train_step=method.train_step) == method
    assert mapped.train_step is not method.train_step
