"""The notebook's cells, run in order at tiny size."""

import json
import pathlib

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections' own
def test_celeba(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((NOTEBOOKS / "celeba.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for cell in cells:
        lines = [line for line in cell.splitlines() if not line.startswith("%")]
        exec(compile("\n".join(lines), "celeba.ipynb", "exec"), names)
        if "config = " in cell:
            names["config"].update_from_flattened_dict(TINY)
    figures = {path.name for path in (tmp_path / "runs" / "celeba" / "figures").iterdir()}
    assert {"samples.png", "reconstructions.png", "interpolation.png", "neighbours.png"} <= figures
