"""The host loop: resumption, batches, checkpoints, and what it refuses. Iterators: `test_iterators.py`."""

import json
import signal
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Diverged, UserError, data, fit
from avb_jax.data.dataset import batch_indices
from avb_jax.locks import locked
from avb_jax.training import checkpoints
from avb_jax.training.callbacks import Callback, JSONLines
from avb_jax.training.loop import Interrupted, as_data, initial_state, train
from avb_jax.transforms import with_ema
from tests.conftest import small_method
from tests.training.toy import toy

OPTIONS = {"batch_size": 8, "log_every": 4, "checkpoint_every": 4, "parallel": "jit"}


@pytest.fixture
def dataset():
    """Twenty 6x6 images, binarised anew at every step."""
    return data.from_arrays(np.random.default_rng(0).random((20, 6, 6)), binarize="dynamic")


@pytest.fixture(scope="module")
def method():
    return toy()


def run(method, dataset, steps, workdir=None, **options):
    """Four-step blocks on one device."""
    return train(method, dataset, steps=steps, workdir=workdir, **{**OPTIONS, **options})


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Kept(Callback):
    """Keeps the States that it is given, by step."""

    def start(self, run):
        super().start(run)
        self.states = {}

    def checkpoint(self, step, state):
        self.states[step] = state


@pytest.mark.parametrize("num_seeds", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_resumed_run_equals_an_uninterrupted_one(dataset, tmp_path, num_seeds):
    """Bit by bit, block lengths aside: the randomness is a function of (seed, step)."""
    method = small_method("avb", batch_norm=True)
    options = {"num_seeds": num_seeds, "callbacks": [JSONLines()]}
    whole = run(method, dataset, 10, tmp_path / "whole", **options)
    run(method, dataset, 4, tmp_path / "parts", **options)
    parts = run(method, dataset, 10, tmp_path / "parts", **options)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))
    assert [line["step"] for line in read_lines(tmp_path / "parts")] == [4, 8, 10]


def test_without_seeds_it_is_the_first_one(method, dataset, tmp_path):
    """Bit for bit the State of `num_seeds=1` without its axis, and the same lines, which say nothing of seeds."""
    states = [run(method, dataset, 6, tmp_path / str(n), seed=3, num_seeds=n, callbacks=[JSONLines()]) for n in (None, 1)]
    alone, of_one = jax.device_get(states)
    assert jax.tree.leaves(alone.params)[0].ndim + 1 == jax.tree.leaves(of_one.params)[0].ndim
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda a: a[0], of_one))
    lines = [read_lines(tmp_path / str(n)) for n in (None, 1)]
    for line in [*lines[0], *lines[1]]:
        del line["examples_per_second"]
        assert "per_seed" not in line
    assert lines[0] == lines[1]


class Watched(NamedTuple):
    """An Info of the images that a step is given."""

    number: jax.Array
    square: jax.Array


def watching(key, state, x, reduce=None):
    """A train_step that observes which images it is given."""
    del key, reduce
    numbers = jnp.round(100 * x[:, 0, 0])
    return state._replace(step=state.step + 1), Watched(numbers, numbers**2)


def test_each_seed_has_batches_of_its_own_in_the_order_of_the_data_set(tmp_path):
    """Seed s of a run from `seed` trains on what `batch_indices` of seed + s says, resumed or not."""
    method = toy("watching")._replace(train_step=watching)
    images = data.from_arrays(np.broadcast_to(np.arange(20)[:, None, None] / 100, (20, 6, 6)))
    options = {"seed": 3, "num_seeds": 2, "log_every": 1, "checkpoint_every": 1, "callbacks": [JSONLines()]}
    for steps in (3, 7):  # the second one continues
        run(method, images, steps, tmp_path, **options)
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for seed in range(2):
        batches = np.float64(batch_indices(20, 8, 3 + seed, 0, 7))
        for quantity, power in (("number", 1), ("square", 2)):
            found = [line["per_seed"][quantity][seed] for line in lines]
            np.testing.assert_allclose(found, np.mean(batches**power, axis=1), rtol=1e-5)


def test_block_length_does_not_change_a_run(method, dataset):
    one, two = (run(method, dataset, 6, log_every=length) for length in (2, 5))
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(two.params), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_moves_between_kinds_of_parallelism(dataset, tmp_path):
    """A checkpoint of one device continues sharded and under pmap."""
    method = small_method("avb", batch_norm=True)
    run(method, dataset, 4, tmp_path)
    run(method, dataset, 8, tmp_path, parallel="sharded")
    state = run(method, dataset, 12, tmp_path, parallel="pmap")
    assert int(state.step) == 12
    chex.assert_tree_all_finite(jax.device_get(state))


def test_only_the_latest_checkpoints_are_kept(method, dataset, tmp_path):
    run(method, dataset, 12, tmp_path)
    assert checkpoints.steps(tmp_path / "checkpoints" / "avb") == [8, 12]


def test_another_model_does_not_fit_a_checkpoint(method, dataset, tmp_path):
    run(method, dataset, 4, tmp_path)
    with pytest.raises(UserError, match=r"the state of step 4 is of another model or another optimiser: State.collections"):
        run(toy(statistics=False), dataset, 8, tmp_path)


@pytest.mark.parametrize("parallel", ["jit", "pmap", "sharded"])
@pytest.mark.slow
def test_states_stay_their_owner_s(dataset, parallel):
    """What `train` was given, and what a callback was given and kept, outlive the steps after."""
    method, kept = with_ema(toy(), 0.9), Kept()
    options = {"parallel": parallel, "callbacks": [kept]}
    start = initial_state(method, dataset, 0, None)
    before = jax.tree.map(np.array, start)
    last = run(method, dataset, 10, state=start, **options)
    chex.assert_trees_all_equal(jax.device_get(start), before)
    states = kept.states
    assert {step: int(state.step) for step, state in states.items()} == {4: 4, 8: 8, 10: 10}
    chex.assert_trees_all_equal(jax.device_get(states[10]), jax.device_get(last))
    again = run(method, dataset, 4, state=before, **options)
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(states[4]))


def test_a_state_of_numpy_arrays_is_resumed(dataset, tmp_path):
    method = toy()
    start = jax.tree.map(np.asarray, initial_state(method, dataset, 1, None))
    run(method, dataset, 4, tmp_path, state=start)
    parts = run(method, dataset, 8, tmp_path, state=start)
    chex.assert_trees_all_equal(jax.device_get(parts), jax.device_get(run(method, dataset, 8, state=start)))


@pytest.mark.parametrize(("num_seeds", "which"), [(None, ""), (2, r" \(seed number 0, 1\)")])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(method, dataset, tmp_path, num_seeds, which):
    run(method, dataset, 4, tmp_path, num_seeds=num_seeds)
    explosive = toy(rate=1e30)
    with pytest.raises(Diverged, match=rf"avb: \w+ is not finite by step \d+{which}; lower the learning rates"):
        run(explosive, dataset, 20, tmp_path, num_seeds=num_seeds)
    assert checkpoints.steps(tmp_path / "checkpoints" / "avb") == [4]


def step_key(at, seed=0):
    """That of a step of the first seed before any rollback, as the loop derives it."""
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), at))[1]


def poisoned(method, at, key=None):
    """The method, whose update number `at` + 1 (where its key is `key`, if one is given) leaves the decoder no number."""

    def train_step(given, state, x, *others):
        after, info = method.train_step(given, state, x, *others)
        bad = state.step == at
        if key is not None:
            bad &= jnp.all(jax.random.key_data(given) == jax.random.key_data(key))
        decoder = jax.tree.map(lambda a: jnp.where(bad, jnp.nan, a), after.params.decoder)
        return after._replace(params=after.params._replace(decoder=decoder)), info

    return method._replace(train_step=train_step)


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_params_that_are_not_finite_after_the_last_update_are_neither_saved_nor_returned(dataset, tmp_path, parallel):
    """The losses of the steps are finite still: they are of the params before each update."""
    method = poisoned(toy(), 7)
    with pytest.raises(Diverged, match="something of the decoder's params or optimiser is not finite by step 8; lower"):
        run(method, dataset, 8, tmp_path, parallel=parallel)
    assert checkpoints.steps(tmp_path / "checkpoints" / "avb") == [4]


def test_a_run_that_diverged_goes_back_and_on_with_other_noise(dataset, tmp_path, capsys):
    """As often as `rollbacks` says, interruptions included, and a resumed run has that noise too."""
    method = toy()
    unlucky, doomed = poisoned(method, 5, step_key(5)), poisoned(method, 5)
    options = {**OPTIONS, "callbacks": [JSONLines()], "rollbacks": 2}
    state = fit(unlucky, dataset, steps=12, workdir=tmp_path / "whole", **options)
    assert "not finite by step 8: rollback 1 of 2" in capsys.readouterr().err
    assert [line["step"] for line in read_lines(tmp_path / "whole")] == [4, 8, 12]
    fit(unlucky, dataset, steps=8, workdir=tmp_path / "parts", **options)
    chex.assert_trees_all_equal(fit(unlucky, dataset, steps=12, workdir=tmp_path / "parts", **options), state)
    with pytest.raises(Diverged, match=r"\(after 2 rollbacks\)"):
        fit(doomed, dataset, steps=12, workdir=tmp_path / "doomed", **options)
    with pytest.raises(Diverged, match=r"\(after 2 rollbacks\)"):
        fit(doomed, dataset, steps=12, workdir=tmp_path / "doomed", **options)
    with pytest.raises(UserError, match="rollbacks=1: needs a workdir"):
        fit(method, dataset, steps=4, **{**options, "rollbacks": 1})


def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(method, dataset, tmp_path):
    """And nothing else: the run ends as it would have."""
    whole = run(method, dataset, 12)
    run(method, dataset, 8, tmp_path)
    (tmp_path / "checkpoints" / "avb" / "8" / "state" / "_CHECKPOINT_METADATA").unlink()
    with pytest.warns(RuntimeWarning, match="the state of step 8 is damaged .* that of step 4 is taken"):
        found = run(method, dataset, 12, tmp_path)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(whole))
    folder = tmp_path / "checkpoints" / "avb"
    assert checkpoints.steps(folder) == [8, 12]
    assert int(checkpoints.restore(folder, whole, step=8).step) == 8  # written anew


def test_one_training_at_a_time(method, dataset, tmp_path):
    with locked(tmp_path, "workdir"), pytest.raises(UserError, match=r"workdir=\S+: process \d+ on \S+ writes to it; wait"):
        run(method, dataset, 4, tmp_path)
    run(method, dataset, 4, tmp_path)
    with pytest.raises(UserError, match=r"steps=3: avb is at step 4 in \S+; use another workdir"):
        run(method, dataset, 3, tmp_path)


@pytest.mark.slow
def test_training_helps():
    """The VAE's loss on a learnable set falls, under the loop as a user calls it; a plain array is data enough."""
    eye = np.eye(36).reshape(36, 6, 6)[:4]
    method = small_method("vae", optimizers=optax.adam(1e-2))
    short, longer = (train(method, eye, steps=steps, batch_size=8, parallel="jit") for steps in (1, 300))
    before, after = (float(method.elbo(jax.random.key(0), state, jnp.asarray(eye)).elbo.mean()) for state in (short, longer))
    assert after > before + 10


@pytest.mark.parametrize("num_seeds", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_an_interrupted_run_continues(method, dataset, tmp_path, num_seeds):
    """SIGINT in the middle of a block: the State is saved at its end, and the run's end is what it would have been."""

    class Stopping(Callback):
        def report(self, step, numbers, examples_per_second):
            if step == 4:
                signal.raise_signal(signal.SIGINT)

    whole, handler = run(method, dataset, 14, num_seeds=num_seeds), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"avb: stopped at step (8|12) of 14, saved in {tmp_path}, from which it continues"):
        run(method, dataset, 14, tmp_path, num_seeds=num_seeds, checkpoint_every=100, callbacks=[Stopping()])
    assert signal.getsignal(signal.SIGINT) is handler
    continued = run(method, dataset, 14, tmp_path, num_seeds=num_seeds)
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(continued))


def test_seeds(method, dataset, tmp_path):
    """All that fit into 32 bits; a workdir is one seed's."""
    assert run(method, dataset, 2, tmp_path, seed=2**32 - 1).step == 2
    with pytest.raises(UserError, match=rf"^seed=1: avb in {tmp_path} was begun with seed=4294967295; use another workdir"):
        run(method, dataset, 4, tmp_path, seed=1)
    run(method, dataset, 2, tmp_path, seed=1, name="another")


def test_a_request_in_the_last_block_ends_what_is_saved(method, dataset, tmp_path):
    """So that nothing follows it, such as an evaluation; also where a run has ended before. What is only here is returned."""

    class Stopping(Callback):
        def checkpoint(self, step, state):
            signal.raise_signal(signal.SIGINT)

    whole = run(method, dataset, 4, callbacks=[Stopping()])
    for _ in range(2):
        with pytest.raises(Interrupted, match=rf"avb: stopped at step 4 of 4, saved in {tmp_path}, from which it continues"):
            run(method, dataset, 4, tmp_path, callbacks=[Stopping()])
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(run(method, dataset, 4, tmp_path)))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_seeds": 0}, {"log_every": 0}, {"checkpoint_every": 0}])
def test_counts_are_checked(method, dataset, options):
    with pytest.raises(UserError, match=f"{next(iter(options))}=0: must be at least 1"):
        run(method, dataset, 4, **options)


def test_other_arguments_are_checked(method, dataset):
    with pytest.raises(UserError, match="batch_size=None: give the number of examples"):
        run(method, dataset, 4, batch_size=None)
    for field, value, what in (
        ("steps", -1, "at least 0"),
        ("steps", "10", "a whole number"),
        ("batch_size", 8.0, "a whole number"),
        ("seed", 2**32 + 1, r"below 2\*\*32"),
        ("log_every", True, "a whole number"),
    ):
        with pytest.raises(UserError, match=f"{field}={value!r}: must be {what}"):
            run(method, dataset, **{"steps": 4, field: value})
    with pytest.raises(
        UserError, match=r"state: .params.decoder.* is \(2, .*no such array|and the method has .* num_seeds=None"
    ):
        run(method, dataset, 4, state=initial_state(method, dataset, 0, 2))
    with pytest.raises(UserError, match="data=int: give an array x"):
        run(method, 3, 4)


def test_kinds_of_data(dataset):
    """Lists and arrays become data sets; real numbers stay as they are."""
    assert as_data(dataset) is dataset
    for given in ([[1.5, -2.0], [3.0, 4.0]], np.array([[1.5, -2.0], [3.0, 4.0]]), jnp.array([[1.5, -2.0], [3.0, 4.0]])):
        made = as_data(given)
        assert isinstance(made, data.Dataset)
        np.testing.assert_array_equal(made.prepare(jax.random.key(0), made.train), [[1.5, -2.0], [3.0, 4.0]])
    assert isinstance(as_data(iter([np.zeros((3, 2))])), data.Batches)


def test_a_run_of_no_steps_is_the_state_that_it_begins_with(method, dataset):
    state = run(method, dataset, 0)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(initial_state(method, dataset, 0, None)))
