"""Arrays in, figures out."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

PRIOR_RADIUS = math.sqrt(-2.0 * math.log(0.05))  # the circle that holds 95% of a standard normal in the plane
_COLOURS = ("#4053d3", "#ddb310", "#b51d14", "#00b25d")


def tile(images: np.ndarray, columns: int, gap: int = 1, background: float = 0.5) -> np.ndarray:
    """Images [N, H, W] or [N, H, W, C] side by side in rows of `columns`, as one; pixels in [0, 1], clipped."""
    images = np.clip(np.asarray(images, np.float32), 0.0, 1.0)
    rows, (height, width) = -(-len(images) // columns), images.shape[1:3]
    size = rows * (height + gap) + gap, columns * (width + gap) + gap
    canvas = np.full((*size, *images.shape[3:]), background, np.float32)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_images(path: pathlib.Path, images: np.ndarray, columns: int, smallest: int = 640) -> None:
    """Writes `tile(images)` as a PNG, enlarged in whole steps to about `smallest` pixels across."""
    canvas = np.round(tile(images, columns) * 255.0).astype(np.uint8)
    canvas = canvas[..., 0] if canvas.ndim == 3 and canvas.shape[2] == 1 else canvas
    factor = max(1, round(smallest / canvas.shape[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.repeat(factor, axis=0).repeat(factor, axis=1)).save(path)


def interleave(originals: np.ndarray, reconstructions: np.ndarray, columns: int) -> np.ndarray:
    """Rows of originals, each above the row of its reconstructions."""
    rows = [part.reshape(-1, columns, *part.shape[1:]) for part in (np.asarray(originals), np.asarray(reconstructions))]
    return np.stack(rows, axis=1).reshape(-1, *originals.shape[1:])


def save_latent_codes(path: pathlib.Path, codes: dict[str, np.ndarray], labels: Sequence[str]) -> None:
    """Figure 3: one panel per model with its latent codes, a colour per data point, and the prior's 95% circle.

    Args:
      path: of the PNG.
      codes: by title, draws [points, draws, 2] from q(z|x).
      labels: one per data point.
    """
    figure = Figure(figsize=(4.2 * len(codes), 5.3), layout="constrained")
    panels = figure.subplots(1, len(codes), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (title, z) in zip(panels, codes.items(), strict=True):
        for i, (label, draws) in enumerate(zip(labels, z, strict=True)):
            panel.scatter(*draws.T, s=2, alpha=0.5, linewidths=0, color=_COLOURS[i % len(_COLOURS)], label=label)
        panel.add_patch(Circle((0, 0), PRIOR_RADIUS, fill=False, linestyle="--", color="0.3"))
        panel.set_title(title, fontsize=11)
        panel.set( xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="$z_1$")
    panels[0].set_ylabel("$z_2$")
    handles, names = panels[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=len(labels), markerscale=5, frameon=False,
        title="data point (pixel that is on); dashed: 95% of the prior",
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
