"""Data that the commands' tests share."""

import numpy as np
import pytest

from tests.data.test_dataset import idx_bytes


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """IDX files of 40 and 60 random 10x10 images."""
    folder, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 60)):
        images = rng.integers(0, 256, (count, 10, 10), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    return folder
