"""Figures to files."""

import pathlib

import matplotlib.figure
from PIL import Image

DPI = 130


def save(path: pathlib.Path, figure: matplotlib.figure.Figure | Image.Image) -> pathlib.Path:
    """Writes a diagram or a picture, and makes its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, Image.Image):
        figure.save(path)
    else:
        figure.savefig(path, dpi=DPI)
    return path
