"""A compiled block of steps: the same training on any devices, wherever the data are, for any number of seeds."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import Method, Players, State, UserError, contrast
from avb_jax.data import from_arrays
from avb_jax.training import blocks
from avb_jax.training.loop import initial_state, train
from avb_jax.transforms import over_devices
from tests.conftest import METHODS, small_method

BATCH = 8
assert_close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-6)


@pytest.fixture
def dataset():
    """Thirty-two 6x6 images; binarisation off, so that noise is all that is drawn."""
    return from_arrays(np.random.default_rng(0).random((32, 6, 6), np.float32))


def keys_of(num_seeds):
    """Of a block, for one run or for several."""
    key = functools.partial(jax.random.fold_in, jax.random.key(5))
    return key(0) if num_seeds is None else jax.vmap(key)(jnp.arange(num_seeds))


def one_block(dataset, method, mode, devices, steps=1, num_seeds=None):
    """The State after a block of steps of seed 0 on as many devices, and before it, and the Info."""
    state = initial_state(method, dataset, 0, num_seeds)
    before = jax.tree.map(np.asarray, state)
    compiled = blocks.compile_blocks(
        method,
        dataset.prepare,
        dataset.train,
        mode=mode,
        batch_size=BATCH,
        num_seeds=num_seeds,
        devices=jax.devices()[:devices],
    )
    indices = np.arange((num_seeds or 1) * steps * BATCH, dtype=np.int32).reshape(-1, steps, BATCH) % len(dataset.train)
    batches = compiled.fetch(indices[0] if num_seeds is None else indices)
    after, (info, *_) = compiled.run(keys_of(num_seeds), compiled.place(state), batches)
    return before, jax.tree.map(np.asarray, compiled.gather(after)), info


@pytest.mark.parametrize(
    ("name", "kind", "count", "adaptive"),
    [
        pytest.param("avb", "conv", 4, False, marks=pytest.mark.slow),
        ("avb", "batch_norm", 4, True),
        *(pytest.param(name, "", 2, False, marks=[pytest.mark.slow] * (name != "gan")) for name in METHODS),
    ],
)
def test_sharded_is_one_device(dataset, sgd, name, kind, count, adaptive):
    """A whole step, batch statistics and randomness included."""
    options = (
        {"noise_draws": 2, "contrast": contrast.GaussianContrast() if adaptive else contrast.PriorContrast()}
        if name == "avb"
        else {}
    )
    method = small_method(name, ema_decay=0.9, optimizers=sgd, **options, **({kind: True} if kind else {}))
    _, one, info = one_block(dataset, method, "jit", 1)
    _, many, info_many = one_block(dataset, method, "sharded", count)
    assert_close(one, many)
    assert_close(info, info_many)


@pytest.mark.slow
def test_a_block_under_pmap_is_steps_of_over_devices(dataset, sgd):
    """Each device has its share of each batch, in the batch's order, and the step's key."""
    method, count = small_method("avb", batch_norm=True, optimizers=sgd, axis_name=blocks.AXIS), 4
    before, after, info = one_block(dataset, method, "pmap", count, steps=2)
    mapped = jax.pmap(over_devices(method, blocks.AXIS).train_step, blocks.AXIS, in_axes=(None, None, 0))
    state, infos = before, []
    for i in range(2):
        key = jax.random.split(jax.random.fold_in(keys_of(None), i))[1]
        shares = dataset.train[i * BATCH : (i + 1) * BATCH].reshape(count, BATCH // count, 6, 6)
        state, of_step = mapped(key, state, shares)
        state = jax.tree.map(lambda a: a[0], state)
        infos.append(of_step)
    assert_close(after, jax.device_get(state))
    np.testing.assert_allclose(info.elbo, np.mean([i.elbo[0] for i in infos]), rtol=1e-4)


@pytest.mark.slow
def test_pmap_checkpoints_are_anyone_s(dataset):
    """The state that pmap gathers has the structure and shapes of one device's."""
    method = small_method("avb", batch_norm=True, ema_decay=0.9)
    _, one, _ = one_block(dataset, method, "jit", 1)
    _, many, _ = one_block(dataset, method, "pmap", 4)
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, many)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap", "sharded"])
def test_without_seeds_there_is_no_axis_of_them(dataset, mode):
    """And nothing else is different from one seed: bit for bit the same State and Info."""
    method = small_method("avb", batch_norm=True, ema_decay=0.9)
    alone, of_one = (one_block(dataset, method, mode, 2, steps=2, num_seeds=count) for count in (None, 1))
    assert alone[1].step.shape == ()
    for without, of_seed in zip(jax.device_get(alone), jax.device_get(of_one), strict=True):
        chex.assert_trees_all_equal(without, jax.tree.map(lambda a: a[0], of_seed))


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "pmap"])
@pytest.mark.slow
def test_seeds_train_side_by_side_as_they_would_alone(dataset, sgd, mode):
    method = small_method("avb", optimizers=sgd)
    _, together, _ = one_block(dataset, method, mode, 4, num_seeds=2)
    _, alone, _ = one_block(dataset, method, mode, 4, num_seeds=1)
    assert_close(jax.tree.map(lambda a: a[:1], together), alone)
    leaf = jax.tree.leaves(together.params)[-1]
    assert not np.allclose(leaf[0], leaf[1])


@pytest.mark.slow
def test_whole_runs_agree_on_any_device_count(dataset):
    """The same training run on 1, 2 and 4 devices."""
    method = small_method("avb", batch_norm=True, optimizers=optax.sgd(0.05))
    options = {"steps": 10, "batch_size": BATCH, "log_every": 5, "parallel": "sharded"}
    dynamic = dataset._replace(binarize="dynamic")
    runs = [train(method, dynamic, devices=jax.devices()[:count], **options) for count in (1, 2, 4)]
    for run in runs[1:]:
        chex.assert_trees_all_close(jax.device_get(runs[0]), jax.device_get(run), rtol=2e-3, atol=2e-5)


def test_resolve():
    devices = jax.devices()
    assert len(devices) == 4
    assert blocks.resolve("auto", 8, devices) == ("sharded", devices)
    assert blocks.resolve("auto", 8, devices[:1]) == ("jit", devices[:1])
    assert blocks.resolve("jit", 7, devices) == ("jit", devices[:1])
    for mode in ("auto", "pmap", "sharded"):
        with pytest.raises(UserError, match="batch_size=6: not divisible by the 4 devices"):
            blocks.resolve(mode, 6, devices)
    with pytest.raises(UserError, match="parallel='magic'"):
        blocks.resolve("magic", 8, devices)


@pytest.mark.parametrize("mode", ["pmap", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("jit", "sharded"))])
@pytest.mark.slow
def test_a_memory_mapped_set_trains_as_one_in_memory(dataset, sgd, mode, tmp_path):
    """The same steps, whether batches are read from the file or from the device; two seeds, mirrored images."""
    mapped = np.memmap(tmp_path / "images", np.float32, "w+", shape=dataset.train.shape)
    mapped[:] = dataset.train
    method, states = small_method("avb", optimizers=sgd), []
    for examples in (dataset.train, mapped):
        flipped = dataset._replace(train=examples, flip=True)
        states.append(one_block(flipped, method, mode, 2, steps=2, num_seeds=2)[1])
    chex.assert_trees_all_equal(*states)


@pytest.mark.parametrize(
    ("mode", "num_seeds"),
    [
        ("pmap", 2),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("jit", None), ("jit", 2), ("pmap", None), ("sharded", None), ("sharded", 2))
        ),
    ],
)
@pytest.mark.slow
def test_batches_train_as_the_indices_of_their_examples(dataset, sgd, mode, num_seeds):
    """Those of an iterator, which has no stored examples."""
    method = small_method("avb", optimizers=sgd)
    _, expected, _ = one_block(dataset, method, mode, 2, steps=2, num_seeds=num_seeds)
    compiled = blocks.compile_blocks(
        method, lambda key, x: x, None, mode=mode, batch_size=BATCH, num_seeds=num_seeds, devices=jax.devices()[:2]
    )
    batches = dataset.train[np.arange((num_seeds or 1) * 2 * BATCH)].reshape(-1, 2, BATCH, 6, 6)
    batches = compiled.fetch(batches[0] if num_seeds is None else batches)
    state = compiled.place(initial_state(method, dataset, 0, num_seeds))
    after, _ = compiled.run(keys_of(num_seeds), state, batches)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, compiled.gather(after)), expected)


class Seen(NamedTuple):
    """An Info without anything in it to see."""

    nothing: jax.Array


def seen_by_steps(dataset, mode, devices, steps=4):
    """The images [seeds, steps, B, ...] that a block of steps trains on, and [devices, seeds, steps, share, ...] under pmap."""
    share = BATCH // (devices if mode == "pmap" else 1)

    def train_step(key, state, x, reduce=None):
        del key, reduce
        params = state.params._replace(encoder=state.params.encoder.at[state.step].set(x))
        return state._replace(step=state.step + 1, params=params), Seen(jnp.zeros(()))

    nothing = Players(jnp.zeros((2, steps, share, *dataset.x_shape)))
    state = State(jnp.zeros(2, jnp.int32), nothing, Players(), Players({}, {}, {}), None)
    compiled = blocks.compile_blocks(
        Method("seeing", None, train_step, None),
        dataset.prepare,
        dataset.train,
        mode=mode,
        batch_size=BATCH,
        num_seeds=2,
        devices=jax.devices()[:devices],
    )
    indices = np.tile(np.arange(BATCH, dtype=np.int32), (2, steps, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    return np.asarray(compiled.run(keys, compiled.place(state), compiled.fetch(indices))[0].params.encoder)


@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), ("pmap", 2)])
def test_every_step_seed_and_device_binarises_anew(mode, devices):
    """All images are one and the same grey: whatever is alike between two of them was drawn from one key."""
    grey = from_arrays(np.full((BATCH, 6, 6), 0.3, np.float32), binarize="dynamic")
    seen = seen_by_steps(grey, mode, devices).reshape(-1, 36)
    assert set(np.unique(seen)) == {0, 1}
    assert len(np.unique(seen, axis=0)) == len(seen) == 2 * 4 * BATCH
    assert abs(seen.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / seen.size)


@pytest.mark.parametrize(("mode", "devices"), [("jit", 1), ("pmap", 2)])
def test_half_of_the_images_are_mirrored_left_and_right(mode, devices):
    """Each by a coin of its own, the same one for all its pixels, and another in every step, seed and device."""
    image = np.arange(36, dtype=np.float32).reshape(6, 6) / 36
    seen = seen_by_steps(from_arrays(np.stack([image] * BATCH))._replace(flip=True), mode, devices, steps=16)
    mirrored = (seen == image[:, ::-1]).all(axis=(-2, -1))
    assert (mirrored | (seen == image).all(axis=(-2, -1))).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(mirrored.size)
    by_step = mirrored.reshape(-1, mirrored.shape[-1])
    assert len(np.unique(by_step, axis=0)) > 0.5 * min(len(by_step), 2 ** mirrored.shape[-1])
