"""Arrays and runs in, figures out: grids of images (`named`), diagrams (`plots`); `save` writes either."""

from avb_jax.figures.named import FIGURES, Pictures, draw, titled
from avb_jax.figures.save import save

__all__ = ["FIGURES", "Pictures", "draw", "save", "titled"]
