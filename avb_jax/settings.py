"""What methods and estimators say of a setting that they cannot have."""

import numpy as np

from avb_jax.types import UserError


def at_least(value: float, low: float) -> tuple:
    """A number of no less, for `check_settings`."""
    number = isinstance(value, int | float | np.number) or getattr(value, "ndim", None) == 0
    return value, number and value >= low, f"at least {low}" if number else f"a number of at least {low}"


def check_settings(**settings: tuple) -> None:
    """Refuses the first setting, each given as (value, whether it holds, remedy), that does not hold.

    Raises:
      UserError: with its name, its value and the remedy.
    """
    for name, (value, holds, remedy) in settings.items():
        if not holds:
            raise UserError(f"{name}={value!r}: must be {remedy}")


def check_counts(least: int = 1, **counts: int | None) -> None:
    """Refuses the first count below `least`; None is none.

    Raises:
      UserError: as `check_settings`.
    """
    check_settings(**{name: at_least(count, least) for name, count in counts.items() if count is not None})
