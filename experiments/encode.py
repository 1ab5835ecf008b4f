"""Codes of a run's data, for whatever comes next.

    python -m experiments.encode --workdir=RUN [--split=test|train] [--draws=1] [--out=FILE.npz]

Writes `z` [N, Z] ([N, draws, Z] of several draws), `mean` and `std` [N, Z] where the encoder knows q(z|x)'s, and `labels` [N]
where the data have them. RUN may be 'last', the latest in runs/.
"""

import pathlib

import jax
import numpy as np
from absl import flags, logging

from avb_jax import UserError
from avb_jax.evaluation import codes
from avb_jax.streams import stream
from experiments import launch, sample


def encode(
    run: pathlib.Path,
    path: pathlib.Path | None = None,
    split: str = "test",
    draws: int = 1,
    method: str = "",
    data_dir: str = "",
    seed: int = 0,
    step: int | str | None = None,
) -> pathlib.Path:
    """Writes the codes of a run's first seed, by default to RUN/codes/METHOD_SPLIT.npz; returns where they are.

    Raises:
      UserError: no run there, no checkpoint in it, a method without an encoder, or fewer than one draw.
    """
    if draws < 1:
        raise UserError(f"--draws={draws}: must be at least 1")
    found, state = sample.of_run(run, method, data_dir, step)
    if found.method.encode is None:
        raise UserError(f"--method={found.name}: has no encoder")
    stored, labels = getattr(found.data, split), getattr(found.data, f"{split}_labels")
    key = stream(jax.random.key(seed), "encode")
    arrays = codes(found.method, state, stored, key, found.data.binarize, draws, quiet=False)
    arrays["z"] = arrays["z"][:, 0] if draws == 1 else arrays["z"]
    arrays |= {} if labels is None else {"labels": np.asarray(labels)}
    path = path or run / "codes" / f"{found.name}_{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagValues:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, launch.workdir_help("encode"), values)
    flags.DEFINE_enum("split", "test", ["test", "train"], "Which examples.", values)
    flags.DEFINE_integer("draws", 1, "Of z for each.", flag_values=values)
    flags.DEFINE_string("method", "", "One of the run's methods; its first by default.", values)
    flags.DEFINE_string("out", "", "Where to write; RUN/codes/METHOD_SPLIT.npz by default.", values)
    flags.DEFINE_string("step", "", "Of the checkpoint; 'best', or the latest by default.", values)
    flags.DEFINE_integer("seed", 0, "Of what is drawn at random.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data is, if no longer where the run found it.", values)
    return values


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
    """The command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    launch.keep_programs()
    with launch.errors_in_one_line():
        run, out = launch.folder_of("encode", "", given.workdir), pathlib.Path(given.out) if given.out else None
        rest = given.split, given.draws, given.method, given.data_dir, given.seed, launch.step_of(given.step)
        print(encode(run, out, *rest))


if __name__ == "__main__":
    launch.command(__doc__, define, main)
