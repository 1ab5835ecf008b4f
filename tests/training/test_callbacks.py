"""What a training reports on its way: lines of JSON, TensorBoard, the terminal, a look at held-out examples."""

import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import avb_jax
from avb_jax import UserError, data
from avb_jax.evaluation.held_out import HeldOut
from avb_jax.training import callbacks, checkpoints
from avb_jax.training.callbacks import Callback, JSONLines, Profile, Progress, ProgressBar, Run, TensorBoard
from avb_jax.training.checks import beyond_reason, check_finite
from avb_jax.training.loop import initial_state, train
from tests.conftest import small_method
from tests.training.toy import toy

OPTIONS = {"batch_size": 8, "log_every": 4, "checkpoint_every": 4, "parallel": "jit"}


class Board:
    """A TensorBoard writer that keeps what it is given."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)

    def close(self):
        self.closed = True


@pytest.fixture
def boards(monkeypatch):
    """The TensorBoard writers that were made."""
    made = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *a, **k: made.append(Board(*a, **k)) or made[-1])
    return made


def run_of(workdir, start=0, num_seeds=None, steps=10, given=()):
    return Run("avb", None, None, steps, start, 8, num_seeds, 0, workdir, tuple(given))


def test_lines_are_means_over_seeds_and_those_past_the_start_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [json.dumps({"method": method, "step": step}) for method, step in (("vae", 9), ("avb", 4))]
    path.write_text("\n".join([*kept, json.dumps({"method": "avb", "step": 5}), '{"method": "avb", "st']) + "\n")
    lines = JSONLines()
    lines.start(run_of(tmp_path, start=4, num_seeds=2))
    lines.report(6, {"elbo": np.array([-1.0, -5.0])}, 20.0)
    lines.close()
    alone = JSONLines()
    alone.start(run_of(tmp_path, start=6))
    alone.report(8, {"kl": np.array(2.0)}, None)
    alone.record(8, {"held_out_elbo": np.array(3.0)})
    alone.close()
    *before, several, one, recorded = path.read_text().splitlines()
    assert before == kept
    per_seed = {"elbo": [-1.0, -5.0]}
    assert json.loads(several) == {"method": "avb", "step": 6, "elbo": -3.0, "examples_per_second": 20.0, "per_seed": per_seed}
    assert json.loads(one) == {"method": "avb", "step": 8, "kl": 2.0, "examples_per_second": None}
    assert json.loads(recorded) == {"method": "avb", "step": 8, "held_out_elbo": 3.0, "examples_per_second": None}


def test_boards_get_means_over_seeds(tmp_path, boards):
    """A run that continues drops what a run that was cut short wrote past its start."""
    for start, purge in ((4, 5), (0, None)):
        board = TensorBoard()
        board.start(run_of(tmp_path, start, num_seeds=2))
        board.report(6, {"elbo": np.array([-1.0, -5.0])}, 20.0)
        board.record(8, {"kl": np.array([2.0, 4.0])})
        board.close()
        made = boards[-1]
        assert (made.folder, made.purge_step) == (str(tmp_path / "tensorboard" / "avb"), purge)
        assert made.scalars == [("elbo", -3.0, 6), ("kl", 3.0, 8)]
        assert made.closed


@pytest.mark.parametrize("run", [run_of(None), run_of("not a folder", start=10)], ids=["no workdir", "finished"])
def test_nothing_is_written_without_a_workdir_or_steps_to_take(run, boards):
    for callback in (JSONLines(), TensorBoard()):
        callback.start(run)
        callback.report(6, {"elbo": np.array(1.0)}, None)
        callback.record(6, {"elbo": np.array(1.0)})
        callback.close()
    assert boards == []


def test_keepers_may_be_used_again(tmp_path, boards):
    """For a run that writes nothing, too."""
    (tmp_path / "other").mkdir()
    for callback in (JSONLines(), TensorBoard()):
        for workdir in (tmp_path, None, tmp_path / "other"):
            callback.start(run_of(workdir))
            callback.report(6, {"elbo": np.array(1.0)}, None)
            callback.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert [len(board.scalars) for board in boards] == [1, 1]


def test_progress_in_lines(monkeypatch, capsys):
    """What is left is by the time since the first report: 100 steps in 50 seconds, then 150 steps take 75 more."""
    times = iter([7.0, 57.0, 132.0])
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(times))
    bar = ProgressBar()
    bar.start(run_of(None, steps=300))
    numbers = {"kl": np.array([1.0, 2.0]), "elbo": np.array([-12345.0, -12346.0]), "unshown": np.zeros(2)}
    bar.report(50, numbers, None)
    bar.report(150, numbers, 1234.5)
    bar.report(300, {"kl": np.array(0.25)}, None)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "avb compiling",
        "avb step  50/300  ELBO -12,346  KL 1.5",
        "avb step 150/300  ELBO -12,346  KL 1.5  1,234 examples/s  1:15 left",
        "avb step 300/300  KL 0.25",
    ]


@pytest.mark.parametrize(("start", "line"), [(4, "avb: continues at step 4 of 10"), (10, "avb: finished at step 10 of 10")])
def test_where_a_run_continues(start, line, capsys):
    bar = ProgressBar()
    bar.start(run_of(None, start))
    bar.close()
    assert capsys.readouterr().err.splitlines() == [line, *(["avb compiling"] if start < 10 else [])]


def test_progress_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(callbacks.sys, "stderr", terminal)
    progress = Progress("avb", 10, 2)
    for step in (4, 8, 10):
        progress.update(step, f"at {step}")
        assert progress._bar.n == step
    progress.close()
    assert "100%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue().strip()


def test_progress_of_a_training_is_plain_lines_where_there_is_no_terminal(dataset, capfd):
    train(toy(), dataset, steps=8, callbacks=[ProgressBar()], **OPTIONS)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("avb ")]  # XLA may have lines of its own
    assert [line.split("ELBO")[0].strip() for line in lines] == ["avb compiling", "avb step 4/8", "avb step 8/8"]
    assert all(word in lines[2] for word in ("KL", "rec", "T loss", "examples/s"))


@pytest.fixture
def dataset():
    """Twenty 6x6 images, and as many held-out ones, binarised anew at every step."""
    return data.from_arrays(*np.random.default_rng(0).random((2, 20, 6, 6)), binarize="dynamic")


class Calls(Callback):
    """Keeps what is called, in order."""

    def __init__(self):
        self.calls = []

    def start(self, run):
        super().start(run)
        self.calls.append(("start", run.start))

    def report(self, step, numbers, examples_per_second):
        assert {"elbo", "kl", "adversary_loss"} <= set(numbers)
        assert {np.shape(value) for value in numbers.values()} == {() if self.run.num_seeds is None else (self.run.num_seeds,)}
        self.calls.append(("report", step))

    def checkpoint(self, step, state):
        assert [int(one.step) for one in self.run.per_seed(state)] == [step] * (self.run.num_seeds or 1)
        self.calls.append(("checkpoint", step))

    def close(self):
        self.calls.append(("close",))


@pytest.mark.parametrize("num_seeds", [None, 2])
@pytest.mark.slow
def test_when_callbacks_are_called(dataset, tmp_path, num_seeds):
    """Once for each block and each checkpoint, and once at the end; a finished run reports its last State."""
    options = {"num_seeds": num_seeds, "workdir": tmp_path, **OPTIONS, "log_every": 2}
    first, second = Calls(), Calls()
    train(toy(), dataset, steps=7, callbacks=[first], **options)
    reports = [("report", 2), ("report", 4), ("checkpoint", 4), ("report", 6), ("report", 7), ("checkpoint", 7)]
    assert first.calls == [("start", 0), *reports, ("close",)]
    train(toy(), dataset, steps=7, callbacks=[second], **options)
    assert second.calls == [("start", 7), ("checkpoint", 7), ("close",)]


def test_callbacks_are_closed_whatever_happens(dataset):
    class Failing(Calls):
        def report(self, step, numbers, examples_per_second):
            raise RuntimeError("of the callback's own")

    callback = Failing()
    with pytest.raises(RuntimeError, match="of the callback's own"):
        train(toy(), dataset, steps=8, callbacks=[callback], **OPTIONS)
    assert callback.calls == [("start", 0), ("close",)]


def held_out_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "held_out_elbo" in line}


@pytest.mark.parametrize("by", [-100.0, pytest.param(100.0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_an_elbo_above_the_bound_is_reported(dataset, tmp_path, capsys, by):
    """At each checkpoint, next to importance sampling; of AVB with an ELBO that is `by` nats too good."""
    method = small_method("avb")

    def optimistic(*arguments, **options):
        terms = method.elbo(*arguments, **options)
        return terms._replace(kl=terms.kl - by)

    method_too_good = method._replace(elbo=optimistic)
    train(method_too_good, dataset, steps=12, workdir=tmp_path, callbacks=[JSONLines(), HeldOut(8)], **OPTIONS)
    lines = held_out_lines(tmp_path)
    assert set(lines) == {4, 8, 12}
    for line in lines.values():
        np.testing.assert_allclose(line["held_out_elbo"] - line["held_out_log_likelihood"], line["held_out_excess"], rtol=1e-4)
    reported = capsys.readouterr().err
    assert "held out: ELBO under T" in reported
    assert ("warning: the ELBO under T stands" in reported) == (by > 0)


@pytest.mark.slow
def test_held_out_checks_are_on_held_out_images(tmp_path):
    """The same training on black images, with white or black ones held out; its decoder starts near white."""
    found, black, method = [], np.zeros((20, 6, 6)), small_method("avb")
    for i, test_images in enumerate((black + 1.0, black.copy())):
        dataset = data.from_arrays(black, test_images)
        start = initial_state(method, dataset, 0, None)
        decoder = jax.tree.map(lambda a: a + 1.0, start.params.decoder)
        start = start._replace(params=start.params._replace(decoder=decoder))
        given = {"state": start, "workdir": tmp_path / str(i), "callbacks": [JSONLines(), HeldOut(8)]}
        train(method, dataset, steps=4, **given, **OPTIONS)
        found += [line["held_out_log_likelihood"] for line in held_out_lines(tmp_path / str(i)).values()]
    on_white, on_black = found
    assert on_white > on_black + 10


def test_what_belongs_to_a_state_is_written_before_it_counts(dataset, tmp_path):
    """So that a run that is killed in between writes both anew; also where a callback fails, the State is saved."""
    seen = []

    class Look(Callback):
        def checkpoint(self, step, state):
            seen.append((step, checkpoints.steps(tmp_path / "checkpoints" / "vae")))
            if step == 8:
                raise OSError("a full disk, for one")

    with pytest.raises(OSError, match="a full disk"):
        train(toy("vae"), dataset, steps=12, workdir=tmp_path, callbacks=[Look()], **OPTIONS)
    assert seen == [(4, []), (8, [4])]
    assert checkpoints.steps(tmp_path / "checkpoints" / "vae") == [4, 8]


def test_what_is_not_finite_is_named():
    check_finite("avb", 3, {"elbo": np.array([1.0, 2.0]), "kl": np.array(0.0)}, {"decoder": np.array([True, True])})
    numbers = {"elbo": np.zeros(3), "kl": np.array([1.0, np.inf, np.nan])}
    with pytest.raises(UserError, match=r"avb: kl is not finite by step 3 \(seed number 1, 2\)"):
        check_finite("avb", 3, numbers, {})
    with pytest.raises(avb_jax.Diverged, match=r"avb: kl is not finite by step 3; lower"):
        check_finite("avb", 3, {"kl": np.array(np.nan)}, {})
    with pytest.raises(avb_jax.Diverged, match=r"something of the encoder's params or optimiser is not .* \(seed number 1\)"):
        check_finite("avb", 3, {}, {"decoder": np.array([True, True]), "encoder": np.array([True, False])})


def test_what_is_finite_and_means_nothing_is_reported(dataset):
    fine = {"elbo": np.array([-3e6, -2.0]), "kl": np.array(40.0), "adversary_loss": np.array(1e12)}
    assert beyond_reason("avb", 3, fine, dataset) == ""  # 36 numbers each
    line = beyond_reason("avb", 3, {**fine, "elbo": np.array([-2.0, -2.7e27])}, dataset)
    assert line.startswith("warning: avb: elbo is of the order of 3e+27 nats by step 3: the training has run away")
    assert beyond_reason("avb", 3, {"elbo": np.array(-1e30)}, np.zeros((4, 0))) == ""  # a density, far from its bulk


def test_a_profile_is_of_the_second_and_third_block(tmp_path, monkeypatch):
    """Which is when the first report has come until the third does, or the training ends."""
    calls, x = [], np.zeros((8, 6, 6), np.float32)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: calls.append((folder, options)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    watched = Profile()
    train(toy("vae"), x, steps=16, workdir=tmp_path, callbacks=[watched], **OPTIONS)
    assert calls == [(tmp_path / "profile", {"create_perfetto_trace": True}), "stop"]
    calls.clear()
    short = Profile()
    short.start(run_of(tmp_path))
    short.report(4, {}, None)
    short.close()
    short.close()
    assert calls[1:] == ["stop"]


class Wandb(types.ModuleType):
    """Weights & Biases, as far as the callback calls it."""

    def __init__(self):
        super().__init__("wandb")
        self.options, self.logged, self.finished = None, [], False

    def init(self, **options):
        self.options = options
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished = True

    Image = staticmethod(lambda path: ("image", path))


def test_weights_and_biases(tmp_path, monkeypatch):
    """Means over seeds and pictures at their steps; a workdir's run is the same one when it goes on."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    callback = callbacks.WeightsAndBiases("digits", {"steps": 10}, tags=["a"])
    callback.start(run_of(tmp_path))
    callback.report(4, {"elbo": np.array([-1.0, -3.0])}, 20.0)
    callback.record(4, {"held_out_elbo": np.array(-5.0)})
    callback.picture(4, "samples", tmp_path / "samples.png")
    callback.close()
    assert wandb.options["project"] == "digits"
    assert (wandb.options["id"], wandb.options["resume"]) == (f"{tmp_path.name}-avb", "allow")
    assert wandb.options["tags"] == ["a"]
    assert wandb.logged == [
        (4, {"elbo": -2.0, "examples_per_second": 20.0}),
        (4, {"held_out_elbo": -5.0}),
        (4, {"samples": ("image", str(tmp_path / "samples.png"))}),
    ]
    assert wandb.finished
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'avb_jax\[wandb\]'"):
        callbacks.WeightsAndBiases("digits")


def test_pictures_and_histograms_in_tensorboard(tmp_path, monkeypatch):
    board = types.SimpleNamespace(images=[], histograms={})
    board.add_image = lambda name, image, step, dataformats: board.images.append((name, image.shape, step, dataformats))
    board.add_histogram = lambda name, values, step: board.histograms.update({name: (values.shape, step)})
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *a, **k: board)
    Image.new("L", (5, 3)).save(tmp_path / "p.png")
    state = small_method("vae").init(jax.random.key(0), jnp.zeros((2, 6, 6)))
    for histograms in (False, True):
        callback = callbacks.TensorBoard(histograms)
        callback.start(run_of(tmp_path))
        callback.picture(6, "samples", tmp_path / "p.png")
        callback.checkpoint(6, state)
        assert bool(board.histograms) == histograms
    assert board.images == [("samples", (3, 5, 3), 6, "HWC")] * 2
    names = list(board.histograms)
    assert all(name.startswith(("encoder/", "decoder/")) for name in names)
    assert len(names) == len(jax.tree.leaves(state.params))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'avb_jax\[tensorboard\]'"):
        callbacks.TensorBoard().start(run_of(tmp_path))
