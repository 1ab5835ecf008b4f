"""Figures to files."""

import pathlib

import matplotlib.figure
from PIL import Image

from avb_jax import processes

DPI = 130


def save(path: pathlib.Path, figure: matplotlib.figure.Figure | Image.Image) -> pathlib.Path:
    """Writes a diagram or a picture, and makes its folder; returns the path. Of several processes the first one writes."""
    if not processes.first():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, Image.Image):
        figure.save(path)
    else:
        figure.savefig(path, dpi=DPI)
    return path
