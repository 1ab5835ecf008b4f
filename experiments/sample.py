"""Figures of any run, or as many samples as you like as files.

    python -m experiments.sample --workdir=RUN --figure=FIGURE [--out=PNG]
    python -m experiments.sample --workdir=RUN --count=N [--out=FOLDER|FILE.npz]

RUN may be 'last', the latest in runs/.
"""

import pathlib

import jax
import numpy as np
from absl import flags, logging
from PIL import Image

from avb_jax import State, UserError, build, figures
from avb_jax.evaluation.samples import draw_samples
from avb_jax.fitting import restore
from avb_jax.streams import stream
from avb_jax.training.callbacks import Progress
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
    found, state = of_run(run, method, data_dir, step)
    path = path or run / "figures" / f"{found.name}_{figure}.png"
    return figures.save(path, figures.draw(figure, found.method, state, found.data, seed, figures.titled(run, found.name)))


def of_run(run: pathlib.Path, method: str = "", data_dir: str = "", step: int | str | None = None) -> tuple[build.Run, State]:
    """A method of a run, and its first seed's State.

    Raises:
      UserError: no run there, no checkpoint in it, or a method that it does not have.
    """
    found = build.run(run, method or None, data_dir)
    like = initial_state(found.method, found.data, found.config.seed, found.num_seeds)
    return found, of_seed(restore(run, found.name, like, step), 0)


def write(
    run: pathlib.Path,
    count: int,
    path: pathlib.Path | None = None,
    method: str = "",
    data_dir: str = "",
    seed: int = 0,
    step: int | str | None = None,
) -> pathlib.Path:
    """Writes samples of a run's first seed: 000000.png ... in a folder, RUN/samples/METHOD by default; or `x` in an .npz file.

    They are what `Method.sample` gives: means of p(x|z), or draws of models of pixels.

    Raises:
      UserError: as `draw`; or x that is no image, which an .npz file can hold.
    """
    if count < 1:
        raise UserError(f"--count={count}: must be at least 1")
    found, state = of_run(run, method, data_dir, step)
    path, shape = path or run / "samples" / found.name, found.data.x_shape
    x = draw_samples(stream(jax.random.key(seed), "samples"), found.method, state, count)
    if path.suffix == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, x=x)
        return path
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise UserError(f"--out={path}: x of shape {shape} is no image; write to a file that ends in .npz")
    path.mkdir(parents=True, exist_ok=True)
    progress = Progress("writing", count, 0, unit="image")
    for i, image in enumerate(np.round(255.0 * np.clip(x, 0.0, 1.0)).astype(np.uint8)):
        Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(path / f"{i:06}.png")
        if (i + 1) % 1000 == 0 or i + 1 == count:
            progress.update(i + 1, "")
    progress.close()
    return path


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagValues:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, launch.workdir_help("sample"), values)
    flags.DEFINE_enum("figure", "samples", list(figures.FIGURES), "What to draw.", values)
    flags.DEFINE_integer("count", 0, "How many samples to write as files, in the place of a figure.", flag_values=values)
    flags.DEFINE_string("method", "", "One of the run's methods; its first by default.", values)
    flags.DEFINE_string("out", "", "Where to write; in the run's directory by default.", values)
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
        run = launch.folder_of("sample", "", given.workdir)
        rest = (pathlib.Path(given.out) if given.out else None, given.method, given.data_dir, given.seed)
        step = launch.step_of(given.step)
        print(write(run, given.count, *rest, step) if given.count else draw(run, given.figure, *rest, step))


if __name__ == "__main__":
    launch.command(__doc__, define, main)
