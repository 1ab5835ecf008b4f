"""Data that the commands' tests share."""

import numpy as np
import pytest

from avb_jax.training.programs import Programs
from experiments import launch
from tests.data.test_dataset import idx_bytes


@pytest.fixture(autouse=True)
def trace_what_is_patched(monkeypatch):
    """Commands in this process keep no programs: a test may have put something else in a function's place."""
    monkeypatch.setattr(launch, "programs_of", lambda *_: Programs())


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """IDX files of 40 and 60 random 10x10 images."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 60)):
        images = rng.integers(0, 256, (count, 10, 10), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    return folder
