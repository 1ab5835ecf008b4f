"""Iterators of batches as data: positions that are saved and restored, and what is refused."""

import json

import chex
import grain
import jax
import numpy as np
import pytest

from avb_jax import UserError, data
from avb_jax.data.iterator import Batches
from avb_jax.training.callbacks import Callback
from avb_jax.training.loop import train
from tests.training.toy import toy

EXAMPLES = np.random.default_rng(0).random((20, 6, 6), np.float32)
OPTIONS = {"log_every": 4, "checkpoint_every": 4, "parallel": "jit"}


class Shuffled:
    """Batches of 8 without end, in an order of its own for each epoch, with a position."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        order = np.random.default_rng(self.count // 2).permutation(len(EXAMPLES))
        start = 8 * (self.count % 2)
        self.count += 1
        return EXAMPLES[order[start : start + 8]]

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


class Bytes(Shuffled):
    """The same with a state of bytes, as some of grain's have."""

    def get_state(self):
        return str(self.count).encode()

    def set_state(self, state):
        self.count = int(state.decode())


class Stopping(Callback):
    """Fails right after the checkpoint of step 8, when the batches of further steps have been read."""

    def checkpoint(self, step, state):
        if step == 8:
            raise InterruptedError


def of_grain_dataset():
    batches = grain.MapDataset.source(EXAMPLES).seed(1).shuffle().repeat().batch(8, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def of_grain_loader():
    sampler = grain.samplers.IndexSampler(len(EXAMPLES), shuffle=True, seed=2)
    return iter(
        grain.DataLoader(data_source=EXAMPLES, sampler=sampler, operations=[grain.transforms.Batch(8, drop_remainder=True)])
    )


@pytest.fixture(scope="module")
def method():
    return toy()


@pytest.mark.parametrize(
    "make", [of_grain_dataset, *(pytest.param(make, marks=pytest.mark.slow) for make in (Shuffled, Bytes, of_grain_loader))]
)
def test_an_interrupted_run_resumes_with_the_batches_that_it_would_have_seen(method, make, tmp_path):
    """Bit for bit, although the loop reads ahead of the steps; and the batches are those of the iterator."""
    whole = train(method, make(), steps=14, workdir=tmp_path / "whole", **OPTIONS)
    with pytest.raises(InterruptedError):
        train(method, make(), steps=14, workdir=tmp_path / "parts", callbacks=[Stopping()], **OPTIONS)
    parts = train(method, make(), steps=14, workdir=tmp_path / "parts", **OPTIONS)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))
    alone = train(method, make(), steps=14, **OPTIONS)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(alone))


def test_it_trains_as_an_array_of_its_batches(method):
    """An iterator over a data set's own batches, by their indices, is that data set."""
    of_array = train(method, EXAMPLES, steps=5, batch_size=8, **OPTIONS)
    order = data.dataset.batch_indices(len(EXAMPLES), 8, 0, 0, 5)
    of_iterator = train(method, (EXAMPLES[indices] for indices in order), steps=5, **OPTIONS)
    chex.assert_trees_all_equal(jax.device_get(of_array), jax.device_get(of_iterator))


@pytest.mark.parametrize("parallel", ["sharded", "pmap"])
def test_on_several_devices_and_for_several_seeds(method, parallel):
    """All seeds see the same batches."""
    state = train(method, Shuffled(), steps=3, num_seeds=2, **{**OPTIONS, "parallel": parallel})
    np.testing.assert_array_equal(state.step, [3, 3])
    leaf = jax.tree.leaves(state.params)[-1]
    assert not np.array_equal(leaf[0], leaf[1])


def test_one_that_has_no_position_is_refused_with_a_workdir(method, tmp_path):
    """In one line, before any step; without a workdir it will do."""
    batches = [EXAMPLES[:8]] * 6
    with pytest.raises(UserError, match="the iterator has no get_state and set_state") as error:
        train(method, iter(batches), steps=6, workdir=tmp_path, **OPTIONS)
    assert "\n" not in str(error.value)
    assert int(train(method, iter(batches), steps=6, **OPTIONS).step) == 6


def test_one_that_ends_is_an_error_in_one_line(method):
    """As is one that has nothing at all; what it has is trained on, to the last batch."""
    assert int(train(method, iter([EXAMPLES[:8]] * 7), steps=7, **OPTIONS).step) == 7
    for count in (0, 5, 6):
        with pytest.raises(UserError, match="the iterator has no more batches; repeat it, or lower steps") as error:
            train(method, iter([EXAMPLES[:8]] * count), steps=7, **OPTIONS)
        assert "\n" not in str(error.value)


def test_batches_are_all_alike(method):
    with pytest.raises(UserError, match=r"a batch of shape \(4, 6, 6\) after one of \(8, 6, 6\); drop what is left over"):
        train(method, iter([EXAMPLES[:8], EXAMPLES[8:16], EXAMPLES[16:]]), steps=3, **OPTIONS)
    with pytest.raises(UserError, match="batch_size=4: the iterator gives batches of 8; leave it out"):
        train(method, iter([EXAMPLES[:8]]), steps=1, batch_size=4, **OPTIONS)
    with pytest.raises(UserError, match=r"a batch of shape \(8,\); an iterator must give arrays"):
        train(method, iter([EXAMPLES[:8, 0, 0]]), steps=1, **OPTIONS)


def test_one_that_fills_one_buffer_again_and_again(method):
    """Its batches are those of its moments."""
    buffer = np.zeros((8, 6, 6), np.float32)

    def batches():
        for number in range(100):
            buffer[:] = number
            yield buffer

    np.testing.assert_array_equal(Batches(batches()).take(4)[:, 0, 0, 0], [0, 1, 2, 3])


def test_positions_are_kept_with_the_checkpoints(method, tmp_path):
    """Of the latest three; a workdir whose positions do not belong to its checkpoint is refused."""
    train(method, Shuffled(), steps=18, workdir=tmp_path, **OPTIONS)
    path = tmp_path / "data" / "avb.json"
    kept = json.loads(path.read_text())
    assert {int(step): position for step, position in kept.items()} == {s: {"state": {"count": s}} for s in (12, 16, 18)}
    path.write_text(json.dumps({"16": kept["16"]}))
    with pytest.raises(UserError, match="has no position of the data at step 18; start again in a new workdir"):
        train(method, Shuffled(), steps=20, workdir=tmp_path, **OPTIONS)
