"""The run directory: which config it belongs to, and the final numbers."""

import json
import os
import pathlib

import numpy as np

from avb_jax.types import UserError


def claim(workdir: pathlib.Path, config: dict) -> None:
    """Makes the directory this config's: writes `config.json`, or compares with the one that is there.

    `data.dir` may differ, since data may move; nothing else may.

    Raises:
      UserError: the directory holds a run of another config; the message shows the difference.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(config)))
        fields = [f for f in sorted({*old, *new} - {"data.dir"}) if old.get(f, "-") != new.get(f, "-")]
        if fields:
            changes = "\n".join(f"  {f}: {old.get(f, '-')!r} there, {new.get(f, '-')!r} now" for f in fields)
            raise UserError(
                f"--workdir={workdir}: holds a run of another config; choose another --workdir, or the same config\n{changes}"
            )
    write_json(path, config)


def summary(per_seed: list[float], **others) -> dict:
    """{'mean', 'standard_error', 'per_seed'} of one quantity, and `others`; the error is None for a single seed."""
    values = np.asarray(per_seed, np.float64)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error, "per_seed": values.tolist(), **others}


def write_results(workdir: pathlib.Path, results: dict[str, dict[str, dict]]) -> None:
    """Puts {method: {quantity: summary}} into `results.json`, beside what it holds of other methods and quantities."""
    path = workdir / "results.json"
    merged = json.loads(path.read_text()) if path.exists() else {}
    for method, quantities in results.items():
        merged.setdefault(method, {}).update(quantities)
    write_json(path, merged)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
