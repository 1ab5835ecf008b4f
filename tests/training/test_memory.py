"""What a step needs of memory, by hand, and what is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import UserError
from avb_jax.training import checks, loop, memory
from tests.conftest import small_method

MATRIX = jnp.ones((8, 8))  # 256 bytes


def needed(function, *given):
    return memory.needed(jax.make_jaxpr(function)(*given).jaxpr)


def test_arguments_and_products_that_are_alive_together():
    """Arguments all the time; a product until it is read; sums and activations not at all."""
    assert needed(lambda a, b: a + b, MATRIX, MATRIX) == 2 * 256
    assert needed(lambda a: jnp.tanh(a @ a) @ a, MATRIX) == 256 + 256  # one after the other
    assert needed(lambda a: ((a @ a) @ a) @ a, MATRIX) == 256 + 2 * 256  # the first is gone when the third comes

    def both(a):
        first = a @ a
        second, third = first @ a, a @ first
        return second @ third @ first

    assert needed(both, MATRIX) == 256 + 4 * 256  # three, and the product of the second with the third


def test_inner_programs():
    """A scan's body counts once, with what is alive around it; what its steps give, all together."""

    def body(carry, x):
        return (carry @ MATRIX) @ MATRIX, x @ MATRIX

    xs = jnp.ones((5, 8, 8))
    assert needed(lambda a, xs: jax.lax.scan(body, a, xs), MATRIX, xs) >= 256 + 2 * 5 * 256
    # A compiled function within is part of what reads it: no more than the product that it is of.
    assert needed(lambda a: jax.jit(jnp.tanh)(a @ a) @ a, MATRIX) == 2 * 256
    assert needed(lambda a: jax.jit(lambda a: jnp.tanh(a @ a) @ a)(a), MATRIX) == needed(lambda a: jnp.tanh(a @ a) @ a, MATRIX)


def test_each_device_has_arrays_of_its_own():
    one = needed(jax.pmap(lambda a: a @ a, devices=jax.devices()[:1]), MATRIX[None])
    two = needed(jax.pmap(lambda a: a @ a, devices=jax.devices()[:2]), jnp.stack([MATRIX, MATRIX]))
    assert two == 2 * one


def test_what_is_there():
    """This machine's memory or a container's share of it; nothing is known of a device that does not say."""
    there = memory.available(jax.devices())
    assert 2**28 < there < 2**46

    class Device:
        platform, process_index = "gpu", 0

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.available([Device({"bytes_limit": 100}), Device({"bytes_limit": 200})]) == 300
    assert memory.available([Device({"bytes_limit": 100}), Device(None)]) is None


def test_a_container_s_share(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP", limit)
    whole = memory.available(jax.devices())
    for text, expected in (("max\n", whole), ("1048576\n", 2**20)):
        limit.write_text(text)
        assert memory.available(jax.devices()) == expected


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        pytest.param(kind, parallel, marks=[pytest.mark.slow] * ((i + j) % 3 > 0))
        for i, kind in enumerate(("stored", "mapped", "batches"))
        for j, parallel in enumerate(("jit", "pmap", "sharded"))
    ],
)
@pytest.mark.slow
def test_the_estimate_is_of_the_program_that_runs(kind, parallel, tmp_path, monkeypatch):
    """Whatever the data are; and nothing is traced once more for it, but under pmap."""
    x = np.random.default_rng(0).random((32, 6, 6), np.float32)
    if kind == "mapped":
        np.save(tmp_path / "x.npy", x)
        given = np.load(tmp_path / "x.npy", mmap_mode="r")
    else:
        given = iter([x[:8]] * 9) if kind == "batches" else x
    asked = []
    monkeypatch.setattr(checks.memory, "needed", lambda program, of=memory.needed: asked.append(of(program)) or asked[-1])
    size = None if kind == "batches" else 8
    method, traced = small_method("avb"), []
    method = method._replace(train_step=lambda *a, of=method.train_step, **k: traced.append(a) or of(*a, **k))
    loop.train(method, given, steps=4, batch_size=size, log_every=4, parallel=parallel)
    assert len(traced) == 1 or parallel == "pmap"
    assert 10_000 < asked[-1] < 5_000_000  # of the whole; of inner programs before


@pytest.mark.slow
def test_steps_beyond_memory_are_refused(monkeypatch):
    """Before the indices of such a batch are made, which would not fit either."""
    x = np.random.default_rng(0).random((32, 6, 6), np.float32)
    refusal = r"batch_size={}: the steps need [\d,.]+ GiB at least, and there are [\d,.]+; use a smaller batch"
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda devices: 1000)
        with pytest.raises(UserError, match=refusal.format(8)):
            loop.train(small_method("avb"), x, steps=1, batch_size=8, parallel="jit")
        patch.setattr(memory, "available", lambda devices: None)
        loop.train(small_method("vae"), x, steps=1, batch_size=8, parallel="jit")
    with pytest.raises(UserError, match=refusal.format(10**9)):
        loop.train(small_method("avb"), x, steps=4, batch_size=10**9, parallel="jit")
