"""The host loop of evaluation: blocks of examples, progress, and results that are kept as they come."""

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable

import numpy as np

from avb_jax import metrics, workdir
from avb_jax.loop import Interrupted
from avb_jax.types import PyTree

SECONDS_BETWEEN_REPORTS = 2.0


def keep_folder(folder: pathlib.Path, settings: dict) -> None:
    """Makes `folder` the place for results under `settings`; what it holds of other settings is removed.

    The numbers that a run reports are in its `results.json`; such a folder only saves doing work twice.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if folder.exists() and not (path.exists() and json.loads(path.read_text()) == settings):
        shutil.rmtree(folder)
    workdir.write_json(path, settings)


def by_blocks(
    name: str, estimate: Callable[[np.ndarray], PyTree], like: PyTree, count: int, block: int, folder: pathlib.Path,
    settings: dict, describe: Callable[[PyTree], str],
) -> PyTree:  # fmt: skip
    """Evaluates examples 0 to `count` - 1 block by block, beginning after those whose results `folder` holds.

    Args:
      name: what the progress calls it.
      estimate: example numbers [block] -> a NamedTuple of per-example arrays [block, ...] (or None); an example's must follow
        from its number alone. The last block's numbers may run past the end, to be dropped.
      like: what `estimate` returns, abstractly (of which the shapes are not read).
      count: N, of all examples.
      block: examples per call, always as many, so that one program is compiled.
      folder: where each block's results are kept, an .npz file with the NamedTuple's fields.
      settings: all that the results depend on; with other settings than the folder's everything is done anew.
      describe: a few words of progress on the results of the examples so far.

    Returns:
      What `estimate` returns, as NumPy arrays [N, ...].

    Raises:
      Interrupted: Ctrl-C came; the blocks so far are kept.
    """
    keep_folder(folder, settings)
    fields = [field for field, value in like._asdict().items() if value is not None]
    parts, done, told = [], 0, 0.0
    while (path := folder / f"{done:07}.npz").exists() and done < count:
        with np.load(path) as arrays:
            parts.append({field: arrays[field] for field in fields})
        done += len(parts[-1][fields[0]])
    first = done

    def joined() -> PyTree:
        return like._replace(**{field: np.concatenate([part[field] for part in parts])[:count] for field in fields})

    progress = metrics.Progress(name, count, min(done, count), quiet=done >= count, unit="example")
    with contextlib.closing(progress):
        if 0 < first < count:
            progress.note(f"{name}: continues after example {first}")
        try:
            while done < count:
                result = estimate(np.arange(done, done + block, dtype=np.int32))
                size = min(block, count - done)
                parts.append({field: np.asarray(getattr(result, field))[:size] for field in fields})
                partial = folder / f"{done:07}.partial"
                with partial.open("wb") as file:
                    np.savez(file, **parts[-1])
                partial.rename(folder / f"{done:07}.npz")
                done += size
                if done >= count or time.monotonic() - told > SECONDS_BETWEEN_REPORTS:
                    progress.tell(done, describe(joined()))
                    told = time.monotonic()
        except KeyboardInterrupt:
            kept = f"stopped after example {done} of {count}; the same command continues it"
            raise Interrupted(f"{name}: {kept}") from None
    return joined()
