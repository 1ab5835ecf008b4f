"""Is T near its optimum? A fresh adversary, trained on frozen players, says how much T misses."""

import dataclasses
from typing import ClassVar

import jax
import optax

from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.method import Method
from avb_jax.settings import check_counts, check_settings
from avb_jax.streams import stream
from avb_jax.training import checkpoints
from avb_jax.training.callbacks import JSONLines, ProgressBar
from avb_jax.training.loop import train
from avb_jax.types import AdversaryTerms, Array, State


@dataclasses.dataclass(frozen=True)
class AdversaryEstimator(Estimator):
    """What T says of examples, averaged over draws; the same key gives two T the same z.

    Attributes:
      draws: of z from q(z|x) and from what T compares with, per example.
      kept: under which name results are kept.
    """

    draws: int = 4
    chunk: int = 250
    kept: str = "adversary"

    name: ClassVar[str] = "adversary"
    requires: ClassVar[tuple[str, ...]] = ("adversary",)

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> AdversaryTerms:
        """Of one example."""
        return jax.tree.map(lambda a: a[0], method.adversary(key, state, x[None], self.draws))

    def describe(self, found: AdversaryTerms) -> str:
        return so_far("T loss", found.loss, 4)


@dataclasses.dataclass(frozen=True)
class Optimality(Estimator):
    """What T's loss has yet to lose: a fresh adversary of the same kind is trained on the frozen players.

    Attributes:
      draws: of z per example.
      steps: of the fresh adversary's training; more of them continue what a workdir keeps.
      batch_size: of its steps.
      rate: Adam's.
      b1: Adam's.
      parallel: how its training uses devices, as in `avb_jax.fit`.

    Raises:
      UserError: a setting out of range.
    """

    draws: int = 4
    chunk: int = 250
    steps: int = 10_000
    batch_size: int = 128
    rate: float = 1e-3
    b1: float = 0.5
    parallel: str = "auto"

    name: ClassVar[str] = "optimality"
    requires: ClassVar[tuple[str, ...]] = ("adversary", "fresh_adversary")

    def __post_init__(self):
        check_counts(draws=self.draws, steps=self.steps, batch_size=self.batch_size, chunk=self.chunk, images=self.images)
        check_settings(rate=(self.rate, self.rate > 0, "positive"))

    def run(self, subject) -> dict[tuple[str, str], Number]:
        key = stream(subject.key, "fresh_adversary")
        method = subject.method.fresh_adversary(optax.adam(self.rate, b1=self.b1), subject.state)
        folder = subject.keep("fresh_adversary", {"batch_size": self.batch_size, "rate": self.rate, "b1": self.b1})
        start, name = jax.jit(method.init)(key, subject.some_x()), f"{subject.name} fresh T"
        there = [] if folder is None else checkpoints.steps(folder / "checkpoints" / name)
        steps = max([self.steps, *there])  # one of more steps that is there already is the better one
        state = train(
            method,
            subject.data,
            steps=steps,
            batch_size=self.batch_size,
            seed=int(jax.random.bits(key)) // 2,
            parallel=self.parallel,
            log_every=50,
            checkpoint_every=500,
            workdir=folder,
            name=name,
            state=start,
            callbacks=[JSONLines(), *([] if subject.quiet else [ProgressBar()])],
        )
        settings = {"images": self.images, "draws": self.draws, "chunk": self.chunk}
        own = subject.on_examples(AdversaryEstimator(**settings))
        fresh = subject.of(method, state).on_examples(AdversaryEstimator(**settings, kept="adversary_fresh"))
        gap = mean(own.loss - fresh.loss)
        if gap.mean < 0:
            subject.note(
                f"a fresh T is still worse than T after {steps} steps, so that the optimality gap says nothing yet; raise "
                "optimality.steps (the training continues)"
            )
        numbers = {
            ("adversary_loss", "adversary"): mean(own.loss),
            ("adversary_loss", "fresh_adversary"): mean(fresh.loss),
            ("optimality_gap", "fresh_adversary"): gap,
        }
        return numbers if fresh.kl is None else numbers | {("kl", "fresh_adversary"): mean(fresh.kl)}
