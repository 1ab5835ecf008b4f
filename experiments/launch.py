"""What every experiment's command line shares: flags, the run directory, and errors told in one line."""

import pathlib
import sys
from collections.abc import Callable

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from avb_jax import Interrupted, UserError, fit, workdir
from avb_jax.data import Dataset
from avb_jax.types import State
from experiments import build

CONFIGS = pathlib.Path(__file__).parent / "configs"


def run(name: str, main: Callable[[ml_collections.ConfigDict, pathlib.Path], None]) -> None:
    """Parses `--config=FILE[:variant]`, `--config.field=value` and `--workdir=DIR`, and calls main(config, workdir).

    A `UserError` ends the program with its one line and status 2; an interruption with status 130.
    """
    default = str(CONFIGS / f"{name}.py")
    config_flags.DEFINE_config_file("config", default, "FILE[:variant]; --config.field=value changes a field.")
    flags.DEFINE_string("workdir", None, f"Where the run is written and resumed from; runs/{name}[-variant] by default.")

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (UserError, flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            _fail(_first_line(error))

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            _fail(f"{argv[1]!r}: not a flag; write --config=FILE[:variant], --config.field=value or --workdir=DIR")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save
        config = flags.FLAGS.config
        variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(".py:")[2]
        folder = flags.FLAGS.workdir or "-".join(part for part in (f"runs/{name}", variant) if part)
        try:
            main(config, pathlib.Path(folder))
        except UserError as error:
            _fail(str(error))
        except Interrupted as error:
            print(f"\n{error}", file=sys.stderr)
            sys.exit(130)

    app.run(start, flags_parser=parse)


def train(
    config: ml_collections.ConfigDict, folder: pathlib.Path, name: str, dataset: Dataset, *,
    on_checkpoint: Callable[[int, State], None] | None = None,
) -> tuple:
    """Trains (or resumes) one of the config's methods; returns the method, its model and the final State [S, ...]."""
    method, model = build.methods(config)[name], build.model(config, name, dataset.x_shape)
    state = fit(
        method, model, build.optimizers(config), dataset, steps=config.steps, batch_size=config.batch_size, seed=config.seed,
        num_seeds=config.num_seeds, mode=config.parallel, log_every=config.log_every,
        checkpoint_every=config.checkpoint_every, workdir=folder, name=name, on_checkpoint=on_checkpoint,
    )  # fmt: skip
    return method, model, state


def claim(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Makes the run directory this config's; refuses one of another config."""
    workdir.claim(folder, config.to_dict())


def variant_of(variants: dict[str, dict], variant: str) -> dict:
    """The fields that a config's variant changes.

    Raises:
      UserError: no such variant.
    """
    if variant not in variants:
        raise UserError(f"--config=...:{variant}: no such variant; there are {', '.join(v for v in variants if v)}")
    return variants[variant]


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
