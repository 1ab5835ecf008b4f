"""`fit` trains a method with what a user expects of a training; `load` gives back what was trained."""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from avb_jax import processes
from avb_jax.data.dataset import Dataset
from avb_jax.evaluation.held_out import HeldOut
from avb_jax.method import Method
from avb_jax.training import checkpoints
from avb_jax.training import workdir as workdir_of
from avb_jax.training.callbacks import Callback, ProgressBar, keepers
from avb_jax.training.loop import as_data, initial_state, train
from avb_jax.training.programs import Programs
from avb_jax.transforms.ema import averaged
from avb_jax.types import Diverged, Players, PyTree, State, UserError, Variables


def default_callbacks(held_out: int = 32, quiet: bool = False, patience: int | None = None) -> list[Callback]:
    """What `fit` does by default: it keeps numbers (`training.callbacks.keepers`), shows progress, looks at held-out examples.

    Args:
      held_out: examples on which, at each checkpoint, the ELBO under T is compared with a bound on log p(x) that does not use
        T, with a warning where they contradict each other (`evaluation.held_out`).
      quiet: no progress on the terminal; warnings are reported.
      patience: training ends where so many checkpoints in a row have had no better bound; None: nowhere.
    """
    return [*keepers(), *([] if quiet else [ProgressBar()]), HeldOut(held_out, quiet, patience)]


def fit(
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
    callbacks: Sequence[Callback] | None = None,
    quiet: bool = False,
    state: State | None = None,
    rollbacks: int = 0,
    programs: Programs | None = None,
) -> State:
    """Trains a method, from its latest checkpoint where there is one.

    Args:
      method: what to train.
      data: examples x [N, ...], a data set of `avb_jax.data`, or an iterator of batches x [B, ...]. One that has `get_state`
        and `set_state`, as grain's have, is saved and restored with the run. Of a memory-mapped data set, batches are read
        ahead.
      steps: how many steps the run has in all.
      batch_size: of a step, over all devices; an iterator's own.
      seed: of everything random; with the step's number it determines each step.
      num_seeds: how many runs train side by side, from a seed each; None: one, and no array of the State has an axis of seeds.
      parallel: how devices are used: 'jit' (one device), 'sharded', 'pmap', or 'auto'; see `training.blocks`.
      devices: all there are, by default.
      log_every: steps per compiled block, which is reported as one.
      checkpoint_every: steps between checkpoints, which are taken at the next report.
      workdir: folder for `metrics.jsonl`, `tensorboard/` and `checkpoints/`; nothing is written without one.
      name: what reports and folders call the run; the method's own name by default.
      callbacks: what happens between blocks of steps; `default_callbacks()` where it is None. A list replaces these:
        `callbacks=[*avb_jax.default_callbacks(), Mine()]` adds to them.
      quiet: no progress on the terminal; warnings are reported.
      state: where a run without a checkpoint begins, with a leading axis of seeds where there are several; what `method.init`
        makes by default. It is copied, and stays the caller's.
      rollbacks: how often a run that has diverged goes back to its latest checkpoint and on from there with other noise, before
        it ends with `Diverged`; of the whole run, interruptions included.
      programs: where traced programs are kept for a next start, see `training.programs`; nowhere by default.

    Returns:
      The final State.

    Raises:
      UserError: a slip in the arguments, or examples that the likelihood gives no probability to (of 10,000 at most, evenly
        spaced, and one draw from the prior); `Diverged`: a loss, or a player, is not finite.
      Interrupted: SIGINT or SIGTERM came; the State was saved first, where there is a workdir.

    Example:
      >>> import jax.numpy as jnp, optax, avb_jax
      >>> encoder = avb_jax.networks.GaussianEncoder(avb_jax.networks.MLP((8,)), latent_dim=1)
      >>> decoder = avb_jax.networks.MLPDecoder(x_shape=(3,), parameters=1, widths=(8,))
      >>> prior, likelihood = avb_jax.distributions.standard_normal(1), avb_jax.distributions.gaussian(std=0.5)
      >>> method = avb_jax.vae(
      ...     encoder, decoder, prior=prior, likelihood=likelihood, optimizers=optax.adam(1e-2), noise_dim=1
      ... )
      >>> x = jnp.linspace(-2, 2, 60).reshape(20, 3)
      >>> state = avb_jax.fit(method, x, steps=4, batch_size=8, quiet=True)
      >>> int(state.step), avb_jax.fit(method, x, steps=4, batch_size=8, num_seeds=3, quiet=True).step.shape
      (4, (3,))
    """
    run = functools.partial(
        train,
        method,
        data,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        num_seeds=num_seeds,
        parallel=parallel,
        devices=devices,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        workdir=workdir,
        name=name,
        callbacks=default_callbacks(quiet=quiet) if callbacks is None else callbacks,
        state=state,
        programs=programs,
    )
    if not isinstance(rollbacks, int) or rollbacks < 0:
        raise UserError(f"rollbacks={rollbacks!r}: must be a whole number of at least 0")
    if not rollbacks:
        return run()
    if workdir is None:
        raise UserError(f"rollbacks={rollbacks}: needs a workdir, with the checkpoints to go back to")
    if processes.several():
        raise UserError(f"rollbacks={rollbacks}: is for one process; use restore_from where several diverge")
    while True:
        try:
            return run()
        except Diverged as error:
            done = workdir_of.rollbacks(pathlib.Path(workdir), name or method.name)
            if done >= rollbacks:
                raise Diverged(f"{error} (after {done} rollbacks)") from None
            workdir_of.rollbacks(pathlib.Path(workdir), name or method.name, more=1)
            tqdm.tqdm.write(
                f"{error.args[0].partition(';')[0]}: rollback {done + 1} of {rollbacks}, to other noise", file=sys.stderr
            )


class Loaded(NamedTuple):
    """What `load` found."""

    method: Method
    state: State
    data: Dataset | None  # of the run's config, where the method was rebuilt from it
    num_seeds: int | None


def load(
    workdir: str | pathlib.Path,
    method: Method | None = None,
    x: Any = None,
    *,
    num_seeds: int | None = None,
    name: str | None = None,
    step: int | str | None = None,
) -> Loaded:
    """A checkpoint of a run. Nothing is written, so that the run may be training.

    Args:
      workdir: of the run.
      method: what was trained; rebuilt from the run's `config.json`, which the experiments write, where it is None.
      x: examples [N, ...] of the shape that it was trained on, where the method is given.
      num_seeds: as it was trained with, where the method is given.
      name: which of the run's methods; its first by default.
      step: of the checkpoint; 'best': that of the best held-out bound on log p(x) (`evaluation.held_out`); the latest that is
        not damaged by default.

    Raises:
      UserError: no run there, no such checkpoint in it, or one of another method.
    """
    folder, data = pathlib.Path(workdir), None
    if method is None:
        from avb_jax import build

        run = build.run(folder, name)
        method, data, num_seeds, name = run.method, run.data, run.num_seeds, run.name
    elif x is None:
        raise UserError("x=None: next to a method, give examples of the shape that it was trained on")
    examples = data if data is not None else as_data(np.asarray(x))
    like = initial_state(method, examples, 0, num_seeds)
    state = restore(folder, name or method.name, like, step)
    return Loaded(method, state, data, num_seeds)


def restore(workdir: pathlib.Path, name: str, like: State, step: int | str | None = None) -> State:
    """The State of a run's method, shaped like `like`; of which step, is as in `load`. Nothing is written.

    Raises:
      UserError: there is none, or none that is undamaged and of this method.
    """
    if isinstance(step, str) and step != "best":
        raise UserError(f"step={step!r}: must be a whole number, 'best' or None")
    best = step == "best"
    folder = workdir / ("best" if best else "checkpoints") / name
    if not checkpoints.steps(folder):
        which, remedy = "checkpoint", "train it until it has written one"
        if best:
            which = "best checkpoint"
            remedy = "held-out examples, and a method with a bound on log p(x), make one at each checkpoint"
        raise UserError(f"workdir={workdir}: no {which} of {name} in {folder}; {remedy}")
    return checkpoints.restore(folder, like, None if best else step)


def start_from(other: State, state: State) -> tuple[State, list[str]]:
    """A State that has the players of another one, of any method, and is otherwise as it was.

    A player is taken where `state` has all of its params, by name and shape: the rest of them, such as what an encoder makes of
    its noise where the other one was Gaussian, stay as they are. Of a State with averages these are taken.

    Args:
      other: whose players; of as many seeds.
      state: with which a method begins, such as `method.init` makes.

    Returns:
      The State, to `fit` with, and the names of the players taken.

    Raises:
      UserError: none can be, with the first array of each player that is in the way.

    Example:
      >>> import avb_jax, optax
      >>> from avb_jax import networks
      >>> shared = {"prior": avb_jax.distributions.standard_normal(1), "likelihood": avb_jax.distributions.bernoulli}
      >>> shared |= {"optimizers": optax.adam(1e-3)}
      >>> trunk, decoder = networks.MLP((8,)), networks.MLPDecoder(x_shape=(3,), widths=(8,))
      >>> adversary = networks.InnerProductAdversary(networks.MLP((8,)), networks.MLP((8,)), features=2)
      >>> vae = avb_jax.vae(networks.GaussianEncoder(trunk, 1), decoder, noise_dim=1, **shared)
      >>> avb = avb_jax.avb(networks.MomentEncoder(trunk, 1), decoder, adversary, noise_dim=5, **shared)
      >>> x = jnp.eye(3)
      >>> state, taken = start_from(vae.init(jax.random.key(0), x), avb.init(jax.random.key(1), x))
      >>> taken
      ['encoder', 'decoder']
    """
    other, taken, reasons = averaged(other), [], []
    params, collections = state.params, state.collections
    for player in Players._fields:
        there, here = (_by_path(getattr(variables.params, player)) for variables in (other, state))
        unlike = next((path for path, leaf in there.items() if path not in here or leaf.shape != here[path].shape), None)
        if there and here and unlike is None:
            taken.append(player)
            params = params._replace(**{player: _with(getattr(params, player), there)})
            of_player = _by_path(getattr(other.collections, player))
            collections = collections._replace(**{player: _with(getattr(collections, player), of_player)})
        elif unlike is not None and here:
            size = here[unlike].shape if unlike in here else "not"
            reasons.append(f"{player}{unlike} is {there[unlike].shape} there, {size} here")
    if not taken:
        raise UserError(
            f"the other run has no player that fits ({'; '.join(reasons)}); use networks of the same sizes and seeds"
        )
    ema = state.ema and Variables(*jax.tree.map(jnp.copy, (params, collections)))
    return state._replace(params=params, collections=collections, ema=ema), taken


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _with(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    """The tree with the leaves that are given by path."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), tree)
