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
    """Trainings of 50 steps on one device, fits of densities of 20 with small networks."""

    def shortened(fit, **short):
        return lambda *arguments, **options: fit(*arguments, **{**options, **short})

    monkeypatch.setattr(avb_jax, "fit", shortened(avb_jax.fit, steps=50, parallel="jit"))
    small = shortened(avb_jax.inference.fit, steps=20, widths=(8,), adversary_widths=(8,))
    monkeypatch.setattr(avb_jax.inference, "fit", small)


@pytest.mark.usefixtures("short")
def test_the_examples_of_the_readme(tmp_path, monkeypatch):
    names = {}
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    for example, most in zip(examples, (25, 10), strict=True):  # a model of one's own, a density of one's own
        assert sum(bool(line.strip()) for line in example.splitlines()) <= most
        exec(compile(example, str(README), "exec"), names)
    for array, shape in (("images", (16, 16)), ("draws", (1000, 2))):
        assert names[array].shape == shape
        assert np.isfinite(names[array]).all()
    assert np.isfinite(names["report"]["log_likelihood", "importance"].mean)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["own_model", "evaluating", pytest.param("density", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_examples_of_the_tutorials(name, tmp_path, monkeypatch):
    """Each page's own, in one go; that on evaluation goes on from the model's."""
    monkeypatch.chdir(tmp_path)
    pages, names = ["own_model", name] if name == "evaluating" else [name], {}
    for page in pages:
        for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(), re.S):
            exec(compile(example, page, "exec"), names)
    if name == "density":
        assert names["draws"]["eta"].shape == (1000, 8)


@pytest.mark.parametrize("name", ["own_method", "own_data"])
@pytest.mark.usefixtures("short")
@pytest.mark.slow
def test_the_examples(name, capsys):
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert "| quantity | estimator | mean |" in capsys.readouterr().out
