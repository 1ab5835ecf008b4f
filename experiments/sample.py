"""A figure of images from any run.

python -m experiments.sample --workdir=RUN --figure=samples|reconstructions|interpolation|neighbours|latent_plane [--out=PNG]
"""

import pathlib

from absl import app, flags, logging

from avb_jax import build, figures
from avb_jax.fitting import restore
from avb_jax.training.loop import initial_state
from avb_jax.transforms import of_seed
from experiments import launch


def draw(
    run: pathlib.Path,
    figure: str,
    path: pathlib.Path | None = None,
    method: str = "",
    data_dir: str = "",
    seed: int = 0,
    step: int | str | None = None,
) -> pathlib.Path:
    """Writes a figure of a run's first seed, by default to RUN/figures/METHOD_FIGURE.png; returns where it is.

    Raises:
      UserError: no run there, no checkpoint in it, or a method that it does not have.
    """
    found = build.run(run, method or None, data_dir)
    like = initial_state(found.method, found.data, found.config.seed, found.num_seeds)
    state = of_seed(restore(run, found.name, like, step), 0)
    path = path or run / "figures" / f"{found.name}_{figure}.png"
    return figures.save(path, figures.draw(figure, found.method, state, found.data, seed))


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagValues:
    """The command's flags."""
    flags.DEFINE_enum("figure", "samples", list(figures.FIGURES), "What to draw.", values)
    flags.DEFINE_string("workdir", None, "The run's directory.", values, required=True)
    flags.DEFINE_string("method", "", "One of the run's methods; its first by default.", values)
    flags.DEFINE_string("out", "", "Where to write; RUN/figures/METHOD_FIGURE.png by default.", values)
    flags.DEFINE_string(
        "step", "", "Of the checkpoint; 'best': that of the best held-out bound; the latest by default.", values
    )
    flags.DEFINE_integer("seed", 0, "Of what is drawn at random.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data is, if no longer where the run found it.", values)
    return values


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """The command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    launch.keep_programs()
    with launch.errors_in_one_line():
        out = pathlib.Path(given.out) if given.out else None
        step = launch.step_of(given.step)
        print(draw(pathlib.Path(given.workdir), given.figure, out, given.method, given.data_dir, given.seed, step))


if __name__ == "__main__":
    define()
    app.run(main)
