"""The run directory: which config it belongs to, where its data are, and the final numbers."""

import json
import math
import os
import pathlib

from flax.traverse_util import flatten_dict

from avb_jax import processes
from avb_jax.data.iterator import Batches
from avb_jax.locks import locked
from avb_jax.types import UserError


def check(workdir: pathlib.Path, config: dict) -> None:
    """Compares the config with the one that the directory belongs to, if it does to one.

    `data.dir` may differ, since data may move, and `restore_from` and `start_from`, which only the first start reads; nothing
    else may.

    Raises:
      UserError: the directory holds a run of another config, and the message shows the difference; or a run without one.
    """
    path = workdir / "config.json"
    if not path.exists():
        if (workdir / "checkpoints").is_dir() or (workdir / "metrics.jsonl").exists():
            raise UserError(f"workdir={workdir}: holds a run whose config.json is gone; put it back, or use another workdir")
    else:
        old, new = (flatten_dict(c, sep=".") for c in (read_json(path), json.loads(json.dumps(_valid(config)))))
        compared = sorted({*old, *new} - {"data.dir", "restore_from", "start_from"})
        fields = [field for field in compared if old.get(field, "-") != new.get(field, "-")]
        if fields:
            changes = "\n".join(f"  {f}: {old.get(f, '-')!r} there, {new.get(f, '-')!r} now" for f in fields)
            raise UserError(
                f"workdir={workdir}: holds a run of another config; choose another workdir, or the same config\n{changes}"
            )


def claim(workdir: pathlib.Path, config: dict) -> None:
    """Makes the directory this config's, as `check` allows it."""
    check(workdir, config)
    write_json(workdir / "config.json", config)


def rollbacks(workdir: pathlib.Path, name: str, more: int = 0) -> int:
    """How often a training has been taken back so far, `more` than before: each time its noise becomes another."""
    path = workdir / "rollbacks.json"
    counts = read_json(path) if path.exists() else {}
    if more:
        counts[name] = counts.get(name, 0) + more
        write_json(path, counts)
    return counts.get(name, 0)


def begun(workdir: pathlib.Path, name: str, seed: int) -> None:
    """Notes the seed that a training begins with.

    Raises:
      UserError: it was begun with another one.
    """
    path = workdir / "seeds.json"
    seeds = read_json(path) if path.exists() else {}
    if seeds.get(name, seed) != seed:
        raise UserError(f"seed={seed}: {name} in {workdir} was begun with seed={seeds[name]}; use another workdir")
    if name not in seeds:
        write_json(path, {**seeds, name: int(seed)})


def ended(workdir: pathlib.Path, name: str, at: int | None = None) -> int | None:
    """The step at which a callback ended a training for good, None where none did; `at` says that one has."""
    path = workdir / "ended.json"
    steps = read_json(path) if path.exists() else {}
    if at is not None:
        steps[name] = at
        write_json(path, steps)
    return steps.get(name)


class Positions:
    """Where an iterator of batches was at each checkpoint, so that a run continues with the batches that it would have seen."""

    KEPT = 3

    def __init__(self, workdir: pathlib.Path, name: str, data: Batches, start: int):
        """Takes the iterator to where it was at step `start`.

        Raises:
          UserError: it cannot tell where it is, or nothing was kept of that step.
        """
        self._path = workdir / "data" / f"{name}.json"
        data.position()
        kept = read_json(self._path) if self._path.exists() else {}
        if start and str(start) not in kept:
            raise UserError(f"{self._path}: has no position of the data at step {start}; start again in a new workdir")
        self._kept = {step: position for step, position in kept.items() if int(step) <= start}
        if start:
            data.restore(kept[str(start)])

    def save(self, step: int, position: dict) -> None:
        """Keeps the position after `step`, before the checkpoint is written that needs it."""
        self._kept[str(step)] = position
        for old in sorted(self._kept, key=int)[: -self.KEPT]:
            del self._kept[old]
        write_json(self._path, self._kept)


def write_results(workdir: pathlib.Path, results: dict[str, dict[str, dict]]) -> None:
    """Puts {method: {quantity: summary}} into `results.json`, next to what it holds of other methods and quantities.

    Waits for another process that does so.

    Raises:
      UserError: nothing can be written there, or `results.json` is damaged.
    """
    if not processes.first():
        return
    path = workdir / "results.json"
    with locked(workdir, "workdir", wait=True, file_name=".results.lock"):  # for a run's numbers and an evaluation's at once
        merged = read_json(path) if path.exists() else {}
        for method, quantities in results.items():
            merged.setdefault(method, {}).update(quantities)
        write_json(path, merged)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all; null for what is not a finite number, which JSON cannot say.

    Of several processes the first one does.
    """
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_valid(content), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_json(path: pathlib.Path) -> dict:
    """A file that `write_json` wrote.

    Raises:
      UserError: it is not what was written.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError
        return content
    except ValueError:  # of JSON or of UTF-8
        raise UserError(f"{path}: is not what was written there; put a copy back, or move it away") from None


def _valid(content: object) -> object:
    if isinstance(content, dict):
        return {name: _valid(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_valid(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
