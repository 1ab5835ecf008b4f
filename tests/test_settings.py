"""What a setting is refused with."""

import pytest

from avb_jax import UserError
from avb_jax.settings import check_counts


def test_counts_and_none():
    check_counts(2, draws=2, images=None)
    with pytest.raises(UserError, match="images=1: must be at least 2"):
        check_counts(2, draws=2, images=1)
    with pytest.raises(UserError, match="draws='two': must be a number of at least 1"):
        check_counts(draws="two")
