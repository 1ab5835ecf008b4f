"""What a run tells while it trains: JSON lines, TensorBoard, and a progress bar. Host side only."""

import json
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm

from avb_jax.evaluation.held_out import SAMPLES, HeldOut
from avb_jax.types import Diverged, Info

_LABELS = {
    "elbo": "ELBO", "kl": "KL", "kl_aggregated_posterior": "KL(q(z))", "reconstruction": "rec",
    "feature_distance": "feature distance", "adversary_loss": "T loss",
}  # fmt: skip


def as_numbers(info: Info) -> dict[str, np.ndarray]:
    """The Info's means by name, each [S]; what a method does not have is left out."""
    return {name: np.asarray(value) for name, value in info._asdict().items() if value is not None}


def tell_held_out(
    progress: "Progress", writer: "Writer | None", step: int, found: list[HeldOut], quiet: bool = False
) -> None:
    """What each seed's held-out examples say, and, `quiet` or not, a warning where the ELBO under T cannot be true."""
    numbers = {f"held_out_{field}": np.array([getattr(one, field) for one in found]) for field in HeldOut._fields}
    if writer is not None:
        writer.write(step, numbers, None)
    elbo, bound = (_short(numbers[f"held_out_{field}"].mean()) for field in ("elbo", "log_likelihood"))
    if not quiet:
        progress.note(f"step {step}, held out: ELBO under T {elbo}, log p(x) by importance sampling at least {bound}")
    for seed, one in enumerate(found):
        if one.parted:
            which = f" (seed number {seed})" if len(found) > 1 else ""
            progress.note(
                f"warning: the ELBO under T stands {one.excess:.1f} +- {one.excess_error:.1f} nats above that bound{which}: T "
                "is behind the encoder, or the bound is loose (effective sample size "
                f"{one.effective_sample_size:.1f} of {SAMPLES}). Lower the encoder's rate, raise adversary_steps, or use "
                "adaptive contrast"
            )


def check_finite(name: str, step: int, numbers: dict[str, np.ndarray]) -> None:
    """Stops a run that has left the numbers.

    Raises:
      Diverged: some mean is not finite.
    """
    for field, values in numbers.items():
        if not np.isfinite(values).all():
            seeds = ", ".join(str(seed) for seed in np.flatnonzero(~np.isfinite(values)))
            raise Diverged(
                f"{name}: {field} is not finite by step {step} (seed number {seeds}); lower the learning rates or clip the "
                "gradients (optimizer.clip), then start again in a new --workdir"
            )


class Writer:
    """Appends to `metrics.jsonl` and to TensorBoard event files; lines past `start`, of a run cut short, are dropped."""

    def __init__(self, workdir: pathlib.Path, name: str, start: int):
        self._name, path = name, workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if self._is_kept(line, start)]
            path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        folder = str(workdir / "tensorboard" / name)
        self._board = tensorboardX.SummaryWriter(folder, purge_step=start + 1 if start else None)

    def _is_kept(self, line: str, start: int) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return False  # the line that was being written when the run was killed
        return entry["method"] != self._name or entry["step"] <= start

    def write(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        """One line: the means over seeds by name, and per seed where there are several; no rate where compiling took part."""
        means = {name: float(values.mean()) for name, values in numbers.items()}
        line = {"method": self._name, "step": step, **means, "examples_per_second": examples_per_second}
        if len(next(iter(numbers.values()))) > 1:
            line["per_seed"] = {name: values.tolist() for name, values in numbers.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in means.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._board.close()


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; nats, means over the seeds."""

    def __init__(self, name: str, steps: int, start: int, quiet: bool = False, unit: str = "step"):
        self._name, self._steps, self._unit, self._begun = name, steps, unit, None
        self._lines = not (quiet or sys.stderr.isatty())
        self._bar = tqdm.tqdm(
            total=steps, initial=start, desc=name, unit=unit, dynamic_ncols=True, disable=quiet or self._lines,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        self._bar.set_postfix_str("compiling")
        if self._lines:
            print(f"{name} compiling", file=sys.stderr, flush=True)

    def show(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        """The latest numbers of a training."""
        parts = [f"{label} {_short(numbers[field].mean())}" for field, label in _LABELS.items() if field in numbers]
        parts += [f"{examples_per_second:,.0f} examples/s"] if examples_per_second else []
        self.tell(step, "  ".join(parts))

    def tell(self, step: int, text: str) -> None:
        """How far it is, and a text."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._lines:
            left = self._seconds_left(step)
            at = f"{self._unit} {step:>{len(str(self._steps))}}/{self._steps}"
            print(f"{self._name} {at}  {text}{left}".rstrip(), file=sys.stderr, flush=True)

    def _seconds_left(self, step: int) -> str:
        """Measured from the first report on, so that compiling does not count."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (step, now)
            return ""
        per_step = (now - self._begun[1]) / (step - self._begun[0])
        seconds = round(per_step * (self._steps - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left" if seconds else ""

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        tqdm.tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar.n == 0:
            self._bar.leave = False
        self._bar.close()


def _short(value: float) -> str:
    """Four digits, or all that are before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
