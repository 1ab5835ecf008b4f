"""Evaluates a run, of any experiment and method, with estimators that check each other; adds to its `results.json`.

python -m experiments.evaluate --workdir=RUN [--config=experiments/configs/evaluate.py[:quick]] [--config.ais.chains=32 ...]
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

import avb_jax
from avb_jax import Report, State, UserError, build, evaluation
from avb_jax.evaluation import ais
from avb_jax.evaluation.estimator import Estimator
from avb_jax.figures import plots, save, titled
from avb_jax.fitting import restore
from avb_jax.training import checkpoints, workdir
from avb_jax.training.loop import initial_state
from experiments import launch

LABELS = {
    "log_likelihood_exact": "log p(x), exact; of realnvp a bound",
    "log_likelihood_quadrature": "log p(x), quadrature",
    "log_likelihood_ais": "log p(x), annealed importance sampling",
    "effective_sample_size_ais": "  effective sample size",
    "acceptance_ais": "  acceptance",
    "divergent_ais": "  share of transitions that diverged",
    "log_likelihood_lower_bdmc": "  simulated data: from below",
    "log_likelihood_upper_bdmc": "  simulated data: from above",
    "width_bdmc": "  simulated data: width of this sandwich",
    "log_likelihood_importance": "log p(x), importance sampling (bound)",
    "effective_sample_size_importance": "  effective sample size",
    "pareto_k_importance": "  Pareto k of its weights: at most 0.7 where it can be trusted",
    "elbo_density": "ELBO",
    "elbo_bound": "ELBO, as trained: a lower bound on it",
    "elbo_adversary": "ELBO under T: an estimate, no bound",
    "elbo_lower_semi_implicit": "ELBO, without T: from below",
    "elbo_upper_semi_implicit": "  from above",
    "elbo_width_semi_implicit": "  width of this sandwich",
    "kl_lower_semi_implicit": "  KL(q(z|x), p(z)): from below",
    "kl_upper_semi_implicit": "  KL(q(z|x), p(z)): from above",
    "reconstruction_error_density": "  reconstruction error",
    "reconstruction_error_bound": "  reconstruction error",
    "reconstruction_error_adversary": "  reconstruction error",
    "kl_density": "  KL(q(z|x), p(z))",
    "kl_bound": "  KL(q(z|x), p(z)), as trained: an upper bound on it",
    "kl_adversary": "  KL(q(z|x), p(z)) under T",
    "kl_fresh_adversary": "  KL(q(z|x), p(z)) under a fresh T",
    "kl_knn": "  KL(q(z|x), p(z)), k-NN",
    "adversary_loss_adversary": "loss of T",
    "adversary_loss_fresh_adversary": "loss of a fresh T on the same players",
    "optimality_gap_fresh_adversary": "  optimality gap of T",
    "kl_aggregated_posterior_knn": "KL(q(z), p(z)), k-NN",
    "kl_aggregated_posterior_knn_gaussian": "KL(q(z), p(z)), k-NN about a Gaussian",
    "mutual_information_knn": "I(x; z)",
    "active_units_moments": "active units",
    "accuracy_linear_probe": "accuracy of a linear classifier of codes",
    "posterior_variance_moments": "  variance of q(z|x), mean over latents",
}


def main(options: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Evaluates what `options` name of the run in `folder`."""
    all_of_them, chosen = estimators(options), None
    if options.estimators != "auto":
        chosen = [name.strip() for name in options.estimators.split(",")]
        for name in chosen:
            if name not in all_of_them:
                raise UserError(f"estimators={name!r}: must be 'auto', or among {', '.join(all_of_them)}")
    notes = []
    for name in names_of(options, folder):
        run, state, seeds = load(options, folder, name)
        adam = {"b1": run.config.optimizer.b1, "parallel": run.config.parallel}
        all_of_them["optimality"] = dataclasses.replace(all_of_them["optimality"], **adam)
        apply = {what: e for what, e in all_of_them.items() if not e.lacks(run.method)}
        for what in chosen or ():
            if what not in apply:
                raise UserError(f"estimators={what!r}: {name} {all_of_them[what].lacks(run.method)}")
        print(f"{name}: {', '.join(chosen or apply)}", file=sys.stderr)
        reports = []
        for what in chosen or apply:
            try:
                report = avb_jax.evaluate(
                    run.method,
                    state,
                    run.data,
                    [apply[what]],
                    num_seeds=seeds,
                    seed=options.seed,
                    workdir=folder,
                    name=name,
                )
            except UserError as error:
                if chosen:
                    raise
                notes.append(f"{name}: {what} is left out: {error}")
                continue
            reports.append(report)
            draw(report, folder / "figures", options)
            workdir.write_results(folder, {name: report.to_json()})  # each as it comes
        if not reports:
            notes.append(f"{name}: no estimator applies: it has no likelihood and no encoder; its samples are in figures/")
            continue
        whole = joined(name, reports)
        notes += whole.notes
        print(table(whole))
    print("".join(f"\n{note}" for note in dict.fromkeys(notes)))
    print(f"\nNumbers in {folder / 'results.json'}, per example in {folder / 'evaluation'}, figures in {folder / 'figures'}")


def estimators(options: ml_collections.ConfigDict) -> dict[str, Estimator]:
    """Every estimator with its settings from the config, by the name of the config's group.

    Raises:
      UserError: a setting out of range, with its group's name.
    """
    kinds = {
        "exact": evaluation.Exact,
        "elbo": evaluation.ELBO,
        "semi_implicit": evaluation.SemiImplicit,
        "optimality": evaluation.Optimality,
        "knn": evaluation.KNN,
        "moments": evaluation.Moments,
        "linear_probe": evaluation.LinearProbe,
        "quadrature": evaluation.Quadrature,
        "importance": evaluation.ImportanceSampling,
        "bdmc": evaluation.BDMC,
        "ais": evaluation.AIS,
    }
    made = {}
    for name in sorted(kinds, key=lambda name: name == "bdmc"):  # which takes all but how many from ais
        settings = {**options.ais, **options.bdmc} if name == "bdmc" else dict(options[name])
        try:
            made[name] = kinds[name](**settings)
        except UserError as error:
            raise UserError(f"{name}.{error}") from None
    return {name: made[name] for name in kinds}


def names_of(options: ml_collections.ConfigDict, folder: pathlib.Path) -> list[str]:
    """Which of the run's methods `options` name; all by default."""
    if options.method:
        return [part.strip() for part in options.method.split(",")]
    return build.method_names(build.run(folder, data_dir=options.data_dir).config)


def load(options: ml_collections.ConfigDict, folder: pathlib.Path, name: str) -> tuple[build.Run, State, int]:
    """A method of the run, its State with a leading axis of as many seeds as `options` say, and how many those are.

    Raises:
      UserError: no run there, no checkpoint in it, or a method or seeds that it does not have.
    """
    run = build.run(folder, name, options.data_dir)
    seeds = options.seeds or run.num_seeds
    if not 1 <= seeds <= run.num_seeds:
        raise UserError(f"seeds={seeds}: the run in {folder} has {run.num_seeds}")
    like = initial_state(run.method, run.data, run.config.seed, run.num_seeds)
    state = restore(folder, name, like, launch.step_of(str(options.step)))
    step = int(state.step[0])
    reached = max([step, *checkpoints.steps(folder / "checkpoints" / name)])
    finished = reached >= run.config.steps or workdir.ended(folder, name) == reached
    unfinished = "" if finished else f", not finished: its config has {run.config.steps}"
    print(f"{name}: {seeds} of {run.num_seeds} seeds at step {step}{unfinished}", flush=True)
    return run, jax.tree.map(lambda a: a[:seeds], state), seeds


def draw(report: Report, folder: pathlib.Path, options: ml_collections.ConfigDict) -> None:
    """Figures of what the last seed's estimators found per example."""
    found = report.results[-1]

    def write(name: str, figure) -> None:
        save(folder / f"{report.name}_{name}.png", figure, titled(folder.parent, report.name))

    if "ais" in found:
        finite = np.isfinite(found["ais"].log_weight).all(axis=1)
        if not finite.all():
            report.notes.append(
                f"{report.name}: ais: the figures leave out {np.sum(~finite)} of {len(finite)} examples, with chains of no "
                "finite weight"
            )
        if finite.any():
            of = jax.tree.map(lambda a: a[finite], found["ais"])
            write("ais_weights", plots.weights(of.log_weight, of.effective_sample_size))
            traces = {
                "effective sample size": of.effective_sample_size_path,
                "acceptance": of.acceptance,
                "step size": of.step_size,
            }
            beta = np.asarray(ais.schedule(options.ais.temperatures))[1:]
            write("ais_annealing", plots.annealing(traces, beta))
    if "moments" in found:
        activity = evaluation.moments.activity(found["moments"])
        variance = found["moments"].variance.mean(axis=0)
        write("latents", plots.latent_activity(activity, variance, evaluation.moments.ACTIVE))
    if "kl_by_both" in found:
        neighbours, under_t = found["kl_by_both"]
        finite = np.isfinite(under_t)
        if finite.any():
            write("adversary_calibration", plots.calibration(neighbours[finite], under_t[finite]))


def joined(name: str, reports: Sequence[Report]) -> Report:
    """Several reports of one method as one."""
    estimates = {key: number for report in reports for key, number in report.estimates.items()}
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return Report(name, estimates, notes)


def table(report: Report) -> str:
    """The numbers as text, in the order of `LABELS`."""
    lines = [f"\n{report.name + ', nats per example':44}{'mean':>9}{'seeds':>10}{'examples':>10}{'estimator':>11}{'of':>9}"]
    by_name = {f"{quantity}_{estimator}": number for (quantity, estimator), number in report.estimates.items()}
    for name, label in LABELS.items():
        if name not in by_name:
            continue
        number = by_name[name]
        errors = (number.seeds_error, number.examples_error, number.estimator_error)
        columns = [f"+-{error:.3g}" if error is not None else "" for error in errors]
        of = f"{number.examples:,}" if number.examples is not None else ""
        lines.append(f"{label:44}{number.mean:>9.3f}{columns[0]:>10}{columns[1]:>10}{columns[2]:>11}{of:>9}".rstrip())
    return "\n".join([*lines, "standard errors: over seeds, over the examples, and the estimator's own"])


if __name__ == "__main__":
    launch.run("evaluate", main)
