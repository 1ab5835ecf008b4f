"""Figures of any run by their names, at the end or at each checkpoint."""

import pathlib
from collections.abc import Callable

import jax
from PIL import Image

from avb_jax.data.dataset import Dataset
from avb_jax.figures import conditional, images
from avb_jax.figures.save import save
from avb_jax.method import Method
from avb_jax.streams import stream
from avb_jax.training.callbacks import Callback
from avb_jax.types import State, UserError

FIGURES: dict[str, Callable] = {
    "samples": images.samples,
    "reconstructions": images.reconstructions,
    "interpolation": images.interpolation,
    "neighbours": images.neighbours,
    "latent_plane": images.latent_plane,
    "conditional": conditional.of_classes,
    "inpainting": conditional.inpainting,
}
OF_CODES = ("reconstructions", "interpolation")


def grid(figure: str, method: Method, state: State, data: Dataset, seed: int = 0) -> images.Grid:
    """One of `FIGURES` of a run, whose State has no axis of seeds.

    Raises:
      UserError: no such figure, one of codes and a method without an encoder, or one of a plane and other than two latents.
    """
    if figure not in FIGURES:
        raise UserError(f"figure={figure!r}: must be one of {', '.join(FIGURES)}")
    if figure in OF_CODES and method.encode is None:
        raise UserError(f"figure={figure!r}: {method.name} has no encoder; take samples or neighbours")
    latents = 0 if method.prior is None else method.prior.event_shape[0]
    if figure == "latent_plane" and latents != 2:
        raise UserError(f"figure='latent_plane': {method.name} has {latents} latents; it takes two")
    return FIGURES[figure](stream(jax.random.key(seed), figure), method, state, data)


def draw(figure: str, method: Method, state: State, data: Dataset, seed: int = 0) -> Image.Image:
    """`grid` as a picture; small images are enlarged in whole steps."""
    return images.to_image(*grid(figure, method, state, data, seed))


class Pictures(Callback):
    """At each checkpoint draws samples and, with an encoder, reconstructions and interpolations of the first seed's run."""

    def __init__(self, folder: pathlib.Path, figures: tuple[str, ...] = ("samples", *OF_CODES)):
        """Writes to FOLDER/NAME_FIGURE_STEP.png."""
        self._folder, self._figures = folder, figures

    def checkpoint(self, step: int, state: State) -> None:
        run = self.run
        for figure in self._figures:
            if figure in OF_CODES and run.method.encode is None:
                continue
            picture = draw(figure, run.method, run.per_seed(state)[0], run.data)
            save(self._folder / f"{run.name}_{figure}_{step:06}.png", picture)
