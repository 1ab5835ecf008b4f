"""A look at q while it is fitted, by bounds that do not use T: the best State is kept, and a fit that is done ends."""

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.inference.checks import APART, FEW, TAIL, WATCHED, Weigher, check_finite, summarise
from avb_jax.streams import stream
from avb_jax.training import checkpoints
from avb_jax.training.callbacks import Callback, Run, short
from avb_jax.training.loop import initial_state
from avb_jax.transforms.ema import averaged
from avb_jax.types import State

CAME_BY = "where q came by in training"
FIELDS = ("elbo_lower", "elbo_upper", "log_evidence", "log_evidence_error", "pareto_k")


class Watch(Callback):
    """At each checkpoint bounds q's own ELBO, keeps the latest State that is not surely worse than before, ends what is done.

    `best` is that State, with an axis of seeds where there is one.
    """

    def __init__(self, weigher: Weigher, tolerance: float, quiet: bool = False):
        """Takes what draws and weighs, and the KL in nats at which a fit is done."""
        self._weigher, self._tolerance, self._quiet = weigher, tolerance, quiet

    def start(self, run: Run) -> None:
        super().start(run)
        self._key = stream(jax.random.key(run.seed), "watch")
        self.best = self._of_best = None
        self._folder = None if run.workdir is None else run.workdir / "best" / run.name
        if self._folder is None:
            return
        checkpoints.sweep(self._folder)
        checkpoints.remove(self._folder, [step for step in checkpoints.steps(self._folder) if step > run.start])
        if checkpoints.steps(self._folder):
            self.best = checkpoints.restore(self._folder, initial_state(run.method, run.data, run.seed, run.num_seeds))
            self._of_best = self._numbers(self.best)

    def checkpoint(self, step: int, state: State) -> bool:
        """Whether every seed's q is within the tolerance of the density."""
        numbers = self._numbers(state)
        self.run.record(step, {f"checked_{field}": numbers[field] for field in FIELDS})
        taken = np.ones(self.run.num_seeds or 1, bool) if self.best is None else ~self._worse(numbers)
        if self.best is None:
            self.best, self._of_best = state, numbers
        elif taken.any():
            mask = taken if self.run.num_seeds is not None else taken[0]
            self.best = jax.tree.map(
                lambda new, old: jnp.where(jnp.reshape(mask, (-1,) + (1,) * (new.ndim - 1)) if mask.ndim else mask, new, old),
                state,
                self.best,
            )
            self._of_best = {field: np.where(taken, numbers[field], old) for field, old in self._of_best.items()}
        if self._folder is not None and (taken.any() or not checkpoints.steps(self._folder)):
            # Two, since the training's own State of this step is not saved yet, and the one before needs its own best.
            checkpoints.save(self._folder, step, self.best, kept=2)
        self._say(step, numbers, taken)
        gap, width = (numbers[field] - numbers["elbo_lower"] for field in ("log_evidence", "elbo_upper"))
        return bool(np.all((gap < self._tolerance) & (width < APART) & (numbers["pareto_k"] < TAIL)))

    def _worse(self, numbers: dict[str, np.ndarray]) -> np.ndarray:
        """Whether q [seeds] is surely worse than the best: its ELBO by the bounds, or what it covers by importance sampling."""
        best = self._of_best
        error = 3.0 * np.hypot(numbers["elbo_error"], best["elbo_error"])
        by_bounds = numbers["elbo_upper"] + error < best["elbo_lower"]
        error = 3.0 * np.hypot(numbers["log_evidence_error"], best["log_evidence_error"])
        by_cover = numbers["log_evidence"] + error < best["log_evidence"]
        return by_bounds | by_cover | ~np.isfinite(numbers["log_evidence"])

    def _numbers(self, state: State) -> dict[str, np.ndarray]:
        """Each [seeds].

        Raises:
          UserError: with a point, where q has gone to where the density is not a number, in every seed.
        """
        weighed = [self._weigher(averaged(one).params.encoder, self._key, WATCHED) for one in self.run.per_seed(state)]
        if all(np.isnan(one.log_density).mean() > FEW for one in weighed):
            check_finite(self._weigher.log_density, weighed[0].z, CAME_BY, without=1.0)
        found = [summarise(one) for one in weighed]
        return {field: np.array([one[field] for one in found]) for field in found[0]}

    def _say(self, step: int, numbers: dict[str, np.ndarray], taken: np.ndarray) -> None:
        if self._quiet:
            return
        for seed in range(len(taken)):
            of = {field: short(values[seed]) for field, values in numbers.items()}
            which = f" (seed number {seed})" if len(taken) > 1 else ""
            back = "" if taken[seed] else "; worse than before, so that an earlier step counts"
            self.run.note(
                f"step {step}{which}: q's own ELBO {of['elbo_lower']} to {of['elbo_upper']}, log evidence "
                f"{of['log_evidence']} +- {of['log_evidence_error']} (Pareto k {of['pareto_k']}){back}"
            )
