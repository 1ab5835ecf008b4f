"""Evaluation by blocks: what is kept, continued, and done anew."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Interrupted
from avb_jax.estimation import by_blocks


class Square(NamedTuple):
    """A result with a field that is left out."""

    value: jax.Array
    nothing: jax.Array | None = None


class Counting:
    """An estimator that notes the examples it was asked for, and is interrupted after some calls."""

    def __init__(self, calls=100):
        self.asked, self.calls = [], calls

    def __call__(self, numbers):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += list(numbers)
        return Square(jnp.square(numbers))


def run(folder, estimate, count=10, block=4, **settings):
    like = Square(value=jnp.zeros(block))
    return by_blocks("test", estimate, like, count, block, folder, settings, lambda r: f"mean {r.value.mean()}")


def test_all_examples_once_in_blocks_of_one_size(tmp_path, capsys):
    estimate = Counting()
    result = run(tmp_path / "a", estimate)
    np.testing.assert_array_equal(result.value, np.arange(10) ** 2)
    assert result.nothing is None
    assert estimate.asked == list(range(12))  # the last block runs past the end
    assert "test example 10/10  mean 28.5" in capsys.readouterr().err


def test_an_interrupted_evaluation_continues(tmp_path, capsys):
    with pytest.raises(Interrupted, match="stopped after example 4 of 10; the same command continues it"):
        run(tmp_path / "a", Counting(calls=1), draws=3)
    rest = Counting()
    np.testing.assert_array_equal(run(tmp_path / "a", rest, draws=3).value, np.arange(10) ** 2)
    assert rest.asked[0] == 4
    assert "test: continues after example 4" in capsys.readouterr().err
    nothing, more = Counting(), Counting()
    run(tmp_path / "a", nothing, draws=3)
    assert not nothing.asked
    np.testing.assert_array_equal(run(tmp_path / "a", nothing, count=6, draws=3).value, np.arange(6) ** 2)
    np.testing.assert_array_equal(run(tmp_path / "a", more, count=15, block=3, draws=3).value, np.arange(15) ** 2)
    assert more.asked == [10, 11, 12, 13, 14, 15]
    assert not list(tmp_path.rglob("*.partial"))


def test_other_settings_begin_anew(tmp_path):
    run(tmp_path / "a", Counting(), draws=3)
    again = Counting()
    run(tmp_path / "a", again, draws=4)
    assert again.asked[0] == 0
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"draws": 4}
