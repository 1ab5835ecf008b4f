"""The run directory: which config it belongs to, and the final numbers."""

import json
import math
import os
import pathlib
from collections.abc import Sequence

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
        old, new = _flat(json.loads(path.read_text())), _flat(json.loads(json.dumps(_valid(config))))
        fields = [f for f in sorted({*old, *new} - {"data.dir"}) if old.get(f, "-") != new.get(f, "-")]
        if fields:
            changes = "\n".join(f"  {f}: {old.get(f, '-')!r} there, {new.get(f, '-')!r} now" for f in fields)
            raise UserError(
                f"--workdir={workdir}: holds a run of another config; choose another --workdir, or the same config\n{changes}"
            )
    write_json(path, config)


def mean(values: np.ndarray) -> tuple[float, str]:
    """The mean [] over all examples [N], and why it is not a finite number; '' where it is one.

    The reason alone has the mean over the examples with a finite value: without those whose log-likelihood is minus infinity,
    for one, it is too high.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if finite.all():
        return float(values.mean()), ""
    lost, reason = values[~finite], f"{np.sum(~finite)} of {len(values)} examples have no finite value"
    if finite.any():
        bias = " upwards" if np.all(lost == -np.inf) else " downwards" if np.all(lost == np.inf) else ""
        reason += f"; the mean over the other {np.sum(finite)}, {values[finite].mean():.3f}, is biased{bias}"
    with np.errstate(invalid="ignore"):  # infinities of both signs
        return float(values.mean()), reason


def summary(per_seed: list[float], reasons: Sequence[str] = (), **others) -> dict:
    """{'mean', 'standard_error', 'per_seed'} of one quantity, and `others`; the error is None for a single seed.

    Where one seed has no finite value, nor have the mean and the error, and 'reason' joins the seeds' `reasons`.
    """
    values = np.asarray(per_seed, np.float64)
    spread = len(values) > 1 and np.isfinite(values).all()
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if spread else None
    given = [f"seed {i}: {reason}" if len(values) > 1 else reason for i, reason in enumerate(reasons) if reason]
    others |= {"reason": ". ".join(given)} if given else {}
    with np.errstate(invalid="ignore"):
        return {"mean": float(values.mean()), "standard_error": error, "per_seed": values.tolist(), **others}


def write_results(workdir: pathlib.Path, results: dict[str, dict[str, dict]]) -> None:
    """Puts {method: {quantity: summary}} into `results.json`, beside what it holds of other methods and quantities."""
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
