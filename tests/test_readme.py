"""The README's examples run as they stand."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_examples_with_own_networks_and_with_an_own_density_run():
    networks, density = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    for example in (networks, density):
        exec(compile(example, str(README), "exec"), names)
    for array, shape in (("images", (16, 4, 4)), ("draws", (1000, 2))):
        assert names[array].shape == shape
        assert np.isfinite(names[array]).all()


def test_files_it_shows_exist():
    for path in re.findall(r"\]\((docs/[^)]+)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
