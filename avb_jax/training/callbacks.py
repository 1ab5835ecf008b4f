"""What happens between blocks of steps: progress on the terminal, JSON lines, TensorBoard. Host side only.

`evaluation.held_out` and `figures` have further callbacks; a user's own subclasses `Callback`.
"""

import importlib.util
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from PIL import Image

from avb_jax.method import Method
from avb_jax.transforms import of_seed
from avb_jax.types import State, UserError

LABELS = {
    "log_likelihood": "log p(x)",
    "elbo": "ELBO",
    "kl": "KL",
    "kl_aggregated_posterior": "KL(q(z))",
    "reconstruction": "rec",
    "feature_distance": "feature distance",
    "adversary_loss": "T loss",
}


class Run(NamedTuple):
    """What callbacks know of the training that they belong to."""

    name: str
    method: Method  # of one seed
    data: Any  # a `Dataset` or `Batches`
    steps: int
    start: int  # the step at which it begins, or continues
    batch_size: int
    num_seeds: int | None
    seed: int
    workdir: pathlib.Path | None
    callbacks: tuple = ()

    def record(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        """Further numbers of a callback's own, by name and each [] or [seeds], for those that keep numbers."""
        for callback in self.callbacks:
            callback.record(step, numbers)

    def show(self, step: int, name: str, path: pathlib.Path) -> None:
        """A picture that a callback has written, for those that keep pictures."""
        for callback in self.callbacks:
            callback.picture(step, name, path)

    def note(self, text: str) -> None:
        """A line of its own on the terminal, above a progress bar."""
        tqdm.tqdm.write(text, file=sys.stderr)

    def per_seed(self, state: State) -> list[State]:
        """The State of each seed, without an axis of seeds."""
        if self.num_seeds is None:
            return [state]
        return [of_seed(state, s) for s in range(self.num_seeds)]


class Callback:
    """What a training calls; all of it does nothing here."""

    run: Run

    def start(self, run: Run) -> None:
        """Before the first step; a run that is finished calls `checkpoint` alone after it."""
        self.run = run

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        """After each block of steps: the Info's means by name, each [] or [seeds]; no rate where compiling took part."""

    def record(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        """Further numbers that another callback has found."""

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        """A picture that another callback has written."""

    def checkpoint(self, step: int, state: State) -> bool | None:
        """At each checkpoint, before its State counts as saved, and at the end; True ends the training there, for good.

        The State may be kept, and with several seeds has a leading axis of them.
        """

    def close(self) -> None:
        """At the end, however it came."""


class JSONLines(Callback):
    """Appends the numbers to `metrics.jsonl` of the workdir; lines past the start of a run that was cut short are dropped."""

    _file = None

    def start(self, run: Run) -> None:
        super().start(run)
        self._file = None
        if run.workdir is None or run.start >= run.steps:
            return
        path = run.workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if self._is_kept(line)]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)  # whole or not at all
        self._file = path.open("a")

    def _is_kept(self, line: str) -> bool:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return False  # the line that was being written when the run was killed
        return entry["method"] != self.run.name or entry["step"] <= self.run.start

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        """One line: the means over seeds by name, and per seed where there are several."""
        if self._file is None:
            return
        line = {"method": self.run.name, "step": step}
        line |= {name: float(values.mean()) for name, values in numbers.items()}
        line |= {"examples_per_second": examples_per_second}
        if (self.run.num_seeds or 1) > 1:
            line["per_seed"] = {name: values.tolist() for name, values in numbers.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def record(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        self.report(step, numbers, None)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def keepers() -> list[Callback]:
    """What keeps the numbers of a run by default: `metrics.jsonl`, and where tensorboardX is installed TensorBoard's files."""
    return [JSONLines(), *([TensorBoard()] if importlib.util.find_spec("tensorboardX") else [])]


class TensorBoard(Callback):
    """Writes the means over seeds to TensorBoard's event files in the workdir, and the pictures that others draw.

    With `histograms`, at each checkpoint also those of every param of the first seed.
    """

    def __init__(self, histograms: bool = False):
        self._histograms, self._board = histograms, None

    def start(self, run: Run) -> None:
        super().start(run)
        self._board = None
        self._writes = run.workdir is not None and run.start < run.steps
        if self._writes and importlib.util.find_spec("tensorboardX") is None:
            raise UserError("TensorBoard: needs tensorboardX; pip install 'avb_jax[tensorboard]'")

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        if self._writes:
            for name, values in numbers.items():
                self._open().add_scalar(name, float(values.mean()), step)

    def record(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        self.report(step, numbers, None)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        if self._writes:
            self._open().add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def checkpoint(self, step: int, state: State) -> None:
        if not self._writes or not self._histograms:
            return
        for at, leaf in jax.tree_util.tree_leaves_with_path(self.run.per_seed(state)[0].params):
            name = "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in at)
            self._open().add_histogram(name, np.asarray(leaf), step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _open(self) -> Any:
        """The writer, made when there is something to write: its import takes seconds where PyTorch is installed."""
        if self._board is None:
            import tensorboardX

            folder = str(self.run.workdir / "tensorboard" / self.run.name)
            self._board = tensorboardX.SummaryWriter(folder, purge_step=self.run.start + 1 if self.run.start else None)
        return self._board


class WeightsAndBiases(Callback):
    """Sends the means over seeds, and the pictures that others draw, to Weights & Biases (extra `wandb`).

    A training that is continued in its workdir goes on as the same run there.
    """

    def __init__(self, project: str, config: dict | None = None, **options: Any):
        """Takes what `wandb.init` does.

        Raises:
          UserError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise UserError("WeightsAndBiases: needs wandb; pip install 'avb_jax[wandb]'") from None
        self._wandb, self._options, self._of = wandb, {"project": project, "config": config, **options}, None

    def start(self, run: Run) -> None:
        super().start(run)
        self._of = None
        if run.start >= run.steps:
            return
        options = {"name": run.name, **self._options}
        if run.workdir is not None:
            options |= {"id": f"{run.workdir.absolute().name}-{run.name}", "resume": "allow", "dir": str(run.workdir)}
        self._of = self._wandb.init(**options)

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        if self._of is not None:
            rate = {} if examples_per_second is None else {"examples_per_second": examples_per_second}
            self._of.log({name: float(values.mean()) for name, values in numbers.items()} | rate, step=step)

    def record(self, step: int, numbers: dict[str, np.ndarray]) -> None:
        self.report(step, numbers, None)

    def picture(self, step: int, name: str, path: pathlib.Path) -> None:
        if self._of is not None:
            self._of.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self._of is not None:
            self._of.finish()


class ProgressBar(Callback):
    """The latest numbers of a training on the terminal, in nats, means over the seeds."""

    _bar = None

    def start(self, run: Run) -> None:
        super().start(run)
        if run.start:
            run.note(f"{run.name}: {'finished' if run.start >= run.steps else 'continues'} at step {run.start} of {run.steps}")
        self._bar = Progress(run.name, run.steps, run.start, quiet=run.start >= run.steps)

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        parts = [f"{label} {short(numbers[field].mean())}" for field, label in LABELS.items() if field in numbers]
        parts += [f"{examples_per_second:,.0f} examples/s"] if examples_per_second else []
        self._bar.update(step, "  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Profile(Callback):
    """Traces the second and the third block of steps, which nothing compiles in, to `profile/` of the workdir.

    For TensorBoard (its profile plugin) and, the `perfetto_trace.json.gz` in it, for https://ui.perfetto.dev.
    """

    _tracing = False

    def start(self, run: Run) -> None:
        super().start(run)
        self._blocks = 0

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        self._blocks += 1
        if self._blocks == 1 and self.run.workdir is not None:
            self._folder = self.run.workdir / "profile"
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        elif self._blocks == 3:
            self.close()

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self.run.note(f"{self.run.name}: profile of {self._blocks - 1} blocks in {self._folder}")


class Progress:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, steps: int, start: int, quiet: bool = False, unit: str = "step"):
        self._name, self._steps, self._unit, self._begun = name, steps, unit, None
        self._lines = not (quiet or sys.stderr.isatty())
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            desc=name,
            unit=unit,
            dynamic_ncols=True,
            disable=quiet or self._lines,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._bar.set_postfix_str("compiling")
        if self._lines:
            print(f"{name} compiling", file=sys.stderr, flush=True)

    def update(self, step: int, text: str) -> None:
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


def short(value: float) -> str:
    """Four digits, or all that are before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
