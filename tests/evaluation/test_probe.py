"""The linear probe: codes that say the class, and codes that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avb_jax
from avb_jax import Posterior, UserError
from avb_jax.data.dataset import Dataset
from avb_jax.evaluation import LinearProbe, codes, encoding
from tests.conftest import small_method

KEY = jax.random.key(0)


@pytest.fixture
def labelled():
    """6x6 images of three classes, of which the pixel [0, class] is brighter; held out, a tenth have another label."""
    rng = np.random.default_rng(0)
    x, labels = 0.3 * rng.random((700, 6, 6), dtype=np.float32), rng.integers(0, 3, 700)
    x[np.arange(700), 0, labels] += 0.7
    wrong = labels[600:].copy()
    wrong[:10] = (wrong[:10] + 1) % 3
    return Dataset(x[:600], x[600:], train_labels=labels[:600], test_labels=wrong)


def method(of_x):
    return small_method("avb")._replace(encode=lambda key, state, x, draws: Posterior(jnp.stack([of_x(key, x)] * draws)))


def test_codes_of_a_data_set_by_batches(monkeypatch):
    """All of them, in order, with the moments that there are; slips are a line."""
    monkeypatch.setattr(encoding, "BATCH", 4)
    seen, x = method(lambda key, x: x.reshape(len(x), -1)[:, :3]), np.arange(7 * 36, dtype=np.float32).reshape(7, 6, 6) / 252
    found = codes(seen, a_state(), x, KEY, draws=2)
    assert found.keys() == {"z"}
    np.testing.assert_allclose(found["z"], np.stack([x.reshape(7, -1)[:, :3]] * 2, axis=1), rtol=1e-6)
    for wrong, message in (
        ({"method": seen._replace(encode=None)}, "has no encoder"),
        ({"draws": 0}, "draws=0"),
        ({"stored": x[:0]}, "0 ex"),
    ):
        with pytest.raises(UserError, match=message):
            codes(**{"method": seen, "state": a_state(), "stored": x, "key": KEY, **wrong})


def test_codes_that_say_the_class(labelled):
    seen = method(lambda key, x: x[:, 0, :3])
    report = avb_jax.evaluate(seen, a_state(), labelled, [LinearProbe()], quiet=True)
    found = report["accuracy", "linear_probe"]
    assert found.mean == pytest.approx(0.9)
    assert (found.examples, found.per_example.sum()) == (100, pytest.approx(90))
    np.testing.assert_allclose(found.examples_error, np.sqrt(0.9 * 0.1 / 100), rtol=1e-3)


def test_it_learns_from_training_examples_alone(labelled):
    """Where the held-out classes have other numbers, it is never right."""
    other = labelled._replace(test_labels=(np.argmax(labelled.test[:, 0, :3], axis=1) + 1) % 3)
    seen = method(lambda key, x: x[:, 0, :3])
    report = avb_jax.evaluate(seen, a_state(), other, [LinearProbe(steps=200)], quiet=True)
    assert report["accuracy", "linear_probe"].mean < 0.02


def test_codes_that_do_not(labelled):
    blind = method(lambda key, x: jax.random.normal(key, (len(x), 3)))
    report = avb_jax.evaluate(blind, a_state(), labelled, [LinearProbe(steps=100)], quiet=True)
    assert abs(report["accuracy", "linear_probe"].mean - 1 / 3) < 0.2


def test_data_without_labels(labelled):
    seen, unlabelled, state = method(lambda key, x: x[:, 0, :3]), labelled._replace(test_labels=None), a_state()
    with pytest.raises(UserError, match="arrays has no labels"):
        avb_jax.evaluate(seen, state, unlabelled, [LinearProbe()], quiet=True)
    with pytest.raises(UserError, match="steps=0"):
        LinearProbe(steps=0)


def a_state():
    return small_method("avb").init(KEY, jnp.zeros((4, 6, 6)))
