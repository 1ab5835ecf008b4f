"""States on disk. The only place that knows Orbax."""

import pathlib

import jax
from orbax.checkpoint import v1 as ocp

from avb_jax.types import State, UserError


def open_folder(folder: pathlib.Path, keep: int = 2) -> ocp.training.Checkpointer:
    """A checkpointer for `save` and `restore` in this folder, which keeps the latest `keep` states; close it after use."""
    policy = ocp.training.preservation_policies.LatestN(keep)
    return ocp.training.Checkpointer(folder.absolute(), preservation_policy=policy, cleanup_tmp_directories=True)


def save(checkpointer: ocp.training.Checkpointer, step: int, state: State) -> None:
    """Writes the State of `step`, whole or not at all; a state that is there already stays."""
    if step not in [checkpoint.step for checkpoint in checkpointer.checkpoints]:
        checkpointer.save(step, state)


def restore(checkpointer: ocp.training.Checkpointer, like: State) -> State | None:
    """The latest State, shaped and placed like `like`; None where the folder holds none.

    Raises:
      UserError: what is there does not have the shapes of `like`.
    """
    if checkpointer.latest is None:
        return None
    step = checkpointer.latest.step
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    try:
        return checkpointer.load(step, abstract)
    except (ValueError, KeyError, TypeError) as error:  # Orbax's message holds both trees, thousands of characters
        raise UserError(
            f"{checkpointer.directory}: the state of step {step} does not fit the model and optimisers, or is of avb_jax 0.1, "
            "whose checkpoints this version does not read; use another workdir"
        ) from error
