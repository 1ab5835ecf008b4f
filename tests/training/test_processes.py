"""Several processes that are one run, on this machine, with two simulated devices each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import COMPILE_FAST
from tests.experiments.command import ROOT, SYNTHETIC, arguments

FIELDS = [*SYNTHETIC, "method=avb", "parallel=auto", "steps=50", "log_every=5", "checkpoint_every=20"]


def start(folder, processes, devices, *fields):
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}"}
    shared = ["--distributed=auto", f"--coordinator=localhost:{port}", f"--num_processes={processes}"]
    running = []
    for number in range(processes):
        line = [sys.executable, "-m", "experiments.synthetic", *arguments(folder, *FIELDS, *fields)]
        line += [*shared, f"--process_id={number}"] if processes > 1 else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(line, cwd=ROOT, env=environment, **pipes))
    return running


def finish(running, seconds=240):
    """Status, output and errors of each."""
    try:
        ended = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]


def lines(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def numbers(folder):
    """The steps that were reported, and every number of a run, in order, but for rates."""
    found, results = lines(folder), json.loads((folder / "results.json").read_text())["avb"]
    fields = sorted(field for field, value in found[0].items() if isinstance(value, float) and "per_second" not in field)
    values = [line[field] for line in found for field in fields] + [results[name]["mean"] for name in sorted(results)]
    return [line["step"] for line in found], np.array(values)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """The numbers of one process with as many devices, written once."""
    (alone,) = finish(start(tmp_path / "one", 1, 4))
    first, second = finish(start(tmp_path / "two", 2, 2))
    assert (alone[0], first[0], second[0]) == (0, 0, 0), [alone[2], second[2]]
    (steps, found), (expected_steps, expected) = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert steps == expected_steps
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    assert "log-likelihood" in first[1]
    assert "log-likelihood" not in second[1]
    assert "step" not in second[2]


@pytest.mark.slow
def test_two_processes_stop_and_continue_together(tmp_path):
    """SIGTERM to one of them is enough; what they go on from is the step that both have saved."""
    running = start(tmp_path, 2, 2, "steps=400", "log_every=1")
    until(lambda: len(lines(tmp_path)) > 3)
    running[1].send_signal(signal.SIGTERM)
    for status, _, errors in finish(running):
        assert status == 130, errors
        assert "from which it continues" in errors
    stopped = lines(tmp_path)[-1]["step"]
    assert stopped < 400
    assert (tmp_path / "checkpoints" / "avb" / str(stopped)).is_dir()
    first, second = finish(start(tmp_path, 2, 2, "steps=400", "log_every=1"))
    assert (first[0], second[0]) == (0, 0), second[2]
    assert f"avb: continues at step {stopped} of 400" in first[2]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 401))


@pytest.mark.slow
def test_a_process_that_dies_is_noticed_by_the_others(tmp_path):
    """Within a minute, with a line, or JAX's own where it notices first; what is saved continues, on one process too."""
    fields = ["steps=100000", "log_every=10", "checkpoint_every=20"]
    running = start(tmp_path, 2, 2, *fields)
    until(lambda: len(lines(tmp_path)) > 8)
    running[1].kill()
    killed = time.monotonic()
    (status, _, errors), _ = finish(running, 60)
    assert status not in (0, None)
    assert time.monotonic() - killed < 60
    lines_of_an_end = "error: another process is gone; start all of them again", "stopped sending heartbeats"
    assert any(line in errors for line in lines_of_an_end), errors
    before = len(lines(tmp_path))
    (alone,) = start(tmp_path, 1, 4, *fields)
    until(lambda: len(lines(tmp_path)) > before + 2)
    alone.send_signal(signal.SIGINT)
    ((status, _, errors),) = finish([alone])
    assert status == 130, errors
    assert "avb: continues at step " in errors
