"""Trains methods with the same decoder on the same data and budget, evaluates them alike, and writes one table and one figure.

    python -m experiments.compare --suite=synthetic|digits|mnist|faces [--methods=avb_ac,vae,iaf] [--data_dir=DIR]
        [--workdir=DIR] [--steps=N | --seconds=N] [--seeds=N] [--images=N]

An interrupted comparison continues: each run is a directory of its own in --workdir, which the other commands understand too.
"""

import json
import math
import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from avb_jax import Diverged, UserError, plotting, workdir
from avb_jax.evaluation import moments
from avb_jax.streams import stream
from experiments import build, evaluate, launch, pictures
from experiments.configs import evaluate as evaluation
from experiments.estimators import Subject, missing
from experiments.suites import SUITES, Suite

PILOT_BLOCKS = 4  # of a training whose speed tells how many steps --seconds stands for
SHOWN = 500  # codes per panel of latents


def compare(
    suite: Suite, folder: pathlib.Path, names: list[str], *, data_dir: str = "", steps: int = 0, seconds: int = 0,
    seeds: int = 0, images: int = 0,
) -> dict[str, dict]:  # fmt: skip
    """Trains and evaluates each method; writes `table.md`, `results.json` and `figure.png`, and returns the numbers by method.

    Args:
      suite: what is compared.
      folder: of the comparison.
      names: of the suite's entries.
      data_dir: where the data is; "" where the suite needs none.
      steps: of each training, or 0.
      seconds: of each training, or 0; the suite's own steps where both are 0.
      seeds: of each method, side by side; 0 is the suite's own number.
      images: test images for annealed importance sampling; 0 is the suite's own number.

    Raises:
      UserError: an entry that the suite does not have, both budgets, or whatever the experiment or the evaluation refuses.
    """
    for name in names:
        if name not in suite.entries:
            raise UserError(f"--methods={name}: must be among {', '.join(suite.entries)}")
    if steps and seconds:
        raise UserError(f"--steps={steps}, --seconds={seconds}: give one budget, not both")
    rows, per_example, subjects = {}, {}, {}
    for name in names:
        print(f"\n== {name}", flush=True)
        entry, run = suite.entries[name], folder / name
        config = suite.get_config(entry.variant)
        config.update_from_flattened_dict({**suite.fields, **entry.fields})
        config.data.dir, config.num_seeds = data_dir or config.data.dir, seeds or config.num_seeds
        config.steps = steps or (affordable(config, run, seconds) if seconds else config.steps)
        rows[name] = {"steps": config.steps, "seeds": config.num_seeds, "published": entry.published}
        try:
            suite.main(config, run)
        except Diverged as error:
            print(error, flush=True)
            rows[name]["diverged"] = str(error)
            continue
        options = evaluation.get_config()
        options.update_from_flattened_dict(suite.evaluation)
        options.ais.images = images or options.ais.images
        ((method, (subject, *_)),) = evaluate.load(options, run, []).items()
        chosen = [what for what in suite.estimators if what not in missing(subject)]
        if chosen:
            options.estimators = ",".join(chosen)
            evaluate.main(options, run)
        (found,) = json.loads((run / "results.json").read_text()).values()
        rows[name] |= {"minutes": minutes(run, method), "under_t": subject.model.networks.adversary is not None}
        rows[name] |= {quantity: found[quantity] for quantity in suite.columns if quantity in found}
        if "log_likelihood_ais" in found:
            count = found["log_likelihood_ais"]["examples"]
            per_example[name] = np.stack([_per_example(run, method, seed, count) for seed in range(config.num_seeds)])
        subjects[name] = subject
    reference = per_example.get(suite.reference)
    for name, values in per_example.items():
        if reference is not None and name != suite.reference and values.shape == reference.shape:
            rows[name]["difference"] = paired(values, reference)
    text = table(rows, suite)
    (folder / "table.md").write_text(text + "\n")
    workdir.write_json(folder / "results.json", rows)
    plotting.save_comparison(folder / "figure.png", {name: panels(subject) for name, subject in subjects.items()})
    print(f"\n{text}\n\nIn {folder}: table.md, results.json, figure.png, and a directory per method")
    return rows


def affordable(config, run: pathlib.Path, seconds: int) -> int:
    """How many steps fit in the seconds, by the speed of a short training; told once, and kept for when the run continues."""
    path = run / "pilot.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["seconds"] == seconds:
            return kept["steps"]
        raise UserError(f"--seconds={seconds}: {run} holds a run of {kept['seconds']} seconds; use another --workdir")
    pilot = config.copy_and_resolve_references()
    pilot.unlock()
    pilot.steps, pilot.check_images = PILOT_BLOCKS * config.log_every, 0
    dataset = build.dataset(pilot)
    ((name, method),) = build.methods(pilot).items()
    launch.train(pilot, run / "pilot", f"{name} pilot", method, build.model(pilot, name, dataset.x_shape), dataset)
    rate = _rate(run / "pilot", f"{name} pilot")
    steps = max(config.log_every, round(seconds * rate / (config.batch_size * config.num_seeds)))
    workdir.write_json(path, {"seconds": seconds, "examples_per_second": rate, "steps": steps})
    return steps


def minutes(run: pathlib.Path, name: str) -> float:
    """Of training, by the rates that the run has told; without compiling and checkpoints."""
    config = json.loads((run / "config.json").read_text())
    return config["steps"] * config["batch_size"] * config["num_seeds"] / _rate(run, name) / 60.0


def _rate(run: pathlib.Path, name: str) -> float:
    """Examples per second over all blocks of one length, each of which took 1 / rate per example."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["examples_per_second"] for line in lines if line["method"] == name and line["examples_per_second"]]
    return len(rates) / sum(1.0 / rate for rate in rates) if rates else float("nan")


def _per_example(run: pathlib.Path, method: str, seed: int, count: int) -> np.ndarray:
    """Log p(x) by annealed importance sampling of the first `count` test images; more may be kept, of an earlier evaluation."""
    blocks = sorted((run / "evaluation" / f"{method}-{seed}" / "ais").glob("*.npz"))
    return np.concatenate([np.load(block)["log_likelihood"] for block in blocks])[:count]


def paired(values: np.ndarray, reference: np.ndarray) -> dict:
    """Mean of [seeds, images] less the reference's, and its standard error: over seeds where there are several, else images.

    As `workdir.summary`, without a standard error but with a reason where not all are finite.
    """
    with np.errstate(invalid="ignore"):  # where both are minus infinity
        difference = np.subtract(values, reference, dtype=np.float64)
    mean, reason = workdir.mean(difference.ravel())
    if reason:
        return {"mean": mean, "standard_error": None, "reason": reason}
    independent = difference.mean(axis=1) if len(difference) > 1 else difference[0]
    return {"mean": mean, "standard_error": float(independent.std(ddof=1) / np.sqrt(len(independent)))}


def table(rows: dict[str, dict], suite: Suite) -> str:
    """The comparison in Markdown; a dash where a method has no such number, and below why one is not finite."""
    columns = {quantity: title for quantity, title in suite.columns.items() if any(quantity in row for row in rows.values())}
    if any("difference" in row for row in rows.values()):
        columns = {**columns, "difference": f"log p(x) above {suite.reference}'s, paired"}
    published = any(row["published"] is not None for row in rows.values())
    titles = ["", *columns.values(), *(["published"] if published else []), "steps", "minutes"]
    lines, reasons = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)], []
    for name, row in rows.items():
        cells = [name + (" (diverged)" if "diverged" in row else "")]
        for quantity in columns:
            told = " (under T)" if quantity in ("elbo", "kl") and row.get("under_t") else ""
            cells.append(_cell(row[quantity], quantity == "difference") + told if quantity in row else "-")
            if "reason" in row.get(quantity, {}):
                reasons.append(f"- {name}, {columns[quantity]}: {row[quantity]['reason']}")
        cells += [f"{row['published']:.1f}" if row["published"] is not None else ""] if published else []
        taken = "" if math.isnan(row.get("minutes", math.nan)) else f"{row['minutes']:.2g}"
        lines.append("| " + " | ".join([*cells, f"{row['steps']:,}", taken]) + " |")
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _cell(number: dict, signed: bool = False) -> str:
    """A mean and its standard error, over seeds where there are several, else over examples."""
    if number["mean"] is None or not math.isfinite(number["mean"]):
        return "not finite"
    error = number.get("standard_error") or number.get("examples_standard_error")
    digits = 1 if abs(number["mean"]) >= 1000 else 2 if abs(number["mean"]) >= 10 else 3
    mean = f"{number['mean']:{'+' if signed else ''},.{digits}f}"
    return f"{mean} ± {error:.{digits}f}" if error is not None else mean


def panels(subject: Subject) -> dict[str, np.ndarray]:
    """What the figure shows of a method, by title: grids of images [H, W, ...], or codes [points, draws, 2]."""
    key = stream(jax.random.key(0), "panels")
    arguments = subject.state, subject.method, subject.model, subject.dataset
    drawn, columns = pictures.samples(stream(key, "samples"), *arguments)
    found = {"samples": plotting.tile(np.asarray(drawn), columns)}
    if subject.model.networks.encoder is None:
        return found
    rebuilt, columns = pictures.reconstructions(stream(key, "reconstructions"), *arguments)
    found["reconstructions"] = plotting.tile(rebuilt, columns)
    if subject.model.prior.dim == 2:
        test = subject.dataset.test[:SHOWN]
        few = len(test) <= len(plotting.COLOURS)
        draws = SHOWN if few else 1
        z = moments.posterior_draws(
            key, subject.state, test, model=subject.model, binarize=subject.dataset.binarize, draws=draws
        ).z
        found["latent space"] = np.asarray(z if few else z.reshape(1, -1, 2))
    return found


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    suite = SUITES[given.suite]
    names = [name.strip() for name in given.methods.split(",")] if given.methods else list(suite.methods)
    folder = pathlib.Path(given.workdir or f"runs/compare-{given.suite}")
    with launch.errors_in_one_line():
        compare(
            suite, folder, names, data_dir=given.data_dir, steps=given.steps, seconds=given.seconds, seeds=given.seeds,
            images=given.images,
        )


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "synthetic", list(SUITES), "What to compare.")
    flags.DEFINE_string("methods", "", "Some of the suite's entries, with commas; see experiments/suites.py.")
    flags.DEFINE_string("data_dir", "", "Where the data is.")
    flags.DEFINE_string("workdir", None, "Where the runs go; runs/compare-SUITE by default.")
    for budget, text in (("steps", "Steps of each training"), ("seconds", "Seconds of each training, in the place of steps")):
        flags.DEFINE_integer(budget, 0, f"{text}; the suite's own steps by default.", lower_bound=0)
    flags.DEFINE_integer("seeds", 0, "Of each method, side by side; the suite's own number by default.", lower_bound=0)
    flags.DEFINE_integer("images", 0, "For annealed importance sampling; the suite's own number by default.", lower_bound=0)
    app.run(main)
