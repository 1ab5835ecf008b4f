"""States on disk: what is read back is what was written, or the one before it, or an error that says what is the matter."""

import functools
import pathlib
import shutil
import warnings

import chex
import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1 as ocp

from avb_jax import UserError
from avb_jax.training import checkpoints
from avb_jax.types import Players, State


def made(value, width=3):
    """A State whose numbers follow from `value`."""
    value = float(value)
    params = Players({"w": jnp.full((width, 2), value), "b": jnp.arange(2.0) + value}, None, {"t": jnp.full(5, -value)})
    return State(jnp.int32(value), params, Players(jnp.int32(7), None, jnp.ones(5)), Players({}, {}, {}))


LIKE = made(0)


@pytest.fixture
def folder(tmp_path):
    """States of steps 4 and 8."""
    for step in (4, 8):
        checkpoints.save(tmp_path / "avb", step, made(step))
    return tmp_path / "avb"


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_latest_or_one_of_a_step(folder):
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE), made(8))
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE, step=4), made(4))
    assert checkpoints.restore(folder.parent / "none", LIKE) is None
    with pytest.raises(UserError, match="has no state of step 5; it has 4, 8"):
        checkpoints.restore(folder, LIKE, step=5)
    checkpoints.save(folder, 8, made(9))  # one that is there stays
    checkpoints.save(folder, 12, made(12))
    assert checkpoints.steps(folder) == [8, 12]
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE, step=8), made(8))


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    if content:
        content[int(at * (len(content) - 1))] ^= 16
        path.write_bytes(bytes(content))


HARMS = {"deleted": delete, "truncated": truncate, "emptied": empty}
HARMS |= {f"flipped at {at}": functools.partial(flip, at=at) for at in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.slow
def test_a_damaged_state_is_never_taken(folder, harm):
    """Whichever of its files it is: the very same numbers, or a warning and the State before it."""
    copy, noticed = folder.parent / "copy", []
    for name in sorted(path.relative_to(folder) for path in (folder / "8").rglob("*") if path.is_file()):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        harm(copy / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = checkpoints.restore(copy, LIKE)
        expected = made(int(state.step))
        chex.assert_trees_all_equal(state, expected)
        if int(state.step) == 4:
            (said,) = (str(warning.message) for warning in caught if warning.category is RuntimeWarning)
            assert "the state of step 8 is damaged (" in said
            assert "that of step 4 is taken" in said
            noticed.append(name)
    assert noticed


def test_damage_another_model_and_another_version_are_three_messages(folder, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"state of step 8 is of another model .*State.params.encoder\['w'\] is \[3, 2\] float32 there, \[4, 2\]",
    ):
        checkpoints.restore(folder, made(0, width=4))
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    with pytest.raises(
        UserError, match=r"the state of step 8 is of avb_jax \d\S*, whose checkpoints this version does not read"
    ):
        checkpoints.restore(folder, LIKE)
    (folder / "8" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"the state of step 8 is of an avb_jax before 0\.3, whose checkpoints"):
        checkpoints.restore(folder, LIKE)
    (folder / "8" / "_CHECKPOINT_METADATA").unlink()
    for step in (4, 8):
        (folder / str(step) / "about.json").unlink()
    with pytest.raises(UserError, match=r"step 8 is damaged .*; the state of step 4 is damaged .* there is no other"):
        checkpoints.restore(folder, LIKE)


def test_a_full_disk_is_a_line_and_leaves_what_was_there(folder, monkeypatch):
    def full(*arguments):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 4296704 bytes to file 25: No space left on device [os_error_code='28']"
        )

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", full)
        with pytest.raises(
            UserError, match=r"state of step 12 could not be written \(no space is left on the device\); make room"
        ):
            checkpoints.save(folder, 12, made(12))
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE), made(8))


def test_what_was_not_right_in_memory_is_noticed(folder, monkeypatch):
    """Files as they were written, and other numbers out of them."""
    load = ocp.load
    monkeypatch.setattr(ocp, "load", lambda *given: load(*given)._replace(step=jnp.int32(9)))
    with pytest.raises(UserError, match=r"the state of step 8 is damaged \(State\.step is not what was written\)"):
        checkpoints.restore(folder, LIKE)


def test_what_is_removed_while_it_is_read_is_no_state(folder, monkeypatch):
    """By a training that has saved later ones; what is left is taken."""
    load = ocp.load

    def removed(path, like):
        if "/8/" in str(path):
            raise FileNotFoundError(path)
        return load(path, like)

    monkeypatch.setattr(ocp, "load", removed)
    with pytest.warns(
        RuntimeWarning, match=r"step 8 is damaged \(state cannot be read \(FileNotFoundError\)\): that of step 4"
    ):
        chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE), made(4))


def test_reading_writes_nothing_and_training_tidies_up(folder):
    """What looks like another process's save in progress stays as it is for those who read."""
    for name in ("12.unfinished", "2.removed", "notes", "16"):
        (folder / name).mkdir()
    (folder / "12.unfinished" / "part").write_text("half of it")
    delete(folder / "8" / "about.json")
    before = contents(folder)
    with pytest.warns(RuntimeWarning, match=r"step 16 is damaged .*step 8 is damaged \(about.json .*: that of step 4 is taken"):
        checkpoints.restore(folder, LIKE)
    assert contents(folder) == before
    checkpoints.tidy(folder, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["16.damaged", "4", "8.damaged", "notes"]
    checkpoints.save(folder, 8, made(8))
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE), made(8))


def test_a_state_that_the_trainer_removes_while_it_is_read(folder, monkeypatch):
    """Is no damage: there is a later one by then."""
    files = checkpoints._files

    def meanwhile(path):
        monkeypatch.setattr(checkpoints, "_files", files)
        for step in (12, 16):
            checkpoints.save(folder, step, made(step))
        return files(path)

    monkeypatch.setattr(checkpoints, "_files", meanwhile)
    chex.assert_trees_all_equal(checkpoints.restore(folder, LIKE), made(16))


FIXTURE = pathlib.Path(__file__).parent / "checkpoint_format_1"


def test_a_checkpoint_of_format_1_is_still_read():
    """Written by 0.3; a version that no longer reads it raises `FORMAT`, and this test then asks for its refusal."""
    chex.assert_trees_all_equal(checkpoints.restore(FIXTURE, LIKE), made(8))
