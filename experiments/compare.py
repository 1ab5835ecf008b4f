"""Trains several methods with the same decoder on the same data, evaluates them on the same test images, and writes one table.

    python -m experiments.compare --suite=mnist --data_dir=DIR [--workdir=DIR] [--runs=avb32_ac,vae32] [--steps=N] [--images=N]

An interrupted comparison continues: each run is a directory of its own in --workdir, which the other commands understand too.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import app, flags, logging
from PIL import Image

from avb_jax import Interrupted, UserError, plotting, workdir
from experiments import evaluate, mnist
from experiments.configs import evaluate as evaluation
from experiments.configs import mnist as mnist_config


class Suite(NamedTuple):
    """What is compared."""

    main: Callable[[ml_collections.ConfigDict, pathlib.Path], None]  # the experiment
    get_config: Callable[[str], ml_collections.ConfigDict]
    runs: dict[str, float | None]  # a config's variants, with the published log p(x) where there is one
    reference: str  # the run that the others are paired with
    evaluation: dict  # fields of experiments/configs/evaluate.py


SUITES = {
    # Published: Mescheder, Nowozin & Geiger (2017), the later version, table of log-likelihoods by AIS; 2.5 million steps.
    "mnist": Suite(
        mnist.main, mnist_config.get_config,
        {"avb32_ac": -80.2, "vae32": -81.9, "avb8_ac": -89.6, "avb8": -91.2, "vae8": -90.9}, "vae32",
        {
            "estimators": "elbo,importance,bdmc,ais", "ais.images": 200, "ais.chains": 8, "ais.temperatures": 250,
            "ais.chunk": 20, "elbo.images": 2000,
        },
    ),
}  # fmt: skip


def compare(
    suite: Suite, folder: pathlib.Path, data_dir: str, runs: list[str], steps: int = 0, images: int = 0
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """Trains and evaluates each run; writes `table.md`, `results.json` and `samples.png`, and returns the numbers by run.

    Raises:
      UserError: a run that the suite does not have, or whatever the experiment or the evaluation refuses.
    """
    for run in runs:
        if run not in suite.runs:
            raise UserError(f"--runs={run}: must be among {', '.join(suite.runs)}")
    rows, per_example, samples = {}, {}, {}
    for run in runs:
        print(f"\n== {run}", flush=True)
        config = suite.get_config(run)
        config.data.dir, config.steps = data_dir, steps or config.steps
        suite.main(config, folder / run)
        options = evaluation.get_config()
        options.update_from_flattened_dict(suite.evaluation)
        options.ais.images = images or options.ais.images
        evaluate.main(options, folder / run)
        results = json.loads((folder / run / "results.json").read_text())
        (name, found), *_ = results.items()
        rows[run] = {
            "steps": config.steps, "minutes": minutes(folder / run), "published": suite.runs[run],
            **{quantity: number["mean"] for quantity, number in found.items()},
            "log_likelihood_ais_error": found["log_likelihood_ais"]["examples_standard_error"],
        }  # fmt: skip
        blocks = sorted((folder / run / "evaluation" / f"{name}-0" / "ais").glob("*.npz"))
        per_example[run] = np.concatenate([np.load(block)["log_likelihood"] for block in blocks])
        with Image.open(folder / run / "figures" / f"{name}_samples_{config.steps:06}.png") as image:
            samples[run] = np.asarray(image)
    for run, values in per_example.items():
        if suite.reference in per_example and run != suite.reference:
            difference = values - per_example[suite.reference]
            error = difference.std(ddof=1) / np.sqrt(len(difference))
            rows[run] |= {"difference": float(difference.mean()), "difference_error": float(error)}
    text = table(rows, suite.reference, min(map(len, per_example.values())))
    (folder / "table.md").write_text(text + "\n")
    workdir.write_json(folder / "results.json", rows)
    plotting.save_titled(folder / "samples.png", samples)
    print(f"\n{text}\n\nIn {folder}: table.md, results.json, samples.png, and a directory per run")
    return rows


def table(rows: dict[str, dict[str, float | None]], reference: str, images: int) -> str:
    """The comparison in Markdown."""
    lines = [
        f"| nats per test image | log p(x), AIS ({images} images) | above {reference}, paired | BDMC width | "
        "importance bound | ELBO | KL term | published | steps | minutes |",
        "| --- |" + " ---: |" * 9,
    ]
    for run, row in rows.items():
        told = "" if run.startswith("vae") else " (under T)"
        paired = f"{row['difference']:+.2f} ± {row['difference_error']:.2f}" if "difference" in row else ""
        published = f"{row['published']:.1f}" if row["published"] is not None else ""
        lines.append(
            f"| {run} | {row['log_likelihood_ais']:.2f} ± {row['log_likelihood_ais_error']:.2f} | {paired} | "
            f"{row['bdmc_width']:.2f} | {row['log_likelihood_importance']:.2f} | {row['elbo']:.2f}{told} | "
            f"{row['kl']:.2f}{told} | {published} | {row['steps']:,} | {row['minutes']:.0f} |"
        )
    return "\n".join(lines)


def minutes(run: pathlib.Path) -> float:
    """Of training, by the rates that the run has told; without compiling and checkpoints."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    rates = [line["examples_per_second"] for line in lines if line["examples_per_second"]]
    return config["steps"] * config["batch_size"] / np.mean(rates) / 60.0 if rates else float("nan")


def main(argv: list[str]) -> None:
    """The command; a `UserError` ends it with its one line and status 2."""
    del argv
    given = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    suite = SUITES[given.suite]
    runs = [run.strip() for run in given.runs.split(",")] if given.runs else list(suite.runs)
    folder = pathlib.Path(given.workdir or f"runs/compare-{given.suite}")
    try:
        compare(suite, folder, given.data_dir, runs, given.steps, given.images)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{str(error) or 'interrupted'}; the same command continues the comparison", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "mnist", list(SUITES), "What to compare.")
    flags.DEFINE_string("data_dir", "", "Where the data is.")
    flags.DEFINE_string("workdir", None, "Where the runs go; runs/compare-SUITE by default.")
    flags.DEFINE_string("runs", "", "Some of the suite's runs, with commas; all by default.")
    flags.DEFINE_integer("steps", 0, "Of training, for every run; each config's own by default.")
    flags.DEFINE_integer("images", 0, "Test images for annealed importance sampling; the suite's own number by default.")
    app.run(main)
