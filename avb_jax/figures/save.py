"""Figures to files."""

import pathlib
from typing import TYPE_CHECKING

from PIL import Image

from avb_jax import processes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def save(path: pathlib.Path, figure: "Figure | Image.Image", title: str = "") -> pathlib.Path:
    """Writes a diagram, with a title over it where one is given, or a picture, and makes its folder; returns the path.

    Of several processes the first one writes.
    """
    if not processes.first():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, Image.Image):
        figure.save(path)
    else:
        if title:
            figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=DPI)
    return path
