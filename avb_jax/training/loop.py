"""The host loop: batches in, blocks of steps, callbacks, checkpoints and resumption around any method's step."""

import concurrent.futures
import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax import processes
from avb_jax.data.dataset import Dataset, batch_indices, from_arrays
from avb_jax.data.iterator import Batches
from avb_jax.locks import locked
from avb_jax.method import Method
from avb_jax.training import blocks, checkpoints, checks
from avb_jax.training.callbacks import Callback, Run
from avb_jax.training.programs import Programs
from avb_jax.training.workdir import Positions, begun, ended, rollbacks
from avb_jax.transforms import over_seeds
from avb_jax.types import Array, State, UserError

RUN_ONCE = {"xla_backend_optimization_level": 0}  # for a program that takes longer to compile than it ever runs


class Interrupted(Exception):
    """The user stopped the run; the State so far is in its checkpoint, if it has a workdir."""


def train(
    method: Method,
    data: Any,
    *,
    steps: int,
    batch_size: int | None = None,
    seed: int = 0,
    num_seeds: int | None = None,
    parallel: str = "auto",
    devices: list | None = None,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    workdir: str | pathlib.Path | None = None,
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    state: State | None = None,
    programs: Programs | None = None,
) -> State:
    """`avb_jax.fit` with no other callbacks than those given; arguments, returns and errors as there."""
    if not isinstance(method, Method):
        raise UserError(f"method={method!r}: give a Method, such as avb_jax.avb(...) makes")
    if not isinstance(callbacks, Sequence) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise UserError(f"callbacks={callbacks!r}: give a list of avb_jax.Callback")
    if not isinstance(workdir, str | pathlib.Path | None):
        raise UserError(f"workdir={workdir!r}: give the path of a folder")
    data = as_data(data)
    batch_size = checks.check_arguments(data, steps, batch_size, seed, num_seeds, log_every, checkpoint_every)
    name, workdir = name or method.name, None if workdir is None else pathlib.Path(workdir)
    of_data = (data.x_shape, data.binarize, data.flip) if isinstance(data, Dataset) else data.shape
    programs = (programs or Programs()).also(method.name, type(data).__name__, of_data)
    stored = data.train if isinstance(data, Dataset) else None
    compiled = blocks.compile_blocks(
        method,
        data.prepare,
        stored,
        mode=parallel,
        batch_size=batch_size,
        num_seeds=num_seeds,
        devices=devices,
        programs=programs,
    )
    keys = step_keys(seed, num_seeds, 0 if workdir is None else rollbacks(workdir, name))
    if state is None:
        state = initial_state(method, data, seed, num_seeds, programs)
    else:
        state = jax.tree.map(jnp.asarray, state)  # it may be a NumPy tree
        checks.check_state(state, jax.eval_shape(_initial(method, data, num_seeds), 0), num_seeds)
    checks.check_values(method, data, state, seed, num_seeds, programs)

    with contextlib.ExitStack() as stack:
        folder = positions = None
        if workdir is not None:
            if processes.first():
                stack.enter_context(locked(workdir, "workdir"))
            folder = workdir / "checkpoints" / name
            state = checkpoints.restore(folder, state) or state
        step = start = int(np.ravel(state.step)[0])
        if start > steps:
            raise UserError(
                f"steps={steps}: {name} is at step {start}" + (f" in {workdir}; use another workdir" if folder else "")
            )
        if folder is not None:
            begun(workdir, name, seed)
            steps = start if ended(workdir, name) == start else steps
        if folder is not None and processes.first():
            checkpoints.tidy(folder, start)
        processes.wait(f"{name} from {start}")
        if isinstance(data, Batches) and workdir is not None:
            positions = Positions(workdir, name, data, start)
        callbacks = tuple(callbacks) if processes.first() else ()
        run = Run(name, method, data, steps, start, batch_size, num_seeds, seed, workdir, callbacks)
        for callback in callbacks:
            stack.callback(callback.close)
            callback.start(run)
        stop = stack.enter_context(_stop_requests(run))
        reader = stack.enter_context(_Reader(run, compiled, log_every, positions))
        state = compiled.place(state)
        if step < steps:
            checks.check_memory(compiled, keys, state, data, reader.length(step), batch_size, num_seeds)

        ahead, report = reader.start(step), _Reports(run)
        running = None  # the last block, whose numbers nobody has read yet
        saving = asked = done = False  # whether this block is saved; is the last on request; is the last for a callback
        while step < steps and not done and not (asked and saving):
            length = reader.length(step)
            batches, position = ahead.result()
            state, observed = compiled.run(keys, state, batches, bool(stop))
            step += length
            ahead = reader.start(step)
            previous, running = running, (step, length, observed)
            due = step >= steps or step // checkpoint_every > (step - length) // checkpoint_every
            # Read once: a request that comes during the reports waits for the next block. Other processes know of it with the
            # numbers of the block that began with it.
            asked = bool(stop) if not processes.several() else previous is not None and bool(previous[-1].wish)
            saving = due or asked
            # Reading the block before the one that was just started leaves the device something to do meanwhile.
            if previous is not None:
                report(*previous)
            if saving:
                report(*running)
                running = None
                if positions is not None and processes.first():
                    positions.save(step, position)
                gathered, said = compiled.gather(state), []
                look = functools.partial(_look, run, step, gathered, said) if due else lambda: None
                if folder is None:
                    look()
                else:
                    checkpoints.save(folder, step, gathered, before=look)
                done = any(np.ravel(processes.gathered(np.asarray(any(said)))))
                report.clock = time.monotonic()
        state = processes.own(compiled.gather(state))
        for callback in callbacks if start >= steps else ():
            callback.checkpoint(step, state)
        asked = any(np.ravel(processes.gathered(np.asarray(asked or bool(stop)))))
        # A request in the last block ends what is saved; what is only here is returned.
        if asked and (folder is not None or (step < steps and not done)):
            where = "" if folder is None else f", saved in {workdir}, from which it continues"
            raise Interrupted(f"{name}: stopped at step {step} of {steps}{where}")
    return state


class _Reader:
    """The batches of blocks of steps, read by a thread of its own while the devices run the block before."""

    def __init__(self, run: Run, compiled: blocks.Blocks, log_every: int, positions: Positions | None):
        self.run, self.compiled, self.log_every, self.positions = run, compiled, log_every, positions

    def __enter__(self) -> Self:
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error) -> None:
        self.thread.shutdown()

    def length(self, first: int) -> int:
        """The steps of the block that begins at step `first`."""
        return min(self.log_every - first % self.log_every, self.run.steps - first)

    def start(self, first: int) -> concurrent.futures.Future | None:
        """The batches of that block on the devices, to come, and the position after them; None after the last block."""
        return self.thread.submit(self._read, first, self.length(first)) if first < self.run.steps else None

    def _read(self, first: int, length: int) -> tuple:
        data, num_seeds = self.run.data, self.run.num_seeds
        if isinstance(data, Batches):
            batches = data.take(length)
            batches = batches if num_seeds is None else np.broadcast_to(batches, (num_seeds, *batches.shape))
            return self.compiled.fetch(batches), None if self.positions is None else data.position()
        seeds = [self.run.seed + s for s in range(num_seeds or 1)]
        indices = [batch_indices(len(data.train), self.run.batch_size, seed, first, length) for seed in seeds]
        return self.compiled.fetch(indices[0] if num_seeds is None else np.stack(indices)), None


class _Reports:
    """Reads the numbers of a block, stops a run that has diverged, and gives them to the callbacks, with the rate."""

    def __init__(self, run: Run):
        self.run, self.clock = run, time.monotonic()
        self.timed = set()  # lengths of blocks: the first of each is compiled, which is no rate to report
        self.warned = False  # of losses that are finite and mean nothing

    def __call__(self, step: int, length: int, observed: blocks.Observed) -> None:
        run = self.run
        numbers = {name: np.asarray(value) for name, value in observed.info._asdict().items() if value is not None}
        checks.check_finite(run.name, step, numbers, observed.finite)
        if not self.warned and (implausible := checks.beyond_reason(run.name, step, numbers, run.data)):
            self.warned = True
            run.note(implausible)
        now = time.monotonic()
        examples = length * run.batch_size * (run.num_seeds or 1)
        rate = examples / (now - self.clock) if length in self.timed else None
        self.timed.add(length)
        self.clock = now
        for callback in run.callbacks:
            callback.report(step, numbers, rate)


def _look(run: Run, step: int, gathered: State, said: list) -> None:
    """Shows a checkpoint to the callbacks and adds to `said` which of them have no more to do."""
    state = processes.copied(processes.own(gathered))  # the next block takes the original
    said += [callback.checkpoint(step, state) for callback in run.callbacks]
    if any(said) and run.workdir is not None:
        ended(run.workdir, run.name, step)


def step_keys(seed: int, num_seeds: int | None, taken_back: int = 0) -> Array:
    """The key of all steps, or one per seed, the first of which is that of a single one.

    After `taken_back` returns to an earlier checkpoint the noise is other than that which led where it could not go on.
    """
    root = jax.random.key(seed)
    if taken_back:
        root = jax.random.fold_in(root, 2**31 - 1 - taken_back)
    if num_seeds is None:
        return jax.random.fold_in(root, 0)
    return jax.vmap(functools.partial(jax.random.fold_in, root))(jnp.arange(num_seeds))


def as_data(data: Any) -> Dataset | Batches:
    """What `fit` was given as data: an array [N, ...], a `Dataset`, or an iterator of batches."""
    if isinstance(data, Dataset | Batches):
        return data
    if hasattr(data, "__array__") or isinstance(data, list):
        return from_arrays(data, name="data")
    if hasattr(data, "__iter__"):
        return Batches(data)
    raise UserError(
        f"data={type(data).__name__}: give an array x [N, ...], a data set of avb_jax.data, or an iterator of batches"
    )


def initial_state(
    method: Method, data: Dataset | Batches, seed: int, num_seeds: int | None, programs: Programs | None = None
) -> State:
    """The State before the first step, with a leading axis of seeds where there are several."""
    programs, init = programs or Programs(), _initial(method, data, num_seeds)
    return programs.keep("initial state", init, jax.devices()[:1], num_seeds, compiler_options=RUN_ONCE)(np.uint32(seed))


def _initial(method: Method, data: Dataset | Batches, num_seeds: int | None) -> Callable[[int], State]:
    """The State from a seed."""
    x_shape = data.x_shape if isinstance(data, Dataset) else data.shape[1:]

    def init(seed: int) -> State:
        x = jnp.zeros((2, *x_shape))
        root = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)  # apart from every seed's stream of steps
        return method.init(jax.random.fold_in(root, 0), x) if num_seeds is None else over_seeds(method, num_seeds).init(root, x)

    return init


@contextlib.contextmanager
def _stop_requests(run: Run) -> Iterator[list]:
    """A list that is empty until SIGINT or SIGTERM comes; a second one acts at once."""
    requests = []
    previous = {}

    def request(number, frame):
        del frame
        requests.append(number)
        run.note("stopping after this block of steps; once more to stop at once")
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
