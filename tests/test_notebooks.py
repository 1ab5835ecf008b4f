"""Every notebook's cells, run in order at tiny size; what of their outputs is kept, and how they are set up."""

import json
import pathlib
import re

import matplotlib
import pytest

import avb_jax

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "which_posterior", "eight_schools", "celeba_tpu")
TINY = {
    "steps": 4,
    "checkpoint_every": 2,
    "log_every": 2,
    "batch_size": 8,
    "data.size": 16,
    "network.channels": 2,
    "network.adversary_channels": 2,
    "network.adversary_widths": (8,),
    "evaluation.images": 20,
    "latent_dim": 3,
}
KEPT = 500_000  # bytes of a notebook with its outputs


def cells(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NAMES)
def test_setup(name):
    """A badge, the repository's address in one place, the runtime's own JAX pinned, outputs that are small."""
    first, setup, *_ = ("".join(cell["source"]) for cell in cells(name))
    assert f"blob/main/notebooks/{name}.ipynb" in first
    assert setup.count("REPOSITORY = ") == 1
    assert 'for name in ("jax", "jaxlib")' in setup
    assert "REPOSITORY: give the repository's address" in setup
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < KEPT
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


def test_outputs_are_kept():
    """None is an error; those of the one that wants a TPU are of a CPU, on drawn faces, and smaller as JPEG."""
    for name in NAMES:
        outputs = [output for cell in cells(name) for output in cell.get("outputs", ())]
        assert any({"image/png", "image/jpeg"} & set(output.get("data", {})) for output in outputs), name
        assert not any(output["output_type"] == "error" for output in outputs), name
        assert not re.search(r"/(home|root|tmp|Users)/", json.dumps(outputs)), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_it_runs(name, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    (tmp_path / "avb_jax").symlink_to(pathlib.Path(avb_jax.__file__).parent)  # as in a clone, where it lies next to notebooks/
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {}
    for cell in cells(name):
        if cell["cell_type"] != "code":
            continue
        text = re.sub(r"^(STEPS|COUNT) = .*$", r"\1 = 20", "".join(cell["source"]), flags=re.M)
        exec(compile(text, f"{name}.ipynb", "exec"), names)
        if name == "celeba_tpu" and "config = " in text:
            names["config"].update_from_flattened_dict(TINY)
    if name == "celeba_tpu":
        figures = {path.name for path in (tmp_path / "notebooks" / "runs" / "celeba" / "figures").iterdir()}
        assert {"samples.png", "reconstructions.png", "interpolation.png", "neighbours.png"} <= figures
    if name == "quickstart":
        assert (tmp_path / "notebooks" / "codes.gif").exists()
