"""Runs estimators over examples: blocks of them, devices, progress, and results that are kept as they come."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from avb_jax import processes
from avb_jax.data.dataset import Dataset, from_arrays, to_pixels
from avb_jax.evaluation.estimator import Estimator
from avb_jax.evaluation.examples import PRECISION
from avb_jax.evaluation.report import Report, combine
from avb_jax.locks import locked
from avb_jax.method import Method, prior_at
from avb_jax.streams import stream
from avb_jax.training import workdir as workdirs
from avb_jax.training.callbacks import Progress
from avb_jax.training.checkpoints import key_data
from avb_jax.training.loop import RUN_ONCE, Interrupted
from avb_jax.transforms import of_seed
from avb_jax.types import Array, Diverged, PyTree, State, UserError

AXIS = "devices"
SECONDS_BETWEEN_REPORTS = 2.0
VERSION = 6  # of kept results: raised when an estimator gives other numbers for the same settings
EXAMPLES = "_examples"  # a digest of theirs, next to an estimator's fields
COUNTED = ("images", "draws", "inner", "samples", "codes", "chains", "temperatures", "steps")  # what an estimator takes


def evaluate(
    method: Method,
    state: State,
    data: Any,
    estimators: Sequence[Estimator],
    *,
    num_seeds: int | None = None,
    seed: int = 0,
    workdir: str | pathlib.Path | None = None,
    name: str | None = None,
    quiet: bool = False,
) -> Report:
    """Evaluates a trained method with several estimators, which all see the same binary images; products are in float32.

    Args:
      method: what was trained.
      state: its State, as `fit` returned it.
      data: examples x [N, ...], or a data set of `avb_jax.data`, of which the held-out examples are evaluated.
      estimators: of `avb_jax.evaluation`.
      num_seeds: as in `fit`, where the State has a leading axis of seeds.
      seed: of the estimators' own randomness.
      workdir: folder in which results per example are kept as they come, so that an evaluation that was interrupted continues,
        and one with more examples or estimators does no work twice; nothing is kept without one.
      name: what reports and folders call it; the method's own name by default.
      quiet: no progress on the terminal.

    Returns:
      A `Report`.

    Raises:
      UserError: an estimator needs what the method does not have, or two have one name.
      Interrupted: Ctrl-C came; what was done is kept.

    Example:
      >>> import jax.numpy as jnp, optax, avb_jax
      >>> encoder = avb_jax.networks.GaussianEncoder(avb_jax.networks.MLP((8,)), latent_dim=1)
      >>> decoder = avb_jax.networks.MLPDecoder(x_shape=(3,), parameters=1, widths=(8,))
      >>> prior, likelihood = avb_jax.distributions.standard_normal(1), avb_jax.distributions.gaussian(std=0.5)
      >>> method = avb_jax.vae(
      ...     encoder, decoder, prior=prior, likelihood=likelihood, optimizers=optax.adam(1e-2), noise_dim=1
      ... )
      >>> x = jnp.linspace(-2, 2, 60).reshape(20, 3)
      >>> state = method.init(jax.random.key(0), x)
      >>> estimators = [avb_jax.evaluation.ELBO(draws=4), avb_jax.evaluation.Quadrature()]
      >>> report = avb_jax.evaluate(method, state, x, estimators, quiet=True)
      >>> bool(report["elbo", "density"].mean < report["log_likelihood", "quadrature"].mean)
      True
      >>> report["log_likelihood", "quadrature"].per_example.shape
      (20,)
    """
    if not isinstance(method, Method):
        raise UserError(f"method={method!r}: give a Method, such as avb_jax.avb(...) makes")
    if not isinstance(estimators, Sequence) or not all(isinstance(estimator, Estimator) for estimator in estimators):
        raise UserError(f"estimators={estimators!r}: give a list of those of avb_jax.evaluation")
    name = name or method.name
    names = [estimator.name for estimator in estimators]
    if twice := [one for one in dict.fromkeys(names) if names.count(one) > 1]:
        raise UserError(f"estimators: {twice[0]!r} is given {names.count(twice[0])} times; evaluate each in a call of its own")
    for estimator in estimators:
        if lacks := estimator.lacks(method):
            raise UserError(f"{type(estimator).__name__}: {name} {lacks}")
    if (found := np.shape(state.step)) != (() if num_seeds is None else (num_seeds,)):
        has = f"has {found[0]} seeds" if found else "has no axis of seeds"
        raise UserError(f"num_seeds={num_seeds}: the State {has}; give {found[0] if found else None}")
    data = data if isinstance(data, Dataset) else from_arrays(np.asarray(data), name="data")
    folder = None if workdir is None else pathlib.Path(workdir)
    per_seed, results, notes, compiled = [], [], [], {}
    several = (num_seeds or 1) > 1
    progress = Progress(name, (num_seeds or 1) * len(estimators), 0, quiet or not several, "estimate")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision(PRECISION))
        stack.enter_context(contextlib.closing(progress))
        if folder is not None and processes.first():  # two at once would take each other's results away
            stack.enter_context(locked(folder / "evaluation", "workdir", wait=True))
        for s in range(num_seeds or 1):
            one = state if num_seeds is None else of_seed(state, s)
            subject = Subject(name, method, one, data, s, seed, folder, quiet, notes, {}, compiled, several)
            numbers = {}
            for i, estimator in enumerate(estimators):
                if several:
                    progress.update(s * len(estimators) + i, f"seed {s}, {estimator.name}")
                if not quiet and s == 0:
                    each = f", for each of {num_seeds} seeds" if several else ""
                    which = f", estimate {i + 1} of {len(estimators)}" if len(estimators) > 1 else ""
                    progress.note(f"{name}: {estimator.name}{which}{_amounts(estimator, data)}{each}")
                try:
                    found = estimator.run(subject)
                except Diverged as error:  # no number, and the reason; the others go on
                    subject.note(f"{estimator.name} has no number: {error}")
                    continue
                for (quantity, of), number in found.items():
                    if number.reason:
                        subject.note(f"{quantity}, {of}: {number.reason}")
                numbers |= found
            per_seed.append(numbers)
            results.append(subject.results)
        progress.update(len(estimators) * (num_seeds or 1), "done")
    shared = [key for key in per_seed[0] if all(key in numbers for numbers in per_seed)]
    estimates = {key: combine([numbers[key] for numbers in per_seed], num_seeds is not None) for key in shared}
    return Report(name, estimates, dict.fromkeys(notes), results)


def _amounts(estimator: Estimator, data: Dataset) -> str:
    """What it will take, in counts; how long that is, progress says after the first examples."""
    found = {field: getattr(estimator, field) for field in COUNTED if hasattr(estimator, field)}
    if found.get("images", 0) is None:
        found["images"] = len(data.test)
    counts = [f"{value:,} {field}" for field, value in found.items() if isinstance(value, int)]
    return f": {', '.join(counts)}" if counts else ""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What estimators are given: one run, the examples, and where results are kept."""

    name: str
    method: Method
    state: State  # of one seed
    data: Dataset
    index: int  # which of several seeds
    seed: int  # of the estimators' randomness
    folder: pathlib.Path | None
    quiet: bool
    notes: list  # lines for the reader, added to
    results: dict  # by estimator, what it found per example, added to
    compiled: dict  # what the seeds share
    several: bool = False  # seeds: an estimate that is a single call then shows no progress of its own

    def note(self, text: str) -> None:
        """Adds a line for the reader."""
        self.notes.append(f"{self.name}: {text}")

    def of(self, method: Method, state: State) -> "Subject":
        """The same with another method of the same kind and its State; its results are not for the report."""
        return dataclasses.replace(self, method=method, state=state, results={}, compiled={})

    @property
    def examples(self) -> np.ndarray:
        """The stored held-out examples [N, ...]."""
        return self.data.test

    @property
    def binarize(self) -> str:
        """How x is made of them, see `data.to_pixels`."""
        return self.data.binarize

    @property
    def key(self) -> Array:
        """One for all estimators and methods, so that they see the same binary images."""
        return jax.random.fold_in(stream(jax.random.key(self.seed), "evaluation"), self.index)

    def x(self) -> Array:
        """All held-out examples as the networks see them."""
        return self.x_of(self.examples)

    def x_of(self, examples: np.ndarray) -> Array:
        """Some of them as the networks see them."""
        return to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(examples), self.binarize)

    def some_x(self) -> Array:
        """Two examples, for their shape."""
        return jnp.zeros((2, *self.data.x_shape))

    def keep(self, what: str, settings: dict) -> pathlib.Path | None:
        """The folder for what depends on settings; emptied where it holds what came of other ones. None without a workdir."""
        if self.folder is None:
            return None
        folder = self.folder / "evaluation" / f"{self.name}-{self.index}" / what
        keep_folder(folder, self._settings(settings))
        return folder

    def on_examples(self, estimator: Estimator, *, simulated: bool = False) -> PyTree:
        """An estimator on its first `images` examples, `chunk` of them on each device at once: NumPy arrays [N, ...].

        With `simulated`, it makes its examples itself, and is given their numbers alone.
        """
        arrays = () if simulated else (self.examples[: estimator.images],)
        count = estimator.images if simulated else len(arrays[0])
        kept = getattr(estimator, "kept", estimator.name)
        block = examples_per_call(count, estimator.chunk)
        split = self.compiled.get(estimator)
        if split is None:
            method, binarize = self.method, self.binarize

            def over(key: Array, state: State, numbers: Array, images: Array | None = None) -> PyTree:
                return estimator.over(method, key, state, images, numbers, binarize)

            split = self.compiled[estimator] = over_examples(over)

        def of(numbers: np.ndarray) -> PyTree:
            return split(self.key, self.state, numbers, *[array[np.minimum(numbers, count - 1)] for array in arrays])

        abstract = [jax.ShapeDtypeStruct((block, *array.shape[1:]), array.dtype) for array in arrays]
        like = jax.eval_shape(split, self.key, self.state, jax.ShapeDtypeStruct((block,), np.int32), *abstract)
        ignored = ("images", "chunk", "kept")  # they change which results there are, not the results
        settings = {k: v for k, v in dataclasses.asdict(estimator).items() if k not in ignored}
        folder = self.keep(kept, {**settings, "fields": like._fields})  # a version that knows fewer left other files
        label = f"{self.name} {kept}" + f" of seed {self.index}" * self.several
        quiet = self.quiet or (self.several and count <= block)
        digest = None if simulated else lambda start, stop: zlib.crc32(np.ascontiguousarray(self.examples[start:stop]))
        found = by_blocks(label, of, like, count, block, folder, estimator.describe, digest, quiet)
        self.results[kept] = found
        return found

    def _settings(self, settings: dict) -> dict:
        """What results depend on: params, data, key, and `settings`."""
        variables = key_data((self.state.params, self.state.collections, self.state.ema))
        params = functools.reduce(lambda crc, leaf: zlib.crc32(np.ascontiguousarray(leaf), crc), jax.tree.leaves(variables), 0)
        sample = zlib.crc32(np.ascontiguousarray(self.examples[:16]))
        data = {"name": self.data.name, "binarize": self.binarize, "test": sample}
        if (probed := self.compiled.get("probed")) is None:
            probed = self.compiled["probed"] = probe(self.method, self.state, self.x_of(self.examples[:2]))
        return {"version": VERSION, "params": params, "method": probed, "data": data, "seed": self.seed, **settings}


def probe(method: Method, state: State, x: Array) -> dict[str, list]:
    """What a method makes of fixed draws at x [2, ...], to three digits: by its likelihood, prior, encoder and contrast.

    None of these is in the State: two methods that differ in them alone, a Gaussian's standard deviation, say, are told apart.
    """
    key = stream(jax.random.key(0), "probe")

    def found(state: State) -> dict[str, Array]:
        numbers = {}
        if method.log_joint is not None and (prior := prior_at(method, state)) is not None:
            z = prior.sample(stream(key, "z"), (len(x),))
            numbers |= {"z": z, "log_joint": method.log_joint(state, x, z)}
        if method.log_likelihood is not None:
            numbers["log_likelihood"] = method.log_likelihood(key, state, x)
        if method.encode is not None:
            numbers["encode"] = method.encode(key, state, x).z
        if method.adversary is not None:
            numbers["adversary"] = method.adversary(key, state, x).loss
        return numbers

    found = jax.device_get(jax.jit(found, compiler_options=RUN_ONCE)(state))
    return {name: [float(f"{value:.3g}") for value in np.ravel(values)] for name, values in found.items()}


def over_examples(function: Callable, devices: list | None = None) -> Callable:
    """Compiles an estimator (key, state, numbers [N], *arrays [N, ...]) -> tree of [N, ...], examples split over devices.

    N must be a multiple of the devices' number. The estimator has to give each example numbers that follow from it alone
    (`evaluation.examples`); the result is then the same on any number of devices.
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec(AXIS)

    @jax.jit
    def compiled(shared: tuple[Array, State], examples: tuple[Array, ...]) -> PyTree:
        mapped = jax.shard_map(
            lambda shared, examples: function(*shared, *examples),
            mesh=mesh,
            in_specs=(whole, split),
            out_specs=split,
            check_vma=False,
        )
        return mapped(shared, examples)

    def run(key: Array, state: State, numbers: Array, *arrays: Array) -> PyTree:
        shared = jax.device_put((key, state), NamedSharding(mesh, whole))  # a restored State sits on one device
        return compiled(shared, jax.device_put((numbers, *arrays), NamedSharding(mesh, split)))

    return run


def examples_per_call(count: int, chunk: int) -> int:
    """How many of `count` examples to give `over_examples` at once: `chunk` per device, fewer where there are not so many."""
    devices = jax.local_device_count()
    return devices * min(chunk, -(-count // devices))


def keep_folder(folder: pathlib.Path, settings: dict) -> None:
    """Makes `folder` the place for results under `settings`; what it holds of other settings is removed.

    The numbers that a run reports are in its `results.json`; such a folder only saves doing work twice.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    try:
        fits = json.loads(path.read_text()) == settings
    except (OSError, ValueError):
        fits = False
    if processes.first():
        if folder.exists() and not fits:
            shutil.rmtree(folder)
        workdirs.write_json(path, settings)
    processes.wait(f"{folder} is for results")


def by_blocks(
    name: str,
    estimate: Callable[[np.ndarray], PyTree],
    like: PyTree,
    count: int,
    block: int,
    folder: pathlib.Path | None,
    describe: Callable[[PyTree], str],
    digest: Callable[[int, int], int] | None = None,
    quiet: bool = False,
) -> PyTree:
    """Evaluates examples 0 to `count` - 1 block by block, beginning after those whose results `folder` holds.

    Args:
      name: what the progress calls it.
      estimate: example numbers [block] -> a NamedTuple of per-example arrays [block, ...] (or None); an example's must follow
        from its number alone. The last block's numbers may run past the end, to be dropped.
      like: what `estimate` returns, abstractly (of which the shapes are not read).
      count: N, of all examples.
      block: examples per call, always as many, so that one program is compiled.
      folder: where each block's results are kept, an .npz file with the NamedTuple's fields; None: nowhere.
      describe: a few words of progress on the results of the examples so far.
      digest: of the examples from one number to another, by which results of other examples are not taken for theirs.
      quiet: no progress.

    Returns:
      What `estimate` returns, as NumPy arrays [N, ...].

    Raises:
      Interrupted: Ctrl-C came; the blocks so far are kept.
    """
    fields = [field for field, value in like._asdict().items() if value is not None]
    parts, done, reported, damaged = [], 0, 0.0, None
    while folder is not None and done < count and (path := folder / f"{done:07}.npz").exists():
        try:
            with np.load(path) as arrays:
                part = {field: arrays[field] for field in fields}
                if digest is not None and int(arrays[EXAMPLES]) != digest(done, done + len(part[fields[0]])):
                    break
                parts.append(part)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            damaged = path
            break
        done += len(parts[-1][fields[0]])
    first = done

    def joined() -> PyTree:
        return like._replace(**{field: np.concatenate([part[field] for part in parts])[:count] for field in fields})

    progress = Progress(name, count, min(done, count), quiet=quiet or done >= count, unit="example")
    with contextlib.closing(progress):
        if damaged is not None:
            progress.note(f"{name}: {damaged} is damaged; evaluated again from there")
        if 0 < first < count and not quiet:
            progress.note(f"{name}: continues after example {first}")
        try:
            while done < count:
                numbers = done + block * processes.index() + np.arange(block, dtype=np.int32)  # each process has a block
                result = estimate(numbers)
                for found in processes.gathered({field: np.asarray(getattr(result, field)) for field in fields}):
                    if done >= count:
                        break
                    parts.append({field: values[: count - done] for field, values in found.items()})
                    if folder is not None and processes.first():
                        partial = folder / f"{done:07}.partial"
                        of = {} if digest is None else {EXAMPLES: digest(done, done + len(parts[-1][fields[0]]))}
                        with partial.open("wb") as file:
                            np.savez(file, **parts[-1], **of)
                        partial.rename(folder / f"{done:07}.npz")
                    done += len(parts[-1][fields[0]])
                if not quiet and (done >= count or time.monotonic() - reported > SECONDS_BETWEEN_REPORTS):
                    progress.update(done, describe(joined()))
                    reported = time.monotonic()
        except KeyboardInterrupt:
            kept = "" if folder is None else "; what was done is kept"
            raise Interrupted(f"{name}: stopped after example {done} of {count}{kept}") from None
    return joined()
