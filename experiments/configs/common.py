"""How a training's config is made: the fields of `fields.py`, what an experiment changes, and what its variant does."""

import ml_collections

from avb_jax.types import UserError
from experiments.configs.fields import TRAINING, nested


def training(network: dict, evaluation: dict, variants: dict[str, dict], variant: str, **changes) -> ml_collections.ConfigDict:
    """A locked config: the defaults here, an experiment's `changes` to them, and those of one of its variants.

    Args:
      network: values of the network's family.
      evaluation: fields that the experiment's own evaluation reads.
      variants: by name, the fields that each changes.
      variant: one of them.
      changes: the experiment's own values, groups as dictionaries.

    Raises:
      UserError: no such variant.
    """
    config = ml_collections.ConfigDict({**nested(TRAINING), "evaluation": evaluation})
    config.network.update(network)
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name].update(value)
        else:
            config[name] = value
    config.update_from_flattened_dict(changes_of(variants, variant))
    return config.lock()


def changes_of(variants: dict[str, dict], variant: str) -> dict:
    """The fields that a config's variant changes.

    Raises:
      UserError: no such variant.
    """
    if variant not in variants:
        raise UserError(f"--config=...:{variant}: no such variant; there are {', '.join(v for v in variants if v)}")
    return variants[variant]
