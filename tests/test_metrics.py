"""What a training tells on its way: lines of JSON, TensorBoard, and the terminal."""

import io
import json
import types

import numpy as np
import pytest

from avb_jax import UserError, metrics
from avb_jax.evaluation.held_out import HeldOut


class Board:
    """A TensorBoard writer that keeps what it is given."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.close = folder, purge_step, [], lambda: None

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)


@pytest.fixture
def boards(monkeypatch):
    """The TensorBoard writers that were made."""
    made = []
    monkeypatch.setattr(metrics.tensorboardX, "SummaryWriter", lambda *a, **k: made.append(Board(*a, **k)) or made[-1])
    return made


def test_lines_are_means_over_seeds_and_those_past_the_start_are_dropped(tmp_path, boards):
    path = tmp_path / "metrics.jsonl"
    kept = [json.dumps({"method": method, "step": step}) for method, step in (("vae", 9), ("avb", 4))]
    path.write_text("\n".join([*kept, json.dumps({"method": "avb", "step": 5}), '{"method": "avb", "st']) + "\n")
    writer = metrics.Writer(tmp_path, "avb", 4)
    writer.write(6, {"elbo": np.array([-1.0, -5.0])}, 20.0)
    writer.write(8, {"kl": np.array([2.0])}, None)
    writer.close()
    *before, several, one = path.read_text().splitlines()
    assert before == kept
    assert json.loads(several) == {
        "method": "avb", "step": 6, "elbo": -3.0, "examples_per_second": 20.0, "per_seed": {"elbo": [-1.0, -5.0]}
    }  # fmt: skip
    assert json.loads(one) == {"method": "avb", "step": 8, "kl": 2.0, "examples_per_second": None}
    (board,) = boards
    assert (board.folder, board.purge_step) == (str(tmp_path / "tensorboard" / "avb"), 5)
    assert board.scalars == [("elbo", -3.0, 6), ("kl", 2.0, 8)]
    metrics.Writer(tmp_path, "avb", 0).close()
    assert boards[1].purge_step is None


def test_progress_in_lines(monkeypatch, capsys):
    """What is left is by the time since the first report: 100 steps in 50 seconds, then 150 steps take 75 more."""
    times = iter([7.0, 57.0, 132.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(times))
    progress = metrics.Progress("avb", 300, 0)
    numbers = {"kl": np.array([1.0, 2.0]), "elbo": np.array([-12345.0, -12346.0]), "unshown": np.zeros(2)}
    progress.show(50, numbers, None)
    progress.show(150, numbers, 1234.5)
    progress.tell(300, "done")
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "avb compiling",
        "avb step  50/300  ELBO -12,346  KL 1.5",
        "avb step 150/300  ELBO -12,346  KL 1.5  1,234 examples/s  1:15 left",
        "avb step 300/300  done",
    ]


def test_progress_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(metrics.sys, "stderr", terminal)
    progress = metrics.Progress("avb", 10, 2)
    for step in (4, 8, 10):
        progress.tell(step, f"at {step}")
        assert progress._bar.n == step
    progress.close()
    assert "100%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue().strip()


def test_held_out_numbers_and_the_warning(capsys):
    """Means over the seeds; the seed whose ELBO cannot be true is named, `quiet` or not."""
    fine = HeldOut(elbo=-90.0, log_likelihood=-88.0, excess=-2.0, excess_error=0.1, effective_sample_size=20.0)
    parted = HeldOut(elbo=-80.0, log_likelihood=-86.0, excess=6.0, excess_error=0.5, effective_sample_size=5.25)
    written, lines = [], []
    progress = types.SimpleNamespace(note=lines.append)
    writer = types.SimpleNamespace(write=lambda step, numbers, rate: written.append((step, numbers, rate)))
    metrics.tell_held_out(progress, writer, 30, [fine, parted])
    ((step, numbers, rate),) = written
    assert (step, rate, len(numbers)) == (30, None, 5)
    np.testing.assert_array_equal(numbers["held_out_elbo"], [-90.0, -80.0])
    np.testing.assert_array_equal(numbers["held_out_effective_sample_size"], [20.0, 5.25])
    assert lines[0] == "step 30, held out: ELBO under T -85, log p(x) by importance sampling at least -87"
    assert lines[1].startswith("warning: the ELBO under T stands 6.0 +- 0.5 nats above that bound (seed number 1): T is behind")
    assert "(effective sample size 5.2 of 128)" in lines[1]
    metrics.tell_held_out(progress, None, 30, [parted], quiet=True)
    metrics.tell_held_out(progress, None, 30, [fine], quiet=True)
    assert len(lines) == 3
    assert "above that bound: T is" in lines[2]
    assert not fine._replace(excess=0.9, excess_error=0.0).parted
    assert not fine._replace(excess=2.0, excess_error=0.7).parted


def test_what_is_not_finite_is_named():
    metrics.check_finite("avb", 3, {"elbo": np.array([1.0, 2.0])})
    numbers = {"elbo": np.zeros(3), "kl": np.array([1.0, np.inf, np.nan])}
    with pytest.raises(UserError, match=r"avb: kl is not finite by step 3 \(seed number 1, 2\)"):
        metrics.check_finite("avb", 3, numbers)
