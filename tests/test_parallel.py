"""The multi-device gradient against one device's full batch, with SGD (Adam would hide a factor)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from avb_jax import Draws, Info, Players, State, UserError, objectives, parallel, players
from avb_jax.data import from_arrays
from avb_jax.loop import fit, initial_state
from avb_jax.methods import METHODS, avb
from tests.conftest import Normalised, small_model

BATCH = 8
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}


@pytest.fixture
def dataset():
    """Thirty-two 6x6 images; binarisation off, so that noise is all that is drawn."""
    return from_arrays(np.random.default_rng(0).random((32, 6, 6), np.float32))


def one_block(dataset, model, optimizers, mode, devices, method=avb, steps=1, num_seeds=1):
    """The State after a block of steps of seed 0, and before it."""
    state = initial_state(method, model, optimizers, dataset, 0, num_seeds)
    before = jax.tree.map(np.asarray, state)
    blocks = parallel.compile_blocks(
        method.train_step, model, optimizers, dataset, mode=mode, batch_size=BATCH, num_seeds=num_seeds,
        devices=jax.devices()[:devices],
    )  # fmt: skip
    indices = np.arange(num_seeds * steps * BATCH, dtype=np.int32).reshape(num_seeds, steps, BATCH) % len(dataset.train)
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(5), s))(jnp.arange(num_seeds))
    after, info = blocks.run(keys, blocks.place(state), blocks.fetch(indices))
    return before, jax.tree.map(np.asarray, blocks.gather(after)), info


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), a, b)


@pytest.mark.parametrize(
    ("method", "kind", "count", "contrast"),
    [
        pytest.param("avb", "conv", 4, "none", marks=pytest.mark.slow), ("avb", "batch_norm", 4, "adaptive"),
        *((method, "", 2, "none") for method in METHODS),
    ],
)
def test_sharded_is_one_device(dataset, sgd, count, method, kind, contrast):
    """A whole step, batch statistics and randomness included."""
    options = {kind: True} if kind else {}
    model = small_model(method, ema_decay=0.9, contrast=contrast, noise_draws=2, **options)
    _, one, info = one_block(dataset, model, sgd, "jit", 1, METHODS[method])
    _, many, info_many = one_block(dataset, model, sgd, "sharded", count, METHODS[method])
    assert_close(one, many)
    assert_close(info, info_many)


@pytest.mark.parametrize("method", METHODS)
def test_pmap_averages_the_devices_steps(dataset, sgd, method):
    """By plain gradient descent, a step under pmap is the mean of what each device's share alone would have made."""
    count, model, functions = 4, small_model(method), METHODS[method]
    before, after, info = one_block(dataset, model, sgd, "pmap", count, functions)
    state = jax.tree.map(lambda a: a[0], before)
    _, step_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 0))
    shares = jnp.asarray(dataset.train[:BATCH].reshape(count, BATCH // count, 6, 6))
    alone = [
        functions.train_step(jax.random.fold_in(step_key, d), state, shares[d], model=model, optimizers=sgd)
        for d in range(count)
    ]
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *[part.params for part, _ in alone])
    assert_close(jax.tree.map(lambda a: a[0], after.params), mean)
    for field, value in info._asdict().items():
        if value is not None:
            np.testing.assert_allclose(value[0], np.mean([np.mean(getattr(i, field)) for _, i in alone]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("batch_norm", "contrast"), [(False, "none"), (True, "none"), (True, "adaptive")])
def test_pmap_takes_the_full_batch_gradient(dataset, sgd, batch_norm, contrast):
    """Each device draws noise of its own: the full batch is made of the devices' draws put together."""
    count, model = 4, small_model("avb", batch_norm=batch_norm, contrast=contrast, noise_draws=2)
    before, after, info = one_block(dataset, model, sgd, "pmap", count)
    before, after = (jax.tree.map(lambda a: a[0], tree) for tree in (before, after))

    _, step_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 0))
    shares = dataset.train[:BATCH].reshape(count, BATCH // count, 6, 6)
    draws = [players.draw(jax.random.fold_in(step_key, d), model, jnp.asarray(shares[d])) for d in range(count)]
    draws = Draws(*(jnp.concatenate(parts, axis) for axis, parts in zip((0, 1, 1), zip(*draws, strict=True), strict=True)))
    params, stats = before.params, before.batch_stats
    gradients, (terms, z, new_stats) = jax.grad(objectives.negative_elbo_adversarial, has_aux=True)(
        params._replace(adversary=None), params.adversary, stats, draws, model=model
    )
    gradient, (_, adversary_stats) = jax.grad(objectives.adversary_loss, has_aux=True)(
        params.adversary, stats, draws, z, model=model
    )
    expected = jax.tree.map(lambda p, g: p - g, params, gradients._replace(adversary=gradient))
    assert_close(after.params, expected)
    assert_close(after.batch_stats, new_stats._replace(adversary=adversary_stats))
    np.testing.assert_allclose(info.elbo[0], terms.elbo.mean(), rtol=1e-4)


def test_pmap_checkpoints_are_anyone_s(dataset, sgd):
    """The state that pmap gathers has the structure and shapes of one device's."""
    model, adam = small_model("avb", batch_norm=True), Players(*[optax.adam(1e-3)] * 3)
    del sgd
    _, one, _ = one_block(dataset, model, adam, "jit", 1)
    _, many, _ = one_block(dataset, model, adam, "pmap", 4)
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, many)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_seeds_train_side_by_side_as_they_would_alone(dataset, sgd, mode):
    model = small_model("avb")
    _, together, _ = one_block(dataset, model, sgd, mode, 4, num_seeds=2)
    _, alone, _ = one_block(dataset, model, sgd, mode, 4, num_seeds=1)
    assert_close(jax.tree.map(lambda a: a[:1], together), alone)
    leaf = jax.tree.leaves(together.params)[-1]
    assert not np.allclose(leaf[0], leaf[1])


def test_whole_runs_agree_on_any_device_count(dataset):
    """The same training run on 1, 2 and 4 devices."""
    optimizers, model = Players(*[optax.sgd(0.05)] * 3), small_model("avb", batch_norm=True)
    runs = [
        fit(
            avb, model, optimizers, dataset._replace(binarize="dynamic"), steps=10, batch_size=BATCH,
            log_every=5, mode="sharded", devices=jax.devices()[:count], quiet=True,
        )
        for count in (1, 2, 4)
    ]  # fmt: skip
    for run in runs[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), runs[0], run)


def test_resolve():
    devices = jax.devices()
    assert len(devices) == 4
    assert parallel.resolve("auto", 8, devices) == ("sharded", devices)
    assert parallel.resolve("auto", 8, devices[:1]) == ("jit", devices[:1])
    assert parallel.resolve("jit", 7, devices) == ("jit", devices[:1])
    for mode in ("auto", "pmap", "sharded"):
        with pytest.raises(UserError, match="batch_size=6: not divisible by the 4 devices"):
            parallel.resolve(mode, 6, devices)
    with pytest.raises(UserError, match="parallel='magic'"):
        parallel.resolve("magic", 8, devices)


@pytest.mark.parametrize("mode", ["jit", "pmap", "sharded"])
def test_a_memory_mapped_set_trains_as_one_in_memory(dataset, sgd, mode, tmp_path):
    """The same steps, whether batches are read from the file or from the device; two seeds, mirrored images."""
    mapped = np.memmap(tmp_path / "images", np.float32, "w+", shape=dataset.train.shape)
    mapped[:] = dataset.train
    states = []
    for train in (dataset.train, mapped):
        flipped = dataset._replace(train=train, flip=True)
        _, after, _ = one_block(flipped, small_model("avb"), sgd, mode, 2, steps=2, num_seeds=2)
        states.append(after)
    jax.tree.map(np.testing.assert_array_equal, *states)


def seen_by_steps(dataset, mode, devices, steps=4):
    """The images [seeds, steps, B, ...] that a block of steps trains on, and [devices, seeds, steps, share, ...] under pmap."""
    share = BATCH // (devices if mode == "pmap" else 1)

    def train_step(key, state, batch, *, model, optimizers):
        del key, model, optimizers
        params = state.params._replace(encoder=state.params.encoder.at[state.step].set(batch))
        return state._replace(step=state.step + 1, params=params), Info(beta=jnp.zeros(()))

    nothing = Players(jnp.zeros((2, steps, share, *dataset.x_shape)))
    state = State(jnp.zeros(2, jnp.int32), nothing, Players(), Players({}, {}, {}), None)
    blocks = parallel.compile_blocks(
        train_step, None, Players(), dataset, mode=mode, batch_size=BATCH, num_seeds=2, devices=jax.devices()[:devices]
    )
    indices = np.tile(np.arange(BATCH, dtype=np.int32), (2, steps, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    return np.asarray(blocks.run(keys, blocks.place(state), blocks.fetch(indices))[0].params.encoder)


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


def test_batch_statistics_of_a_module_without_an_axis_are_averaged(dataset, sgd):
    """A user's own normalisation sees its device's share alone; its running statistics are the devices' mean, everywhere."""

    class Unaware(nn.Module):
        @nn.compact
        def __call__(self, x, noise, train=False):
            self.variable("counts", "batches", lambda: jnp.zeros((), jnp.int32)).value += train
            h = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x.reshape(len(x), -1))
            return nn.Dense(3)(jnp.concatenate([h, noise], -1))

    model = small_model("avb", ema_decay=0.9)
    model = dataclasses.replace(model, networks=model.networks._replace(encoder=Unaware()))
    state = initial_state(avb, model, sgd, dataset, 0, 1)
    blocks = parallel.compile_blocks(
        avb.train_step, model, sgd, dataset, mode="pmap", batch_size=BATCH, devices=jax.devices()[:2]
    )
    indices = np.arange(BATCH, dtype=np.int32).reshape(1, 1, BATCH)
    after, _ = blocks.run(jax.random.split(jax.random.key(0), 1), blocks.place(state), blocks.fetch(indices))
    shares = dataset.train[:BATCH].reshape(2, BATCH // 2, 36)
    mean, variance = 0.5 * shares.mean(axis=1).mean(axis=0), 0.5 + 0.5 * shares.var(axis=1).mean(axis=0)
    for device in range(2):
        found = jax.tree.map(lambda a, d=device: a[d, 0], after.batch_stats.encoder)
        np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4)
        np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["var"], variance, rtol=1e-4)
        assert int(found["counts"]["batches"]) == 1
        averaged = jax.tree.map(lambda a, d=device: a[d, 0], after.average.batch_stats.encoder)
        np.testing.assert_allclose(averaged["batch_stats"]["BatchNorm_0"]["mean"], 0.9 * mean, rtol=1e-4)
        assert int(averaged["counts"]["batches"]) == 1


class Holder(nn.Module):
    """A module that holds others in every way that one may."""

    in_tuple: tuple
    in_dict: dict
    alone: nn.Module
    function: object = nn.relu
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        return x


def test_modules_learn_the_axis_wherever_they_are_held():
    norm = Normalised()
    inner = Holder([norm, (norm,)], {"a": norm}, norm)
    model = small_model("avb")
    model = dataclasses.replace(model, networks=Players(Holder((norm, None), {"deep": inner}, norm), norm, None))
    encoder, decoder, adversary = parallel._with_axis(model).networks
    assert adversary is None
    found = [encoder, encoder.in_tuple[0], encoder.alone, decoder, encoder.in_dict["deep"]]
    deep = encoder.in_dict["deep"]
    found += [deep.in_tuple[0], deep.in_tuple[1][0], deep.in_dict["a"], deep.alone]
    assert [module.axis_name for module in found] == [parallel.AXIS] * 9
    assert encoder.function is nn.relu
    assert encoder.in_tuple[1] is None
    assert norm.axis_name is None
