"""The README's example runs as it stands."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_with_own_networks_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    images = np.asarray(names["images"])
    assert images.shape == (16, 4, 4)
    assert np.isfinite(images).all()


def test_files_it_shows_exist():
    for path in re.findall(r"\]\((docs/[^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
