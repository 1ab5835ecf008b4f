"""The host loop: resumption, reports, checkpoints, and what it refuses."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Info, Players, UserError, checkpoints, data, fit
from avb_jax.data.dataset import batch_indices
from avb_jax.loop import initial_state
from avb_jax.methods import METHODS, avb, vae
from tests.conftest import small_model

OPTIMIZERS = Players(*[optax.adam(1e-3)] * 3)


@pytest.fixture
def dataset():
    """Twenty 6x6 images, binarised anew at every step."""
    return data.from_arrays(np.random.default_rng(0).random((20, 6, 6)), binarize="dynamic")


def train(dataset, steps, workdir=None, model=None, **options):
    """Four-step blocks on one device."""
    options = {"batch_size": 8, "log_every": 4, "checkpoint_every": 4, "mode": "jit", "quiet": True, **options}
    return fit(avb, model or small_model("avb", batch_norm=True), OPTIMIZERS, dataset, steps=steps, workdir=workdir, **options)


def test_a_resumed_run_equals_an_uninterrupted_one(dataset, tmp_path):
    """Bit by bit, block lengths aside: the randomness is a function of (seed, step)."""
    whole = train(dataset, 10, tmp_path / "whole")
    train(dataset, 4, tmp_path / "parts")
    parts = train(dataset, 10, tmp_path / "parts")
    chex.assert_trees_all_equal(jax.device_get(whole), jax.device_get(parts))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10]


def test_each_seed_has_batches_of_its_own_in_the_order_of_the_data_set(tmp_path):
    """Seed s of a run from `seed` trains on what `batch_indices` of seed + s says, resumed or not."""

    class Watching:
        """A method that observes which images it is given."""

        __name__ = "watching"
        init = staticmethod(avb.init)

        @staticmethod
        def train_step(key, state, batch, *, model, optimizers):
            del key, model, optimizers
            numbers = jnp.round(100 * batch[:, 0, 0])
            return state._replace(step=state.step + 1), Info(elbo=numbers, reconstruction=numbers**2)

    images = data.from_arrays(np.broadcast_to(np.arange(20)[:, None, None] / 100, (20, 6, 6)))
    for steps in (3, 7):  # the second one continues
        fit(
            Watching(), small_model("avb"), OPTIMIZERS, images, steps=steps, batch_size=8, seed=3, num_seeds=2, log_every=1,
            checkpoint_every=1, mode="jit", quiet=True, workdir=tmp_path, check_images=0,
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for seed in range(2):
        batches = np.float64(batch_indices(20, 8, 3 + seed, 0, 7))
        for quantity, power in (("elbo", 1), ("reconstruction", 2)):
            found = [line["per_seed"][quantity][seed] for line in lines]
            np.testing.assert_allclose(found, np.mean(batches**power, axis=1), rtol=1e-5)


def test_block_length_does_not_change_a_run(dataset):
    one, two = (train(dataset, 6, log_every=length) for length in (2, 5))
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(two.params), rtol=1e-4, atol=1e-6)


def test_a_run_moves_between_kinds_of_parallelism(dataset, tmp_path):
    """A checkpoint of one device continues sharded and under pmap."""
    train(dataset, 4, tmp_path)
    train(dataset, 8, tmp_path, mode="sharded")
    state = train(dataset, 12, tmp_path, mode="pmap")
    assert int(state.step[0]) == 12
    chex.assert_tree_all_finite(jax.device_get(state))


def test_only_the_latest_checkpoints_are_kept(dataset, tmp_path):
    train(dataset, 12, tmp_path)
    with checkpoints.open_folder(tmp_path / "checkpoints" / "avb") as store:
        assert sorted(checkpoint.step for checkpoint in store.checkpoints) == [8, 12]


def test_another_model_does_not_fit_a_checkpoint(dataset, tmp_path):
    train(dataset, 4, tmp_path)
    with pytest.raises(UserError, match="the state of step 4 does not fit the model"):
        train(dataset, 8, tmp_path, model=small_model("avb"))


def test_on_checkpoint_is_called_at_checkpoints_and_at_the_end(dataset):
    seen = []
    train(dataset, 10, on_checkpoint=lambda step, state: seen.append((step, int(state.step[0]))))
    assert seen == [(4, 4), (8, 8), (10, 10)]


@pytest.mark.parametrize("mode", ["jit", "pmap", "sharded"])
def test_states_stay_their_owner_s(dataset, mode):
    """What `fit` was given, and what `on_checkpoint` was given and kept, outlive the steps after."""
    model, kept = small_model("avb", ema_decay=0.9), {}
    start = initial_state(avb, model, OPTIMIZERS, dataset, 0, 1)
    before = jax.tree.map(np.array, start)
    last = train(dataset, 12, model=model, mode=mode, state=start, on_checkpoint=kept.__setitem__)
    chex.assert_trees_all_equal(jax.device_get(start), before)
    assert {step: int(state.step[0]) for step, state in kept.items()} == {4: 4, 8: 8, 12: 12}
    chex.assert_trees_all_equal(jax.device_get(kept[12]), jax.device_get(last))
    again = train(dataset, 4, model=model, mode=mode, state=before)
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(kept[4]))


def test_a_state_of_numpy_arrays_is_resumed(dataset, tmp_path):
    model = small_model("avb")
    start = jax.tree.map(np.asarray, initial_state(avb, model, OPTIMIZERS, dataset, 1, 1))
    train(dataset, 4, tmp_path, model=model, state=start)
    parts = train(dataset, 8, tmp_path, model=model, state=start)
    chex.assert_trees_all_equal(jax.device_get(parts), jax.device_get(train(dataset, 8, model=model, state=start)))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(dataset, tmp_path):
    train(dataset, 4, tmp_path)
    explosive = Players(*[optax.adam(1e27)] * 3)
    with pytest.raises(UserError, match=r"avb: \w+ is not finite by step \d+ .*lower the learning rates"):
        fit(
            avb, small_model("avb", batch_norm=True), explosive, dataset, steps=20, batch_size=8, log_every=4,
            checkpoint_every=4, mode="jit", quiet=True, workdir=tmp_path,
        )  # fmt: skip
    with checkpoints.open_folder(tmp_path / "checkpoints" / "avb") as store:
        assert store.latest.step == 4


def test_training_helps(dataset):
    """The VAE's loss on a learnable set falls, under the loop as a user calls it."""
    eye = data.from_arrays(np.eye(36).reshape(36, 6, 6)[:4])
    model, steep = small_model("vae"), Players(*[optax.adam(1e-2)] * 3)
    key = jax.random.key(0)

    def elbo(state):
        one = jax.tree.map(lambda a: a[0], state)
        return float(METHODS["vae"].elbo_terms(key, one, eye.train, model=model).elbo.mean())

    short, longer = (
        fit(METHODS["vae"], model, steep, eye, steps=steps, batch_size=8, mode="jit", quiet=True) for steps in (1, 300)
    )
    assert elbo(longer) > elbo(short) + 10


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_seeds": 0}, {"log_every": 0}, {"checkpoint_every": 0}])
def test_counts_are_checked(dataset, options):
    with pytest.raises(UserError, match=f"{next(iter(options))}=0: must be at least 1"):
        train(dataset, 4, **options)


def test_progress_is_plain_lines_where_there_is_no_terminal(dataset, capfd):
    train(dataset, 8, quiet=False)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("ELBO")[0].strip() for line in lines] == ["avb compiling", "avb step 4/8", "avb step 8/8"]
    assert all(word in lines[2] for word in ("KL", "rec", "T loss", "examples/s"))


class Optimistic:
    """AVB with an ELBO that is `by` nats too good."""

    __name__ = "optimistic"

    def __init__(self, by):
        self.by, self.init, self.train_step = by, avb.init, avb.train_step

    def elbo_terms(self, *arguments, **options):
        terms = avb.elbo_terms(*arguments, **options)
        return terms._replace(kl=terms.kl - self.by)


@pytest.mark.parametrize("by", [-100.0, 100.0])
def test_an_elbo_above_the_bound_is_told(tmp_path, capsys, by):
    """At each checkpoint but the last, beside importance sampling."""
    dataset = data.from_arrays(*np.random.default_rng(0).random((2, 20, 6, 6)), binarize="dynamic")
    model = small_model("avb")
    fit(
        Optimistic(by), model, OPTIMIZERS, dataset, steps=12, batch_size=8, log_every=4, checkpoint_every=4, mode="jit",
        workdir=tmp_path, check_images=8,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line for line in lines if "held_out_elbo" in line}
    assert set(held_out) == {4, 8}
    for line in held_out.values():
        np.testing.assert_allclose(line["held_out_elbo"] - line["held_out_log_likelihood"], line["held_out_excess"], rtol=1e-4)
    told = capsys.readouterr().err
    assert "held out: ELBO under T" in told
    assert ("warning: the ELBO under T stands" in told) == (by > 0)


def test_held_out_checks_are_on_held_out_images(tmp_path):
    """The same training on black images, with white or black ones held out; its decoder starts near white."""
    found, black = [], np.zeros((20, 6, 6))
    for test_images in (black + 1.0, black.copy()):
        dataset, folder, model = data.from_arrays(black, test_images), tmp_path / str(len(found)), small_model("avb")
        start = initial_state(avb, model, OPTIMIZERS, dataset, 0, 1)
        decoder = jax.tree.map(lambda a: a + 1.0, start.params.decoder)
        start = start._replace(params=start.params._replace(decoder=decoder))
        train(dataset, 8, folder, model=model, state=start, check_images=8)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found += [line["held_out_log_likelihood"] for line in lines if "held_out_elbo" in line]
    on_white, on_black = found
    assert on_white > on_black + 10


def test_no_held_out_check_where_it_has_nothing_to_say(dataset, tmp_path):
    both = data.from_arrays(*np.random.default_rng(0).random((2, 20, 6, 6)))
    train(both, 8, tmp_path / "none", check_images=0)
    fit(vae, small_model("vae"), OPTIMIZERS, both, steps=8, batch_size=8, log_every=4, checkpoint_every=4, quiet=True,
        workdir=tmp_path / "vae", mode="jit")  # fmt: skip
    train(dataset, 8, tmp_path / "untested")
    for run in ("none", "vae", "untested"):
        assert "held_out" not in (tmp_path / run / "metrics.jsonl").read_text()
