"""The host loop: batches in, blocks of steps, callbacks, checkpoints and resumption around any method's step."""

import concurrent.futures
import contextlib
import functools
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

from avb_jax import processes
from avb_jax.data.dataset import Dataset, batch_indices, from_arrays
from avb_jax.data.iterator import Batches
from avb_jax.distributions import base_distribution
from avb_jax.locks import locked
from avb_jax.method import Method, prior_at
from avb_jax.streams import stream
from avb_jax.training import blocks, checkpoints, memory
from avb_jax.training.callbacks import Callback, Run
from avb_jax.training.workdir import Positions, ended, rollbacks
from avb_jax.transforms import of_seed, over_seeds
from avb_jax.types import Array, Diverged, State, UserError

RUN_ONCE = {"xla_backend_optimization_level": 0}  # for a program that takes longer to compile than it ever runs
NATS = 1e5  # per number of an example, beyond which a loss says nothing
CHECKED = 10_000  # examples whose values are looked at before a training


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
) -> State:
    """`avb_jax.fit` with no other callbacks than those given; arguments, returns and errors as there."""
    if not isinstance(method, Method):
        raise UserError(f"method={method!r}: give a Method, such as avb_jax.avb(...) makes")
    if not isinstance(callbacks, Sequence) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise UserError(f"callbacks={callbacks!r}: give a list of avb_jax.Callback")
    if not isinstance(workdir, str | pathlib.Path | None):
        raise UserError(f"workdir={workdir!r}: give the path of a folder")
    data = as_data(data)
    batch_size = check_arguments(data, steps, batch_size, seed, num_seeds, log_every, checkpoint_every)
    name, workdir = name or method.name, None if workdir is None else pathlib.Path(workdir)
    root = jax.random.key(seed)
    if workdir is not None and (taken_back := rollbacks(workdir, name)):
        root = jax.random.fold_in(root, 2**31 - 1 - taken_back)  # other noise than that which led where it could not go on
    if num_seeds is None:
        keys = jax.random.fold_in(root, 0)  # that of the first of several seeds
    else:
        keys = jax.vmap(functools.partial(jax.random.fold_in, root))(jnp.arange(num_seeds))
    if state is None:
        state = initial_state(method, data, seed, num_seeds)
    else:
        state = jax.tree.map(jnp.asarray, state)  # it may be a NumPy tree
        check_state(method, data, state, num_seeds)
    check_values(method, data, state, seed, num_seeds)
    stored = data.train if isinstance(data, Dataset) else None
    compiled = blocks.compile_blocks(
        method, data.prepare, stored, mode=parallel, batch_size=batch_size, num_seeds=num_seeds, devices=devices
    )

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
        if folder is not None and ended(workdir, name) == start:
            steps = start
        if folder is not None and processes.first():
            checkpoints.tidy(folder, start)
        processes.wait(f"{name} from {start}")
        callbacks = callbacks if processes.first() else ()
        if isinstance(data, Batches) and workdir is not None:
            positions = Positions(workdir, name, data, start)
        run = Run(name, method, data, steps, start, batch_size, num_seeds, seed, workdir, tuple(callbacks))
        for callback in callbacks:
            stack.callback(callback.close)
            callback.start(run)
        stop = stack.enter_context(_stop_requests(run))
        reader = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        state, running = compiled.place(state), None
        clock, timed = time.monotonic(), set()

        def fetch(first: int) -> concurrent.futures.Future:
            """The batches of the block that begins at step `first`, read on their own thread, and the position after them."""
            length = min(log_every - first % log_every, steps - first)

            def read() -> tuple:
                if isinstance(data, Batches):
                    batches = data.take(length)
                    batches = batches if num_seeds is None else np.broadcast_to(batches, (num_seeds, *batches.shape))
                    return compiled.fetch(batches), None if positions is None else data.position()
                size, several = len(data.train), range(num_seeds or 1)
                indices = [batch_indices(size, batch_size, seed + s, first, length) for s in several]
                return compiled.fetch(indices[0] if num_seeds is None else np.stack(indices)), None

            return reader.submit(read)

        if step < steps:
            check_memory(compiled, keys, state, data, min(log_every - step % log_every, steps - step), batch_size, num_seeds)
        ahead = fetch(step) if step < steps else None
        saving = False
        asked = False  # whether to stop
        done = False  # whether a callback says that there is no more to do
        implausible = ""  # what was said of losses that are finite and mean nothing
        while step < steps and not done and not (asked and saving):
            length = min(log_every - step % log_every, steps - step)
            batches, position = ahead.result()
            state, observed = compiled.run(keys, state, batches, bool(stop))
            ahead = fetch(step + length) if step + length < steps else None
            previous, running = running, (step + length, length, observed)
            step += length
            due = step >= steps or step // checkpoint_every > (step - length) // checkpoint_every
            # Read once: a request that comes during the reports waits for the next block. Other processes know of it with the
            # numbers of the block that began with it.
            asked = bool(stop) if not processes.several() else previous is not None and bool(previous[-1].wish)
            saving = due or asked
            # Reading the block before the one that was just started leaves the device something to do meanwhile.
            for report in [previous, running] if saving else [previous]:
                if report is None:
                    continue
                at, count, observed = report
                numbers = {name: np.asarray(value) for name, value in observed.info._asdict().items() if value is not None}
                check_finite(name, at, numbers, observed.finite)
                if not implausible and (implausible := beyond_reason(name, at, numbers, data)):
                    run.note(implausible)
                now = time.monotonic()
                examples = count * batch_size * (num_seeds or 1)
                rate = examples / (now - clock) if count in timed else None
                timed.add(count)  # the first block of a length is compiled, which is no rate to report
                clock = now
                for callback in callbacks:
                    callback.report(at, numbers, rate)
            if saving:
                running = None
                if positions is not None and processes.first():
                    positions.save(step, position)
                gathered = compiled.gather(state)

                said = []

                def look(step: int = step, due: bool = due, gathered: State = gathered, said: list = said) -> None:
                    """What the callbacks make of a checkpoint, which is not one of a request to stop."""
                    kept = jax.tree.map(jnp.copy, processes.own(gathered)) if due else None  # the next block takes the original
                    said += [callback.checkpoint(step, kept) for callback in callbacks if due]
                    if any(said) and workdir is not None:
                        ended(workdir, run.name, step)

                if folder is None:
                    look()
                else:
                    checkpoints.save(folder, step, gathered, before=look)
                done = any(np.ravel(processes.gathered(np.asarray(any(said)))))
                clock = time.monotonic()
        state = processes.own(compiled.gather(state))
        if asked and step < steps and not done:
            where = "" if folder is None else f", saved in {workdir}, from which it continues"
            raise Interrupted(f"{name}: stopped at step {step} of {steps}{where}")
        for callback in callbacks if start >= steps else ():
            callback.checkpoint(step, state)
    return state


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


def check_arguments(data, steps, batch_size, seed, num_seeds, log_every, checkpoint_every) -> int:
    """Refuses what is no count or out of range, and an iterator of batches of another size; returns the batch size."""
    if isinstance(data, Batches):
        if batch_size not in (None, data.shape[0]):
            raise UserError(f"batch_size={batch_size}: the iterator gives batches of {data.shape[0]}; leave it out")
        batch_size = data.shape[0]
    elif batch_size is None:
        raise UserError("batch_size=None: give the number of examples per step")
    counts = {"batch_size": batch_size, "num_seeds": num_seeds, "log_every": log_every, "checkpoint_every": checkpoint_every}
    for field, value in {**counts, "steps": steps, "seed": seed}.items():
        if value is None:
            continue
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise UserError(f"{field}={value!r}: must be a whole number")
        if value < (field in counts):
            raise UserError(f"{field}={value}: must be at least {int(field in counts)}")
    if seed >= 2**32:
        raise UserError(f"seed={seed}: must be below 2**32, since JAX's keys take no more of it")
    return batch_size


def initial_state(method: Method, data: Dataset | Batches, seed: int, num_seeds: int | None) -> State:
    """The State before the first step, with a leading axis of seeds where there are several."""
    return jax.jit(_initial(method, data, num_seeds), compiler_options=RUN_ONCE)(seed)


def _initial(method: Method, data: Dataset | Batches, num_seeds: int | None) -> Callable[[int], State]:
    """The State from a seed."""
    x = jnp.zeros((2, *(data.x_shape if isinstance(data, Dataset) else data.shape[1:])))

    def init(seed: int) -> State:
        root = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)  # apart from every seed's stream of steps
        return method.init(jax.random.fold_in(root, 0), x) if num_seeds is None else over_seeds(method, num_seeds).init(root, x)

    return init


def check_values(method: Method, data: Dataset | Batches, state: State, seed: int, num_seeds: int | None) -> None:
    """Refuses data that the likelihood gives no probability to; up to `CHECKED` examples, evenly spaced, are looked at.

    A Bernoulli distribution that does not validate its arguments, such as `distributions.bernoulli`, takes all of [0, 1].

    Raises:
      UserError: some values are outside the support of p(x|z).
    """
    if method.decode is None or (method.log_joint is None and method.log_likelihood is None):
        return
    key, name = stream(jax.random.key(seed), "values"), getattr(data, "name", "data")

    def one_code(state: State) -> dist.Distribution:
        state = state if num_seeds is None else of_seed(state, 0)
        prior = prior_at(method, state)
        return method.decode(state, jnp.zeros((1, 0)) if prior is None else prior.sample(jax.random.fold_in(key, 0), (1,)))

    abstract = jax.eval_shape(one_code, state)
    found = base_distribution(abstract)
    bernoulli = isinstance(found, dist.BernoulliLogits | dist.BernoulliProbs)

    @jax.jit
    def look(state: State, key: Array, stored: Array) -> tuple[Array, Array, Array]:
        """The least and the greatest value, and whether all are possible."""
        x, of_x = data.prepare(key, stored), one_code(state)
        within = jnp.all(of_x.support(x))
        if bernoulli:
            # The log-probability of an intensity is a cross-entropy, or -inf where arguments are validated.
            within |= jnp.all((x >= 0) & (x <= 1)) & jnp.all(jnp.isfinite(of_x.log_prob(x)))
        return x.min(), x.max(), within

    stored = data.first if isinstance(data, Batches) else data.train
    chosen = np.linspace(0, len(stored) - 1, min(len(stored), CHECKED)).astype(int)
    low, high, fits = np.inf, -np.inf, True
    for i, chunk in enumerate(np.array_split(chosen, -(-len(chosen) // 500)), start=1):
        least, greatest, possible = look(state, jax.random.fold_in(key, i), jnp.asarray(stored[chunk]))
        low, high, fits = min(low, float(least)), max(high, float(greatest)), fits and bool(possible)
    if not fits:
        remedy = "scale them, or choose another likelihood"
        if bernoulli:
            remedy = "scale them to [0, 1] and use distributions.bernoulli, or make them 0 and 1"
        elif abstract.support.is_discrete:
            remedy = "give whole numbers that it has, not as uint8, which is scaled to [0, 1]; or choose another likelihood"
        elif getattr(found.support, "upper_bound", None) is not None:
            remedy = "scale them to what it has, such as [0, 1], or choose another likelihood"
        raise UserError(
            f"{name}: x has values from {low:g} to {high:g}, and the likelihood {type(found).__name__.lstrip('_')} is of "
            f"{found.support}: {remedy}"
        )


def check_state(method: Method, data: Dataset | Batches, state: State, num_seeds: int | None) -> None:
    """Refuses a State that is not the method's own, by the first array that differs.

    Raises:
      UserError: it has other arrays, or shapes or types of them, than `method.init` makes.
    """

    def arrays(tree: State) -> dict:
        return {jax.tree_util.keystr(at): (leaf.shape, leaf.dtype) for at, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    there, expected = arrays(state), arrays(jax.eval_shape(_initial(method, data, num_seeds), 0))
    for name in sorted({*there, *expected}):
        if there.get(name) != expected.get(name):
            given, own = (" ".join(map(str, found.get(name, ("no such array",)))) for found in (there, expected))
            raise UserError(
                f"state: {name} is {given}, and the method has {own}; give a State of this method and num_seeds={num_seeds}"
            )


def check_memory(compiled: blocks.Blocks, keys: Array, state: State, data: Dataset | Batches, length, batch_size, num_seeds):
    """Refuses, before anything is compiled, steps that cannot fit into the devices' memory.

    Raises:
      UserError: they need more than there is.
    """
    seeds = () if num_seeds is None else (num_seeds,)
    if isinstance(data, Batches):
        batches = jax.ShapeDtypeStruct((*seeds, length, *data.shape), data.first.dtype)
    else:
        batches = jax.ShapeDtypeStruct((*seeds, length, batch_size), np.int32)
    there = memory.available(compiled.devices)
    least = memory.needed(compiled.program(keys, state, batches))
    if there is not None and least > there:
        raise UserError(
            f"batch_size={batch_size}: the steps need {least / 2**30:,.1f} GiB at least, and there are {there / 2**30:,.1f}; "
            "use a smaller batch, and accumulate gradients (optimizer.accumulate; optax.MultiSteps), or smaller networks, or "
            "compute activations again (rematerialize; networks.rematerialized)"
        )


def check_finite(name: str, step: int, numbers: dict[str, np.ndarray], finite: dict[str, Array]) -> None:
    """Stops a run with a loss that is not finite, or one of whose players is not after the last update.

    Raises:
      Diverged: some mean, or something that belongs to a player, is not finite.
    """
    sound = {field: np.isfinite(values) for field, values in numbers.items()}
    sound |= {f"something of the {player}'s params or optimiser": np.asarray(values) for player, values in finite.items()}
    for field, values in sound.items():
        if not values.all():
            seeds = ", ".join(str(seed) for seed in np.flatnonzero(~values))
            which = f" (seed number {seeds})" if np.ndim(values) else ""
            raise Diverged(
                f"{name}: {field} is not finite by step {step}{which}; lower the learning rates or clip the gradients "
                "(optimizer.clip), and take a new workdir, with an earlier State if you like (state; restore_from in configs)"
            )


def beyond_reason(name: str, step: int, numbers: dict[str, np.ndarray], data: Dataset | Batches) -> str:
    """A line about nats that are finite and mean nothing, more than `NATS` for each number of an example; '' without any.

    Where x has no numbers there is no such measure: densities may be steep where their fit starts.
    """
    size = math.prod(data.x_shape if isinstance(data, Dataset) else data.shape[1:]) or math.inf
    for field in ("elbo", "reconstruction", "kl"):
        if field in numbers and (worst := np.abs(numbers[field]).max()) > NATS * size:
            return (
                f"warning: {name}: {field} is of the order of {worst:.0e} nats by step {step}: the training has run away, or "
                "the likelihood does not fit the data; lower the rates, clip the gradients, or scale the data"
            )
    return ""


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
