"""Trains methods with the same decoder on the same data and budget, evaluates them alike, and writes one table and one figure.

    python -m experiments.compare --suite=SUITE [--methods=avb_ac,vae,iaf] [--data_dir=DIR] [--workdir=DIR]
        [--steps=N | --seconds=N] [--seeds=N] [--seed=N] [--images=N] [--estimators=exact,importance]

An interrupted comparison continues with --workdir=last. Each run is a directory of its own in --workdir, which the other
commands understand, too.
"""

import json
import math
import pathlib

import jax
import numpy as np
from absl import flags, logging

import avb_jax
from avb_jax import Diverged, UserError, build
from avb_jax.evaluation.report import Estimate, cell, paired_difference
from avb_jax.figures import images as grids
from avb_jax.figures import named, plots, save
from avb_jax.streams import stream
from avb_jax.training import workdir
from avb_jax.transforms import of_seed
from experiments import evaluate, launch
from experiments.configs import evaluate as evaluation_config
from experiments.suites import SUITES, Suite

TINY = 4  # pixels a side
PILOT_BLOCKS = 4  # of a training whose speed gives the steps that --seconds stands for
CODES_SHOWN, EXAMPLES_SHOWN = 500, 5000  # codes per panel of latents: of each of a few examples, or one of each of many


def compare(
    suite: Suite,
    folder: pathlib.Path,
    names: list[str],
    *,
    data_dir: str = "",
    steps: int = 0,
    seconds: int = 0,
    seeds: int = 0,
    seed: int | None = None,
    images: int = 0,
    estimators: tuple[str, ...] = (),
) -> dict[str, dict]:
    """Trains and evaluates each method; writes `table.md`, `results.json` and `figure.png`, and returns the numbers by method.

    Args:
      suite: what is compared.
      folder: of the comparison.
      names: of the suite's entries.
      data_dir: where the data is; "" where the suite needs none.
      steps: of each training, or 0.
      seconds: of each training, or 0; the suite's own steps where both are 0.
      seeds: of each method, side by side; 0 is the suite's own number.
      seed: of each training's random numbers; None is the suite's own. Evaluations draw the same whatever it is.
      images: test images for annealed importance sampling; 0 is the suite's own number.
      estimators: of `experiments.evaluate`, by name, in the place of the suite's own.

    Raises:
      UserError: an entry that the suite does not have, both budgets, an unknown estimator, or whatever the experiment or the
        evaluation refuses.
    """
    for name in names:
        if name not in suite.entries:
            raise UserError(f"--methods={name}: must be among {', '.join(suite.entries)}")
    if steps and seconds:
        raise UserError(f"--steps={steps}, --seconds={seconds}: give one budget, not both")
    known = evaluate.estimators(evaluation_config.get_config())
    for name in estimators:
        if name not in known:
            raise UserError(f"--estimators={name}: must be among {', '.join(known)}")
    rows, per_example, panels_of = {}, {}, {}
    for name in names:
        print(f"\n== {name}", flush=True)
        entry, folder_of_run = suite.entries[name], folder / name
        config = suite.get_config(entry.variant)
        config.update_from_flattened_dict({**suite.fields, **entry.fields})
        config.data.dir, config.num_seeds = data_dir or config.data.dir, seeds or config.num_seeds
        config.seed = config.seed if seed is None else seed
        config.steps = steps or (affordable(config, folder_of_run, seconds) if seconds else config.steps)
        rows[name] = {"steps": config.steps, "seeds": config.num_seeds, "published": entry.published}
        try:
            (found,) = suite.main(config, folder_of_run).values()
        except Diverged as error:
            print(error, flush=True)
            rows[name]["diverged"] = str(error)
            continue
        options = evaluation_config.get_config()
        options.update_from_flattened_dict(suite.evaluation)
        options.ais.images = images or options.ais.images
        (method_name,) = build.method_names(config)
        run, state, _ = evaluate.load(options, folder_of_run, method_name)
        made = evaluate.estimators(options)
        asked = [made[what] for what in estimators or suite.estimators]
        report = avb_jax.evaluate(
            run.method,
            state,
            run.data,
            [estimator for estimator in asked if not estimator.lacks(run.method)],
            num_seeds=config.num_seeds,
            workdir=folder_of_run,
            name=method_name,
        )
        workdir.write_results(folder_of_run, {method_name: report.to_json()})
        found = {**found, **report.to_json()}
        rows[name]["steps"] = int(np.ravel(state.step)[0])  # fewer than asked for where `patience` ended it
        rows[name]["minutes"] = minutes(folder_of_run, method_name, rows[name]["steps"])
        rows[name]["under_t"] = run.method.adversary is not None
        rows[name] |= {quantity: found[quantity] for quantity in suite.columns if quantity in found}
        if suite.paired in report:
            per_example[name] = report[suite.paired].per_example
        panels_of[name] = panels(run.method, of_seed(state, 0), run.data)
    for name, values in per_example.items():
        against = suite.entries[name].reference or suite.reference
        reference = per_example.get(against)
        if reference is not None and name != against and values.shape == reference.shape:
            rows[name] |= {"difference": difference_json(paired_difference(values, reference)), "reference": against}
    text = table(rows, suite)
    (folder / "table.md").write_text(text + "\n")
    workdir.write_json(folder / "results.json", rows)
    save(folder / "figure.png", plots.comparison(panels_of), folder.name)
    print(f"\n{text}\n\nIn {folder}: table.md, results.json, figure.png, and a directory per method")
    return rows


def affordable(config, run: pathlib.Path, seconds: int) -> int:
    """How many steps fit in the seconds, by the speed of a short training; measured once, and kept for a run that continues."""
    path = run / "pilot.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["seconds"] == seconds:
            return kept["steps"]
        raise UserError(f"--seconds={seconds}: {run} holds a run of {kept['seconds']} seconds; use another --workdir")
    pilot = config.copy_and_resolve_references()
    pilot.unlock()
    pilot.steps, pilot.check_images, pilot.patience = PILOT_BLOCKS * config.log_every, 0, None
    data = build.dataset(pilot)
    ((name, method),) = build.methods(pilot, data.x_shape).items()
    launch.train(pilot, run / "pilot", method, data, name=f"{name} pilot", built=True)
    rate = _rate(run / "pilot", f"{name} pilot")
    steps = max(config.log_every, round(seconds * rate / (config.batch_size * config.num_seeds)))
    workdir.write_json(path, {"seconds": seconds, "examples_per_second": rate, "steps": steps})
    return steps


def minutes(run: pathlib.Path, name: str, steps: int) -> float:
    """Of so many steps of training, by the rates that the run has reported; without compiling and checkpoints."""
    config = json.loads((run / "config.json").read_text())
    return steps * config["batch_size"] * config["num_seeds"] / _rate(run, name) / 60.0


def _rate(run: pathlib.Path, name: str) -> float:
    """Examples per second over all blocks of one length, each of which took 1 / rate per example."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["examples_per_second"] for line in lines if line["method"] == name and line["examples_per_second"]]
    return len(rates) / sum(1.0 / rate for rate in rates) if rates else float("nan")


def difference_json(difference: Estimate) -> dict:
    """As `results.json` has it, with the one standard error that there is."""
    return {**difference.to_json(), "standard_error": difference.standard_error}


def table(rows: dict[str, dict], suite: Suite) -> str:
    """The comparison in Markdown; a dash where a method has no such number, and below why one is not finite."""
    columns = {quantity: title for quantity, title in suite.columns.items() if any(quantity in row for row in rows.values())}
    references = list(dict.fromkeys(row["reference"] for row in rows.values() if "reference" in row))
    if references:
        columns = {**columns, "difference": f"log p(x) above {' or '.join(references)}'s, paired"}
    published = any(row["published"] is not None for row in rows.values())
    titles = ["", *columns.values(), *(["published"] if published else []), "steps", "minutes"]
    lines, reasons = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)], []
    for name, row in rows.items():
        cells = [name + (" (diverged)" if "diverged" in row else "")]
        for quantity in columns:
            under_t = " (under T)" if quantity in ("elbo", "kl") and row.get("under_t") else ""
            against = f"{row['reference']}: " if quantity == "difference" and quantity in row and len(references) > 1 else ""
            cells.append(against + _cell(row[quantity], quantity == "difference") + under_t if quantity in row else "-")
            if "reason" in row.get(quantity, {}):
                reasons.append(f"- {name}, {columns[quantity]}: {row[quantity]['reason']}")
        cells += [f"{row['published']:.1f}" if row["published"] is not None else ""] if published else []
        taken = "" if math.isnan(row.get("minutes", math.nan)) else f"{row['minutes']:.2g}"
        lines.append("| " + " | ".join([*cells, f"{row['steps']:,}", taken]) + " |")
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _cell(number: dict, signed: bool = False) -> str:
    """A mean and its standard error, over seeds where there are several, else over examples."""
    mean = math.nan if number["mean"] is None else number["mean"]
    errors = number.get("standard_error"), number.get("examples_standard_error")
    return cell(Estimate(mean, errors[0], [], None, errors[1], None, "", None), signed)


def panels(method: avb_jax.Method, state: avb_jax.State, data) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
    """What the figure shows of a method, by title: grids of images [H, W, ...], or codes [N, 2] by data point or class."""
    samples = named.grid("samples", method, state, data)
    if max(data.x_shape) <= TINY:  # fewer of them, or nobody can see any
        samples = samples._replace(images=samples.images[:36], columns=6)
    found = {"samples": grids.tile(*samples[:2])}
    if method.encode is None:
        return found
    found["data above,\nreconstructions below"] = grids.tile(*named.grid("reconstructions", method, state, data)[:2])
    if method.prior.event_shape[0] == 2:
        found["latent plane"] = grids.tile(*named.grid("latent_plane", method, state, data)[:2])
        few = len(data.test) <= len(plots.COLOURS)
        test = data.test if few else data.test[:EXAMPLES_SHOWN]
        key, x = stream(jax.random.key(0), "panels"), data.prepare(stream(jax.random.key(0), "pixels"), test)
        z = np.asarray(method.encode(key, state, x, CODES_SHOWN if few else 1).z)  # [draws, examples, 2]
        if few:
            found["latent space"] = {f"point {i + 1}": codes for i, codes in enumerate(z.swapaxes(0, 1))}
        elif data.test_labels is None:
            found["latent space"] = {"": z[0]}
        else:
            labels = data.test_labels[: len(test)]
            found["latent space"] = {str(label): z[0][labels == label] for label in np.unique(labels)}
    return found


def listed() -> str:
    """The suites with their entries, for `--help`."""
    lines = ["suites, and their entries (in brackets: not by default):"]
    for name, suite in SUITES.items():
        entries = [*suite.methods, *(f"[{entry}]" for entry in suite.entries if entry not in suite.methods)]
        lines += [f"  {name:15} {suite.about}", *launch.wrap(" ".join(entries), 18)]
    return "\n".join(lines)


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagValues:
    """The command's flags."""
    flags.DEFINE_enum("suite", "synthetic", list(SUITES), "What to compare.", values)
    flags.DEFINE_string("methods", "", "Some of the suite's entries, with commas; those without brackets by default.", values)
    flags.DEFINE_string("data_dir", "", "Where the data is.", values)
    flags.DEFINE_string("workdir", None, launch.workdir_help("compare"), values)
    for name, text, default in (
        ("steps", "Steps of each training", "steps"),
        ("seconds", "Seconds of each training, in the place of steps", "steps"),
        ("seeds", "Of each method, side by side", "number"),
        ("images", "For annealed importance sampling", "number"),
    ):
        flags.DEFINE_integer(name, 0, f"{text}; the suite's own {default} by default.", 0, flag_values=values)
    flags.DEFINE_integer("seed", None, "Of each training's random numbers; the suite's own by default.", 0, flag_values=values)
    flags.DEFINE_string("estimators", "", "Of experiments.evaluate, with commas; the suite's own by default.", values)
    return values


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """The command."""
    del argv
    logging.set_verbosity(logging.FATAL)  # as `launch.start`
    launch.keep_programs()
    suite = SUITES[given.suite]
    names = [name.strip() for name in given.methods.split(",")] if given.methods else list(suite.methods)
    with launch.errors_in_one_line():
        folder = launch.folder_of("compare", given.suite, given.workdir)
        with launch.errors_in_one_line("" if given.workdir else f"; --workdir={folder} goes on with it"):
            compare(
                suite,
                folder,
                names,
                data_dir=given.data_dir,
                steps=given.steps,
                seconds=given.seconds,
                seeds=given.seeds,
                seed=given.seed,
                images=given.images,
                estimators=tuple(name.strip() for name in given.estimators.split(",") if name.strip()),
            )


if __name__ == "__main__":
    launch.command(f"{__doc__}\n{listed()}", define, main)
