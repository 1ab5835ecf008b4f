"""The figures of images: what is in their rows."""

import jax
import numpy as np
import optax
import pytest

from avb_jax import Players, data, players
from avb_jax.methods import avb
from experiments import pictures
from tests.conftest import small_model


@pytest.fixture
def game():
    """A small model, its State, and a data set of 6x6 images."""
    rng = np.random.default_rng(0)
    dataset = data.from_arrays(rng.random((30, 6, 6)), rng.random((24, 6, 6)))
    model = small_model("avb", conv=True)
    state = avb.init(jax.random.key(0), model, Players(*[optax.identity()] * 3), dataset.train[:4])
    return state, avb, model, dataset


def test_interpolation_ends_in_the_reconstructions(game):
    key = jax.random.key(3)
    images, columns = pictures.interpolation(key, *game)
    rows = images.reshape(-1, columns, 6, 6)
    state, method, model, dataset = game
    count = len(rows)
    assert (count, columns) == (10, 10)
    np.testing.assert_allclose(rows[:, 0], dataset.test[:count], rtol=1e-6)
    np.testing.assert_allclose(rows[:, -1], dataset.test[count : 2 * count], rtol=1e-6)
    again = method.reconstruct(key, state, model, dataset.test[: 2 * count])
    np.testing.assert_allclose(rows[:, 1], again[:count], atol=1e-5)
    np.testing.assert_allclose(rows[:, -2], again[count:], atol=1e-5)
    z = method.sample_posterior(key, state, model, dataset.test[: 2 * count])
    between = (4 * z[:count] + 3 * z[count:]) / 7  # the fourth of eight codes on the line
    np.testing.assert_allclose(rows[:, 4], players.mean_images(state, model, between), atol=1e-5)


def test_neighbours_are_the_nearest(game, monkeypatch):
    monkeypatch.setattr(pictures, "_BLOCK", 7)
    images, columns = pictures.neighbours(jax.random.key(0), *game)
    rows = images.reshape(-1, columns, 6, 6)
    train = game[3].train
    for sample, *near in rows:
        distance = np.sum((train - sample) ** 2, axis=(1, 2))
        np.testing.assert_allclose(near, train[np.argsort(distance)[: len(near)]], rtol=1e-6)


def test_reconstructions_lie_below_their_originals(game):
    state, method, model, dataset = game
    images, columns = pictures.reconstructions(jax.random.key(0), *game)
    rows = images.reshape(-1, columns, 6, 6)
    np.testing.assert_allclose(rows[0], dataset.test[:columns], rtol=1e-6)
    again = method.reconstruct(jax.random.key(0), state, model, dataset.test)
    np.testing.assert_allclose(rows[1], again[:columns], atol=1e-5)
