"""The README's examples, and those of `examples/`, run as they stand."""

import pathlib
import re
import runpy

import numpy as np
import pytest

import avb_jax

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.fixture
def short(monkeypatch):
    """Trainings of 50 steps."""
    fit = avb_jax.fit
    monkeypatch.setattr(avb_jax, "fit", lambda *arguments, **options: fit(*arguments, **{**options, "steps": 50}))


@pytest.mark.usefixtures("short")
def test_the_examples_of_the_readme():
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
        exec(compile(example, str(README), "exec"), names)
    for array, shape in (("images", (16, 4, 4)), ("draws", (1000, 2))):
        assert names[array].shape == shape
        assert np.isfinite(names[array]).all()
    assert np.isfinite(names["report"]["log_likelihood", "ais"].mean)


@pytest.mark.parametrize("name", ["own_method", "own_data"])
@pytest.mark.usefixtures("short")
def test_the_examples(name, capsys):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert "| quantity | estimator | mean |" in capsys.readouterr().out


def test_files_it_shows_exist():
    for page in (README, ROOT / "docs" / "results.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).is_file(), path
