"""Evaluates a run, of any experiment and method, with estimators that check each other; adds to its `results.json`.

    python -m experiments.evaluate --workdir=RUN [--config=experiments/configs/evaluate.py[:quick]] [--config.ais.chains=32 ...]
"""

import json
import math
import pathlib

import jax
import ml_collections

from avb_jax import UserError, checkpoints, workdir
from avb_jax.loop import initial_state
from avb_jax.types import State
from experiments import build, launch
from experiments.estimators import ESTIMATORS, Number, Subject, applicable, missing

ROWS = {
    "log_likelihood_quadrature": "log p(x), quadrature",
    "log_likelihood_ais": "log p(x), annealed importance sampling",
    "effective_sample_size_ais": "  effective sample size",
    "acceptance_ais": "  acceptance",
    "divergent_ais": "  share of transitions that diverged",
    "bdmc_lower": "  simulated data: from below",
    "bdmc_upper": "  simulated data: from above",
    "bdmc_width": "  simulated data: width of this sandwich",
    "log_likelihood_importance": "log p(x), importance sampling (bound)",
    "effective_sample_size_importance": "  effective sample size",
    "elbo": "ELBO",
    "reconstruction_error": "  reconstruction error",
    "kl": "  KL(q(z|x), p(z))",
    "kl_fresh_adversary": "  KL(q(z|x), p(z)) under a fresh T",
    "kl_knn": "  KL(q(z|x), p(z)), k-NN",
    "adversary_loss": "loss of T",
    "adversary_loss_fresh": "loss of a fresh T on the same players",
    "optimality_gap": "  optimality gap of T",
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "kl_aggregated_posterior_gaussian": "KL(q(z), p(z)), k-NN about a Gaussian",
    "mutual_information": "I(x; z)",
    "active_units": "active units",
    "posterior_variance": "  variance of q(z|x), mean over latents",
}
UNDER_T = {"elbo": "ELBO under T: an estimate, no bound", "kl": "  KL(q(z|x), p(z)) under T"}
LEAST = {"images": 0, "bdmc.images": 1, "points": 0, "moments.draws": 2}  # of counts; 1 of all others


def main(options: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Evaluates what `options` name of the run in `folder`."""
    chosen = [] if options.estimators == "auto" else [name.strip() for name in options.estimators.split(",")]
    for what in chosen:
        if what not in ESTIMATORS:
            raise UserError(f"estimators={what!r}: must be 'auto', or among {', '.join(ESTIMATORS)}")
    for what in ESTIMATORS:
        for field, value in options[what].items():
            least = LEAST.get(f"{what}.{field}", LEAST.get(field, 1))
            if isinstance(value, int) and value < least:
                raise UserError(f"{what}.{field}={value}: must be at least {least}")
            if isinstance(value, float) and not value > 0:
                raise UserError(f"{what}.{field}={value}: must be positive")
    notes, evaluated, with_t = [], {}, set()
    for name, subjects in load(options, folder, notes).items():
        per_seed = []
        for subject in subjects:
            numbers, lacks = {}, missing(subject)
            if not (chosen or applicable(subject)):
                subject.note("no estimator applies: it has no likelihood and no encoder; its samples are in figures/")
            with_t |= {name} if subject.model.networks.adversary is not None else set()
            for what in chosen:
                if what in lacks:
                    raise UserError(f"estimators={what!r}: {name} {lacks[what]}")
            for what in chosen or applicable(subject):
                try:
                    found = ESTIMATORS[what](subject)
                except UserError as error:
                    if chosen:
                        raise
                    subject.note(f"{what} is left out: {error}")
                    continue
                for quantity, number in found.items():
                    if number.reason:
                        subject.note(f"{what}, {ROWS[quantity].strip()}: {number.reason}")
                numbers |= found
            per_seed.append(numbers)
        evaluated[name] = {
            quantity: _summary([numbers[quantity] for numbers in per_seed])
            for quantity in ROWS if all(quantity in numbers for numbers in per_seed)
        }  # fmt: skip
        workdir.write_results(folder, {name: evaluated[name]})
    for name, quantities in evaluated.items():
        if quantities:
            print(table(name, quantities, under_t=name in with_t))
    print("".join(f"\n{note}" for note in dict.fromkeys(notes)))
    print(f"\nNumbers in {folder / 'results.json'}, per example in {folder / 'evaluation'}, figures in {folder / 'figures'}")


def load(options: ml_collections.ConfigDict, folder: pathlib.Path, notes: list[str]) -> dict[str, list[Subject]]:
    """The run's methods that `options` name, by name: a `Subject` per seed.

    Raises:
      UserError: no run there, no checkpoint in it, or a method or seeds that it does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={folder}: no run there (there is no {path}); name the directory of a finished run")
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    config.data.dir = options.data_dir or config.data.dir
    methods, dataset, loaded = build.methods(config), build.dataset(config), {}
    seeds = options.seeds or config.num_seeds
    if not 1 <= seeds <= config.num_seeds:
        raise UserError(f"seeds={seeds}: the run in {folder} has {config.num_seeds}")
    for name in [part.strip() for part in options.method.split(",")] if options.method else methods:
        if name not in methods:
            raise UserError(f"method={name!r}: the run in {folder} has {', '.join(methods)}")
        model = build.model(config, name, dataset.x_shape)
        like = initial_state(methods[name], model, build.optimizers(config), dataset, config.seed, config.num_seeds)
        states = _restore(folder, name, like)
        step = int(states.step[0])
        unfinished = "" if step >= config.steps else f", not finished: its config has {config.steps}"
        print(f"{name}: {seeds} of {config.num_seeds} seeds at step {step}{unfinished}", flush=True)
        loaded[name] = [
            Subject(
                name, methods[name], model, dataset, config, options, folder, seed,
                jax.tree.map(lambda a, seed=seed: a[seed], states), notes,
            )
            for seed in range(seeds)
        ]  # fmt: skip
    return loaded


def _restore(folder: pathlib.Path, name: str, like: State) -> State:
    checkpoint = folder / "checkpoints" / name
    states = None
    if checkpoint.is_dir():
        with checkpoints.open_folder(checkpoint) as store:
            states = checkpoints.restore(store, like)
    if states is None:
        raise UserError(f"--workdir={folder}: no checkpoint of {name} in {checkpoint}; train it until it has written one")
    return states


def _summary(numbers: list[Number]) -> dict:
    """Over seeds, with what is known over examples: the seeds' errors added up as of independent means."""
    errors = {
        f"{kind}_standard_error": math.sqrt(sum(getattr(n, f"{kind}_error") ** 2 for n in numbers)) / len(numbers)
        for kind in ("examples", "estimator") if all(getattr(n, f"{kind}_error") is not None for n in numbers)
    }  # fmt: skip
    examples = {"examples": min(n.examples for n in numbers)} if numbers[0].examples is not None else {}
    return workdir.summary([n.mean for n in numbers], [n.reason for n in numbers], **examples, **errors)


def table(name: str, quantities: dict[str, dict], under_t: bool) -> str:
    """The quantities as text; those that take T's word say so."""
    labels = ROWS | UNDER_T if under_t else ROWS
    header = f"\n{name + ', nats per example':44}{'mean':>9}{'seeds':>10}{'examples':>10}{'estimator':>11}{'of':>9}"
    lines = [header]
    for quantity, number in quantities.items():
        errors = [number.get(key) for key in ("standard_error", "examples_standard_error", "estimator_standard_error")]
        columns = [f"+-{error:.3g}" if error is not None else "" for error in errors]
        of = f"{number['examples']:,}" if "examples" in number else ""
        line = f"{labels[quantity]:44}{number['mean']:>9.3f}{columns[0]:>10}{columns[1]:>10}{columns[2]:>11}{of:>9}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "standard errors: over seeds, over the examples, and the estimator's own"])


if __name__ == "__main__":
    launch.run("evaluate", main)
