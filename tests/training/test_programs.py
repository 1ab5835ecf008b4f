"""Programs that are kept: nothing is traced twice, and nothing stale is ever taken."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax.data import from_arrays
from avb_jax.training import programs
from avb_jax.training.loop import train
from avb_jax.training.programs import Programs
from avb_jax.types import Players
from tests.conftest import small_method

X = np.linspace(0, 1, 40 * 36, dtype=np.float32).reshape(40, 6, 6)
SEVEN = Players(jnp.ones(3), {"w": jnp.zeros(())}, None)


def traced(folder, made_of="", arg=SEVEN, name="sum", devices=None, **options):
    """What a kept function makes of an argument, and how often it was traced for that."""
    times = []

    def function(players: Players) -> tuple[Players, jax.Array]:
        times.append(1)
        return players, players.encoder.sum() + 4

    kept = Programs(folder, made_of).keep(name, function, devices or jax.devices()[:1], **options)
    found, result = kept.found(arg), kept(arg)
    assert found == (not times)
    assert kept.found(arg) == (folder is not None and len(devices or ()) < 2)
    chex.assert_trees_all_equal(kept(arg), result)
    return result, len(times)


def test_a_kept_program_is_not_traced_again(tmp_path):
    (first, seven), times = traced(tmp_path / "new" / "folder")
    (again, same), later = traced(tmp_path / "new" / "folder")
    assert (times, later) == (1, 0)
    assert seven == same == 7
    chex.assert_trees_all_equal(first, again, SEVEN)  # a named tuple, with what is None in it


@pytest.mark.parametrize(
    "other",
    [
        {"made_of": "another config"},
        {"name": "another function"},
        {"arg": SEVEN._replace(encoder=jnp.ones(4))},
        {"arg": SEVEN._replace(encoder=jnp.ones(3, jnp.int32))},
        {"arg": SEVEN._replace(adversary=jnp.ones(1))},
    ],
)
def test_what_is_made_of_anything_else_is_traced(tmp_path, other):
    traced(tmp_path)
    assert traced(tmp_path, **other)[1] == 1
    assert traced(tmp_path)[1] == 0


@pytest.mark.parametrize("of", ["source", "version", "flags", "settings"])
def test_another_ground_is_another_program(tmp_path, monkeypatch, of):
    traced(tmp_path)
    if of == "source":
        monkeypatch.setattr(programs, "_source", lambda: "edited")
    elif of == "version":
        monkeypatch.setattr(programs.importlib.metadata, "version", lambda library: "0" if library == "jaxlib" else "1")
    elif of == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--another")
    with jax.default_matmul_precision("highest" if of == "settings" else None):
        assert traced(tmp_path)[1] == 1


def test_the_source_is_every_file_of_the_library():
    """By hand: what the digest is of, a change of one letter, and one of a name."""
    whole = programs._digest({"a.py": b"1", "b.cc": b"23"})
    assert whole == programs._digest({"b.cc": b"23", "a.py": b"1"})
    assert (
        len({whole, *map(programs._digest, ({"a.py": b"1", "b.cc": b"24"}, {"c.py": b"1", "b.cc": b"23"}, {"a.py": b"1"}))})
        == 4
    )


def test_a_damaged_file_is_replaced_and_a_full_disk_is_no_error(tmp_path, monkeypatch):
    traced(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert traced(tmp_path)[1] == 1
    assert traced(tmp_path)[1] == 0
    blocked = tmp_path / "file"
    blocked.touch()
    assert traced(blocked / "folder")[0][1] == 7


def test_what_cannot_be_kept_runs_all_the_same(tmp_path):
    """A call back into Python is no program; an error is the function's own."""
    kept = Programs(tmp_path).keep("f", lambda x: jax.pure_callback(np.cos, x, x), jax.devices()[:1])
    assert [float(kept(jnp.zeros(()))), float(kept(jnp.zeros(())))] == [1.0, 1.0]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        Programs(tmp_path).keep("g", lambda x: x * (1 // 0), jax.devices()[:1])(1.0)


def test_those_unused_for_longest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    clock = iter(range(10**9, 10**9 + 100))
    monkeypatch.setattr(programs.pathlib.Path, "touch", lambda path: programs.os.utime(path, times=(t := next(clock), t)))
    for made_of in ("1", "2"):
        traced(tmp_path, made_of)
        traced(tmp_path, made_of)  # which is a use of it
    traced(tmp_path, "1")
    traced(tmp_path, "3")
    assert [traced(tmp_path, made_of)[1] for made_of in ("1", "3")] == [0, 0]
    assert traced(tmp_path, "2")[1] == 1


def test_nothing_is_kept_without_a_folder_or_on_several_devices(tmp_path):
    assert traced(None)[1] == traced(None)[1] == 1
    assert traced(tmp_path, devices=jax.devices())[1] == 1
    assert not list(tmp_path.iterdir())


def test_training_by_kept_programs_is_the_same_training(tmp_path):
    """Bit for bit; and then without its own `init`, `train_step` and `decode`, which nothing calls."""

    def refuse(*_):
        raise AssertionError("traced")

    method = small_method("avb", ema_decay=0.9, optimizers=optax.adam(1e-2))
    data, settings = from_arrays(X), {"steps": 5, "batch_size": 8, "log_every": 2, "parallel": "jit", "num_seeds": 2}
    expected = train(method, data, **settings)
    for of in (method, method._replace(init=refuse, train_step=refuse, decode=refuse)):
        chex.assert_trees_all_equal(train(of, data, **settings, programs=Programs(tmp_path, "avb")), expected)
