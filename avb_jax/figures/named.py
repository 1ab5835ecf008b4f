"""Figures of any run by their names, at the end or at each checkpoint."""

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from avb_jax.data.dataset import Dataset, to_pixels
from avb_jax.figures import conditional, images
from avb_jax.figures.save import save
from avb_jax.method import Method
from avb_jax.streams import stream
from avb_jax.training.callbacks import Callback
from avb_jax.types import Array, State, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CODES = 5000  # test examples in the plane of codes
GRIDS: dict[str, Callable] = {
    "samples": images.samples,
    "reconstructions": images.reconstructions,
    "interpolation": images.interpolation,
    "spherical": functools.partial(images.interpolation, spherical=True),
    "traversals": images.traversals,
    "neighbours": images.neighbours,
    "latent_plane": images.latent_plane,
    "conditional": conditional.of_classes,
    "inpainting": conditional.inpainting,
}
FIGURES = (*GRIDS, "codes")
OF_CODES = ("reconstructions", "interpolation", "spherical", "traversals", "codes")
AT_CHECKPOINTS = ("samples", "reconstructions", "interpolation")
MOVING = ("latent_plane", "codes")  # which a film shows best
FRAMES_PER_SECOND = 4


def lacks(figure: str, method: Method) -> str:
    """What keeps a method from having a figure; empty where nothing does."""
    latents = 0 if method.prior is None else method.prior.event_shape[0]
    if figure in OF_CODES and method.encode is None:
        return f"figure={figure!r}: {method.name} has no encoder; take samples or neighbours"
    if figure == "latent_plane" and latents != 2:
        return f"figure='latent_plane': {method.name} has {latents} latents; it takes two"
    return ""


def grid(figure: str, method: Method, state: State, data: Dataset, seed: int = 0) -> images.Grid:
    """One of `GRIDS` of a run, whose State has no axis of seeds.

    Raises:
      UserError: no such figure, one of codes and a method without an encoder, or one of a plane and other than two latents.
    """
    if figure not in FIGURES:
        raise UserError(f"figure={figure!r}: must be one of {', '.join(FIGURES)}")
    if lacking := lacks(figure, method):
        raise UserError(lacking)
    return GRIDS[figure](stream(jax.random.key(seed), figure), method, state, data)


def draw(figure: str, method: Method, state: State, data: Dataset, seed: int = 0, name: str = "") -> "Image.Image | Figure":
    """One of `FIGURES` as a picture; small images are enlarged. Its title is `name`, by default the method's, and the step.

    Raises:
      UserError: as `grid`.
    """
    title = f"{name or method.name}, step {int(state.step):,}"
    if figure == "codes":
        if lacking := lacks(figure, method):
            raise UserError(lacking)
        return codes(stream(jax.random.key(seed), figure), method, state, data, title)
    found = grid(figure, method, state, data, seed)
    return images.to_image(found, f"{title}: {found.caption}")


def codes(key: Array, method: Method, state: State, data: Dataset, title: str) -> "Figure":
    """A code of each test example, coloured by its class where that is known; of more than two latents, two directions.

    These are the codes' first two principal components. Of a few examples there are many codes each, and a colour for each.
    """
    from avb_jax.figures import plots  # where something is drawn, for Matplotlib takes a fifth of all imports

    count = min(CODES, len(data.test))
    few = count <= len(plots.COLOURS)
    x = to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(data.test[:count]), data.binarize)
    draws = CODES // count if few else 1
    z = np.concatenate(jax.jit(method.encode, static_argnums=3)(key, state, x, draws).z)  # [draws * count, Z]
    names = ("$z_1$", "$z_2$")
    if z.shape[1] != 2:
        centred = z - z.mean(axis=0)
        directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
        z, names = centred @ np.pad(directions, ((0, 2 - len(directions)), (0, 0))).T, ("first component", "second component")
    if few:
        labels, caption = np.tile(np.arange(1, count + 1), draws), f"{draws:,} codes of each of {count} test examples"
    else:
        labels = None if data.test_labels is None else np.asarray(data.test_labels[:count])
        caption = f"codes of {count:,} test examples"
    return plots.codes(z, labels, f"{title}: {caption}", names)


def titled(run: pathlib.Path | None, method: str) -> str:
    """A run's folder, where it has one of another name, and its method."""
    return method if run is None or run.name == method else f"{run.name}, {method}"


class Pictures(Callback):
    """At each checkpoint draws the first seed's run; with two latents also the plane and the codes, and at the end a film."""

    def __init__(self, folder: pathlib.Path, figures: tuple[str, ...] = (*AT_CHECKPOINTS, *MOVING)):
        """Writes to FOLDER/NAME_FIGURE_STEP.png, and NAME_FIGURE.gif; codes of more than two latents are left out."""
        self._folder, self._figures = folder, figures

    def checkpoint(self, step: int, state: State) -> None:
        run = self.run
        for figure in self._figures:
            if lacks(figure, run.method) or (figure == "codes" and lacks("latent_plane", run.method)):
                continue
            of_run = titled(run.workdir, run.name)
            picture = draw(figure, run.method, run.per_seed(state)[0], run.data, name=of_run)
            path = save(self._folder / f"{run.name}_{figure}_{step:06}.png", picture)
            run.show(step, figure, path)
            if figure in MOVING and step >= run.steps:
                film(sorted(self._folder.glob(f"{run.name}_{figure}_[0-9]*.png")), self._folder / f"{run.name}_{figure}.gif")


def film(frames: list[pathlib.Path], path: pathlib.Path) -> pathlib.Path | None:
    """Pictures one after the other as an animated GIF, the last one longer; None where there are fewer than two."""
    if len(frames) < 2:
        return None
    first, *others = (Image.open(frame).convert("RGB") for frame in frames)
    others = [frame.resize(first.size) for frame in others]
    durations = [1000 // FRAMES_PER_SECOND] * len(others) + [2000]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    return path
