"""The host loop: batches in, blocks of steps, metrics, checkpoints and resumption around any method's step."""

import concurrent.futures
import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import checkpoints, metrics, parallel
from avb_jax.data.dataset import Dataset, batch_indices
from avb_jax.evaluation import held_out
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import Players, State, UserError


class Interrupted(Exception):
    """The user stopped the run; the State so far is in its checkpoint, if it has a workdir."""


def fit(
    method, model: Model, optimizers: Players, dataset: Dataset, *, steps: int, batch_size: int, seed: int = 0,
    num_seeds: int = 1, mode: str = "auto", devices: list | None = None, log_every: int = 100, checkpoint_every: int = 1000,
    workdir: str | pathlib.Path | None = None, name: str | None = None,
    on_checkpoint: Callable[[int, State], None] | None = None, quiet: bool = False, state: State | None = None,
    check_images: int = 32,
) -> State:
    """Trains a method, from its latest checkpoint where there is one.

    Args:
      method: a module of `avb_jax.methods`, or anything else with their `init` and `train_step`.
      model: networks, distributions, scales.
      optimizers: an optax optimiser per player.
      dataset: what to train on; of a memory-mapped file, batches are read ahead of the steps that need them.
      steps: how many steps the run has in all.
      batch_size: of a step, over all devices.
      seed: of everything random; with the step's number it determines each step.
      num_seeds: S, how many runs train side by side, from one seed each.
      mode: how devices are used, one of `parallel.MODES`.
      devices: all there are, by default.
      log_every: steps per compiled block, which is reported as one.
      checkpoint_every: steps between checkpoints, which are taken at the next report.
      workdir: folder for `metrics.jsonl`, `tensorboard/` and `checkpoints/`; nothing is written without one.
      name: what reports and folders call the run; the method's own name by default.
      on_checkpoint: called with the step and the State after each checkpoint, and once at the end; the State may be kept.
      quiet: no progress on the terminal; warnings are told.
      check_images: held-out examples on which, at each checkpoint, the ELBO under T is set beside a bound on log p(x) that does
        not use T (`evaluation.held_out`), with a warning where they part; 0 for none.
      state: where a run without a checkpoint begins, every array with a leading axis S; what `method.init` makes by default.
        It is copied, and stays the caller's.

    Returns:
      The final State, every array with a leading axis S.

    Raises:
      UserError: a slip in the arguments; `Diverged`: a loss that is not finite.
      Interrupted: SIGINT or SIGTERM came; the State was saved first.
    """
    counts = {"batch_size": batch_size, "num_seeds": num_seeds, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for field, value in counts.items():
        if value < 1:
            raise UserError(f"{field}={value}: must be at least 1")
    if steps < 0 or seed < 0 or check_images < 0:
        raise UserError(f"steps={steps}, seed={seed}, check_images={check_images}: must be at least 0")
    name = name or method.__name__.rpartition(".")[2]
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(num_seeds))
    if state is None:
        state = initial_state(method, model, optimizers, dataset, seed, num_seeds)
    state = jax.tree.map(jnp.asarray, state)  # it may be a NumPy tree
    blocks = parallel.compile_blocks(
        method.train_step, model, optimizers, dataset, mode=mode, batch_size=batch_size, num_seeds=num_seeds, devices=devices,
    )  # fmt: skip

    with contextlib.ExitStack() as stack:
        store = writer = None
        if workdir is not None:
            workdir = pathlib.Path(workdir)
            store = stack.enter_context(checkpoints.open_folder(workdir / "checkpoints" / name))
            state = checkpoints.restore(store, state) or state
        step = start = int(state.step[0])
        if workdir is not None and start < steps:
            writer = stack.enter_context(contextlib.closing(metrics.Writer(workdir, name, start)))
        progress = metrics.Progress(name, steps, start, quiet or start >= steps)
        stack.callback(progress.close)
        if start and not quiet:
            progress.note(f"{name}: {'finished' if start >= steps else 'continues'} at step {start} of {steps}")
        stop = stack.enter_context(_stop_requests(progress))

        clock, compiled = time.monotonic(), set()
        state, running = blocks.place(state), None
        saving = False
        reader = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))

        check = functools.partial(
            held_out.compare, stream(jax.random.key(seed), "held_out"), images=np.asarray(dataset.test[:check_images]),
            method=method, model=model, binarize=dataset.binarize,
        )  # fmt: skip
        held_out_examples = check_images and len(dataset.test) and dataset.test is not dataset.train
        checks = held_out_examples and model.networks.adversary is not None and hasattr(method, "elbo_terms")

        def fetch(start: int) -> concurrent.futures.Future:
            """The batches of the block that begins at step `start`, read on a thread of its own."""
            length = min(log_every - start % log_every, steps - start)
            indices = [batch_indices(len(dataset.train), batch_size, seed + s, start, length) for s in range(num_seeds)]
            return reader.submit(blocks.fetch, np.stack(indices))

        batches = fetch(step) if step < steps else None
        while step < steps and not (stop and saving):
            length = min(log_every - step % log_every, steps - step)
            state, info = blocks.run(keys, state, batches.result())
            batches = fetch(step + length) if step + length < steps else None
            previous, running = running, (step + length, length, info)
            step += length
            due = step >= steps or step // checkpoint_every > (step - length) // checkpoint_every
            saving = due or bool(stop)  # read once: a request that comes during the reports waits for the next block
            # Reading the block before the one that was just started leaves the device something to do meanwhile.
            for report in [previous, running] if saving else [previous]:
                if report is not None:
                    at, count, means = report[0], report[1], metrics.as_numbers(report[2])
                    metrics.check_finite(name, at, means)
                    now = time.monotonic()
                    rate = count * batch_size * num_seeds / (now - clock) if count in compiled else None
                    compiled.add(count)  # the first block of a length is compiled, which is no rate to report
                    clock = now
                    progress.show(at, means, rate)
                    if writer is not None:
                        writer.write(at, means, rate)
            if saving:
                running = None
                if store is not None:
                    checkpoints.save(store, step, blocks.gather(state))
                if on_checkpoint is not None and step < steps:
                    on_checkpoint(step, jax.tree.map(jnp.copy, blocks.gather(state)))  # the next block takes the original
                if checks and due and step < steps:
                    gathered = blocks.gather(state)
                    found = [check(jax.tree.map(lambda a, s=s: a[s], gathered)) for s in range(num_seeds)]
                    metrics.tell_held_out(progress, writer, step, found, quiet)
                clock = time.monotonic()
        state = blocks.gather(state)
        if stop and step < steps:
            where = "" if store is None else f", saved in {workdir}; the same command continues it"
            raise Interrupted(f"{name}: stopped at step {step} of {steps}{where}")
        if on_checkpoint is not None:
            on_checkpoint(step, state)
    return state


def initial_state(method, model: Model, optimizers: Players, dataset: Dataset, seed: int, num_seeds: int) -> State:
    """The State before the first step, every array with a leading axis of seeds."""
    x = jnp.zeros((2, *dataset.x_shape))
    root = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)  # apart from every seed's stream of steps
    keys = jax.vmap(functools.partial(jax.random.fold_in, root))(jnp.arange(num_seeds))
    return jax.jit(jax.vmap(lambda key: method.init(key, model, optimizers, x)))(keys)


@contextlib.contextmanager
def _stop_requests(progress: metrics.Progress):
    """A list that is empty until SIGINT or SIGTERM comes; a second one acts at once."""
    requests = []
    previous = {}

    def request(number, frame):
        del frame
        requests.append(number)
        progress.note("stopping after this block of steps; once more to stop at once")
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: whoever runs this thread handles signals
        pass
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
