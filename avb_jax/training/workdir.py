"""The run directory: which config it belongs to, where its data are, and the final numbers."""

import json
import math
import os
import pathlib

from avb_jax.data.iterator import Batches
from avb_jax.types import UserError


def claim(workdir: pathlib.Path, config: dict) -> None:
    """Makes the directory this config's: writes `config.json`, or compares with the one that is there.

    `data.dir` may differ, since data may move; nothing else may.

    Raises:
      UserError: the directory holds a run of another config; the message shows the difference.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(_valid(config))))
        fields = [f for f in sorted({*old, *new} - {"data.dir"}) if old.get(f, "-") != new.get(f, "-")]
        if fields:
            changes = "\n".join(f"  {f}: {old.get(f, '-')!r} there, {new.get(f, '-')!r} now" for f in fields)
            raise UserError(
                f"workdir={workdir}: holds a run of another config; choose another workdir, or the same config\n{changes}"
            )
    write_json(path, config)


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
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
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
    """Puts {method: {quantity: summary}} into `results.json`, next to what it holds of other methods and quantities."""
    path = workdir / "results.json"
    merged = json.loads(path.read_text()) if path.exists() else {}
    for method, quantities in results.items():
        merged.setdefault(method, {}).update(quantities)
    write_json(path, merged)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all; null for what is not a finite number, which JSON cannot say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_valid(content), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _valid(content: object) -> object:
    if isinstance(content, dict):
        return {name: _valid(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_valid(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
