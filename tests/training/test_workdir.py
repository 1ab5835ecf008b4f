"""The run directory: whose it is, and numbers on disk as JSON has them."""

import json
import threading

import pytest

from avb_jax import UserError
from avb_jax.training import workdir


def test_a_folder_is_claimed_once(tmp_path):
    """By one config; where its data are may change, and what it began with, and what differs is listed."""
    config = {"steps": 3, "data": {"name": "digits", "dir": "here"}, "widths": (4, 5), "clip": None, "start_from": "a"}
    workdir.claim(tmp_path / "run", config)
    workdir.claim(tmp_path / "run", {**config, "data": {"name": "digits", "dir": "there"}, "start_from": "b"})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["dir"] == "there"
    other = {"steps": 4, "data": {"name": "mnist", "dir": "here"}, "widths": (4, 5), "seed": 0}
    with pytest.raises(UserError, match="holds a run of another config") as error:
        workdir.claim(tmp_path / "run", other)
    assert str(error.value).splitlines()[1:] == [
        "  clip: None there, '-' now",
        "  data.name: 'digits' there, 'mnist' now",
        "  seed: '-' there, 0 now",
        "  steps: 3 there, 4 now",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 3


def test_a_run_without_its_config_accepts_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds a run whose config.json is gone; put it back, or use another"):
        workdir.check(tmp_path, {"steps": 3})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"steps": 3', b"[1]", b"\xff\xfe"])
def test_damaged_files_are_named(tmp_path, content):
    for name in ("config.json", "results.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: is not what was written there"):
        workdir.check(tmp_path, {"steps": 3})
    with pytest.raises(UserError, match=r"results\.json: is not what was written there"):
        workdir.write_results(tmp_path, {})


def test_infinite_settings_are_compared(tmp_path):
    """JSON has no infinity; a config that has one is still equal to itself."""
    workdir.claim(tmp_path, {"clip": float("inf")})
    workdir.claim(tmp_path, {"clip": float("inf")})
    with pytest.raises(UserError, match=r"clip: None there, 1\.0 now"):
        workdir.claim(tmp_path, {"clip": 1.0})


def test_results_are_merged(tmp_path):
    """What other methods and quantities have stays; the same quantity is replaced."""
    workdir.write_results(tmp_path, {"avb": {"elbo": {"mean": 1.0}, "kl": {"mean": 2.0}}})
    workdir.write_results(tmp_path, {"vae": {"elbo": {"mean": 3.0}}, "avb": {"elbo": {"mean": 4.0}}})
    found = json.loads((tmp_path / "results.json").read_text())
    means = {name: {quantity: one["mean"] for quantity, one in of_method.items()} for name, of_method in found.items()}
    assert means == {"avb": {"elbo": 4.0, "kl": 2.0}, "vae": {"elbo": 3.0}}


def test_json_that_others_can_read(tmp_path):
    """Null for what is not finite, whatever it is nested in; nothing half-written is left."""
    path = tmp_path / "deep" / "numbers.json"
    workdir.write_json(path, {"a": [1.0, (float("nan"), {"b": float("-inf")})]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": [1.0, [None, {"b": None}]]}
    assert [file.name for file in path.parent.iterdir()] == ["numbers.json"]


def test_results_that_come_at_once_are_all_kept(tmp_path, monkeypatch):
    """Another process writes while one has read, and not yet written."""
    ready, reached, read = threading.Event(), threading.Event(), workdir.read_json

    def slow(path):
        found = read(path)
        ready.set()
        reached.wait(0.5)
        return found

    workdir.write_results(tmp_path, {"avb": {"elbo": {"mean": 1.0}}})
    monkeypatch.setattr(workdir, "read_json", slow)
    first = threading.Thread(target=workdir.write_results, args=(tmp_path, {"vae": {"elbo": {"mean": 2.0}}}))
    first.start()
    ready.wait()
    monkeypatch.setattr(workdir, "read_json", read)
    workdir.write_results(tmp_path, {"sivi": {"elbo": {"mean": 3.0}}})
    reached.set()
    first.join()
    assert set(read(tmp_path / "results.json")) == {"avb", "vae", "sivi"}
