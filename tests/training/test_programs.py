"""Programs that are kept: nothing is traced twice, and nothing stale is ever taken."""

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest

from avb_jax.data import from_arrays
from avb_jax.networks import conv, onednn
from avb_jax.training import memory, programs
from avb_jax.training.loop import train
from avb_jax.training.programs import Programs
from avb_jax.types import Players
from tests.conftest import small_method

X = np.linspace(0, 1, 40 * 36, dtype=np.float32).reshape(40, 6, 6)
ONE = jax.devices()[:1]
PLAYERS = Players(jnp.ones(3), {"w": jnp.zeros(())}, None)


def traced(folder, arg=PLAYERS, *, made_of="", name="sum", devices=ONE, also=()):
    """How often a function is traced for two calls, by a kept one that is made anew as a next start makes it."""
    times = []

    def function(players: Players) -> tuple[Players, jax.Array]:
        times.append(1)
        return players, players.encoder.sum() + 4

    kept = Programs(folder, made_of).keep(name, function, devices, *also)
    for _ in range(2):
        players, total = kept(arg)
        assert total == players.encoder.size + 4
        chex.assert_trees_all_equal(players, arg)  # a named tuple, with what is None in it
    return len(times)


def test_a_kept_program_is_not_traced_again(tmp_path):
    assert [traced(tmp_path / "new" / "folder") for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        {"made_of": "another config"},
        {"name": "another function"},
        {"also": (2,)},
        {"arg": PLAYERS._replace(encoder=jnp.ones(4))},
        {"arg": PLAYERS._replace(encoder=jnp.ones(3, jnp.int32))},
        {"arg": PLAYERS._replace(adversary=jnp.ones(1))},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_follows_from_anything_else_is_traced(tmp_path, other):
    assert [traced(tmp_path), traced(tmp_path, **other), traced(tmp_path, **other), traced(tmp_path)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "of", ["source", *programs._LIBRARIES, "FLAX_ANY", "XLA_FLAGS", "settings", "numpyro's", "oneDNN", "count"]
)
def test_other_surroundings_are_another_program(tmp_path, monkeypatch, of):
    traced(tmp_path)
    version, highest = programs.importlib.metadata.version, "highest" if of == "settings" else None
    if of in programs._LIBRARIES:
        changed = lambda library: "0" if library == of else version(library)  # noqa: E731
        monkeypatch.setattr(programs.importlib.metadata, "version", changed)
    elif of.isupper():
        monkeypatch.setenv(of, "--another")
    elif of == "source":
        monkeypatch.setattr(programs, "_SOURCE", "edited")
    elif of == "oneDNN":
        monkeypatch.setattr(onednn, "dtypes", lambda: ("another",))
    elif of == "count":
        monkeypatch.setattr(jax, "device_count", lambda: 7)
    with jax.default_matmul_precision(highest), numpyro.validation_enabled(of != "numpyro's"):
        assert traced(tmp_path) == 1
    monkeypatch.undo()
    assert traced(tmp_path) == 0


def test_the_source_is_every_file_of_the_library(tmp_path):
    assert programs._digest(pathlib.Path(programs.__file__).parents[1]) == programs._SOURCE
    (tmp_path / "deep").mkdir()
    (tmp_path / "notes.txt").write_text("no source")
    found = {programs._digest(tmp_path)}
    for name, text in (("a.py", "1"), ("deep/b.cc", "2"), ("deep/b.cc", "3"), ("deep/a.py", "1")):
        (tmp_path / name).write_text(text)
        found.add(programs._digest(tmp_path))
    (tmp_path / "notes.txt").write_text("still none")
    assert len({*found, programs._digest(tmp_path)}) == 5


def test_a_damaged_file_is_replaced_and_a_full_disk_is_no_error(tmp_path):
    traced(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    kept = Programs(tmp_path).keep("sum", lambda players: (players, players.encoder.sum() + 4), ONE)
    assert kept.needed(PLAYERS) == 4 * (3 + 1)
    assert [traced(tmp_path), traced(tmp_path)] == [1, 0]
    (tmp_path / "file").touch()
    assert traced(tmp_path / "file" / "folder") == 1


@pytest.mark.parametrize("last", [0, 1])
def test_the_one_used_last_is_loaded_before_it_is_asked_for(tmp_path, monkeypatch, last):
    """Which is seen where the files go before the call."""
    args, files, times = [PLAYERS._replace(encoder=jnp.ones(size)) for size in (3, 4)], [], []
    for arg in args:
        traced(tmp_path, arg)
        files += [path for path in tmp_path.iterdir() if path not in files]
    os.utime(files[1 - last], (0, 0))
    monkeypatch.setattr(programs, "_THREADS", ThreadPoolExecutor())
    kept = Programs(tmp_path).keep("sum", lambda players: times.append(1) or (players, players.encoder.sum() + 4), ONE)
    programs._THREADS.shutdown()
    for path in files:
        path.unlink()
    for of, traces in ((last, 0), (1 - last, 1)):
        assert kept(args[of])[1] == args[of].encoder.size + 4
        assert len(times) == traces


def test_what_cannot_be_kept_runs_all_the_same(tmp_path):
    """A call back into Python is no program."""
    kept = Programs(tmp_path).keep("f", lambda x: jax.pure_callback(np.cos, x, x), ONE)
    assert [float(kept(jnp.zeros(()))), float(kept(jnp.zeros(())))] == [1.0, 1.0]
    assert not list(tmp_path.iterdir())


def test_those_unused_for_longest_go_and_other_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    (tmp_path / "thesis.tex").touch()
    os.utime(tmp_path / "thesis.tex", (0, 0))
    clock = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr(pathlib.Path, "touch", lambda path: os.utime(path, times=(t := next(clock), t)))
    for made_of in ("1", "1", "2", "2", "1", "3"):  # the second time is a use
        traced(tmp_path, made_of=made_of)
    assert [traced(tmp_path, made_of=made_of) for made_of in ("1", "3", "2")] == [0, 0, 1]
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("setting", ["jax_disable_jit", "jax_debug_nans", "no jax_enable_compilation_cache", ""])
def test_nothing_is_kept_where_it_would_be_in_the_way(tmp_path, setting):
    """Or without a folder, or of several devices, as which a State may come from somewhere else."""
    if setting:
        name, before = setting.removeprefix("no "), getattr(jax.config, setting.removeprefix("no "))
        jax.config.update(name, not before)
        try:
            traced(tmp_path)
        finally:
            jax.config.update(name, before)
    else:
        assert [traced(None), traced(tmp_path, devices=jax.devices())] == [1, 1]
        spread = jax.sharding.NamedSharding(jax.make_mesh((4,), ("all",)), jax.sharding.PartitionSpec())
        assert traced(tmp_path, jax.device_put(PLAYERS, spread)) == 1
    assert not list(tmp_path.iterdir())


def test_arrays_on_another_device_are_computed_with_there(tmp_path):
    """By a program that is not kept; those that are bound to no device come along."""
    one, other = jax.devices()[:2]
    kept = Programs(tmp_path).keep("f", lambda x: x + 1, [one])
    for x, where in ((jnp.ones(3), one), (jax.device_put(jnp.ones(3), other), other), (np.ones(3, np.float32), one)):
        assert kept(x).devices() == {where}
        assert kept.needed(x) == 12
    assert len(list(tmp_path.iterdir())) == 1
    on_other = Programs(tmp_path).keep("g", lambda x: x + 1, [other], out_shardings=jax.sharding.SingleDeviceSharding(other))
    assert on_other(jnp.ones(3)).devices() == {other}
    assert len(list(tmp_path.iterdir())) == 2


def test_one_that_needs_the_configuration_of_its_caller_is_found(tmp_path):
    """A thread does not see what a context manager has set."""
    with jax.enable_x64(True):
        assert [traced(tmp_path, PLAYERS._replace(encoder=jnp.ones(3, jnp.float64))) for _ in range(2)] == [1, 0]


def test_a_call_of_onednn_is_kept(tmp_path):
    if not onednn.available():
        pytest.skip("oneDNN is not installed: pip install 'avb_jax[onednn]'")
    x, kernel, times = jnp.ones((2, 7, 7, 3)), jnp.ones((3, 3, 3, 4)), []
    for _ in range(2):
        kept = Programs(tmp_path).keep("c", lambda x: times.append(1) or conv.conv(x, kernel, formulation="onednn"), ONE)
        np.testing.assert_allclose(kept(x), conv.conv(x, kernel, formulation="lax"), rtol=1e-5)
    assert len(times) == 1


def test_the_memory_that_it_needs_is_kept_with_it(tmp_path):
    """Without a trace; and of one that was kept without that number, by tracing."""
    x, found, times = jnp.ones((8, 8)), [], []
    for ask, name in ((True, "f"), (True, "f"), (False, "g"), (True, "g")):
        kept = Programs(tmp_path).keep(name, lambda x: times.append(1) or jnp.tanh(x @ x) @ x, ONE)
        if ask:
            found.append(kept.needed(jax.ShapeDtypeStruct(x.shape, x.dtype)))
        kept(x)
    assert found == [memory.needed(jax.make_jaxpr(lambda x: jnp.tanh(x @ x) @ x)(x).jaxpr)] * 3
    assert len(times) == 1 + 0 + 1 + 1


def test_training_by_kept_programs_is_the_same_training(tmp_path):
    """Bit for bit; then without its own `init`, `train_step` and `decode`, which nothing calls; and on other data."""

    def refuse(*_):
        raise AssertionError("traced")

    method = small_method("avb", ema_decay=0.9, optimizers=optax.adam(1e-2))
    settings = {"steps": 5, "batch_size": 8, "log_every": 2, "parallel": "jit", "num_seeds": 2}
    for data in (from_arrays(X), from_arrays(X, binarize="threshold")):
        expected = train(method, data, **settings)
        for of in (method, method._replace(init=refuse, train_step=refuse, decode=refuse)):
            chex.assert_trees_all_equal(train(of, data, **settings, programs=Programs(tmp_path, "avb")), expected)
