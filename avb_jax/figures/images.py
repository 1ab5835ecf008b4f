"""The paper's figures of images: samples (Figures 4 and 5), reconstructions, interpolations (Figure 6), neighbours."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.special import ndtri

from avb_jax.data.dataset import Dataset, to_pixels
from avb_jax.evaluation.samples import as_pixels
from avb_jax.method import Method
from avb_jax.models import images_of
from avb_jax.streams import stream
from avb_jax.types import Array, State

COLUMNS = 10
SAMPLES = 100
PAIRS = 50  # reconstructions
INTERPOLATIONS = 10
TRAVERSED = 200  # test images whose codes say which latents move
NEIGHBOURS = 5
BLOCK = 2048  # training images compared at once
PLANE = 15  # images along each side of the latent plane
SMALLEST = 640  # pixels across that small grids are enlarged to


class Grid(NamedTuple):
    """Images [N, H, W] or [N, H, W, C], pixels in [0, 1], to be shown in rows of so many columns, and what is to be read."""

    images: np.ndarray
    columns: int
    caption: str = ""  # what they are
    rows: Sequence[str] = ()  # of each row; as many as there are, from the top
    heads: Sequence[str] = ()  # of each column


def samples(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Mean images of p(x|z) at z ~ p(z)."""
    del data
    return Grid(np.asarray(_sample(method, key, state, SAMPLES)), COLUMNS, "samples")


def reconstructions(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Test images, and in the row below each row of them their reconstructions."""
    x, _, decoded = _encode(method, key, state, data.test[:PAIRS], data.binarize)
    whole = len(x) // COLUMNS * COLUMNS or len(x)
    columns = min(COLUMNS, whole)
    shown = interleave(np.asarray(x)[:whole], np.asarray(decoded)[:whole], columns)
    return Grid(shown, columns, "test images and their reconstructions", ("data", "model") * (len(shown) // (2 * columns)))


def interpolation(key: Array, method: Method, state: State, data: Dataset, spherical: bool = False) -> Grid:
    """Rows from one test image's code to another's on a straight line, between the two images themselves.

    The second and the last but one picture of a row are the images' reconstructions. A `spherical` one (White 2016) turns
    from one code's direction to the other's, and so keeps to lengths that codes from N(0, I) have.
    """
    count = min(INTERPOLATIONS, len(data.test) // 2)
    x, z, _ = _encode(method, key, state, data.test[: 2 * count], data.binarize)
    x, z = np.asarray(x), np.asarray(z)
    share = np.linspace(0.0, 1.0, COLUMNS - 2)[:, None]
    one, other = z[:count, None], z[count:, None]
    of_one, of_other = 1.0 - share, share
    if spherical:
        of_one, of_other = _turn(one, other, of_one), _turn(one, other, of_other)
    line = of_one * one + of_other * other  # [count, COLUMNS - 2, Z]
    line = line.reshape(-1, z.shape[1]).astype(np.float32)
    decoded = np.asarray(_decode(method, state, line))
    rows = decoded.reshape(count, COLUMNS - 2, *x.shape[1:])
    rows = np.concatenate([x[:count, None], rows, x[count:, None]], axis=1)
    heads = ("data", "model", *[""] * (COLUMNS - 4), "model", "data")
    how = "along the sphere" if spherical else "along the line"
    return Grid(rows.reshape(-1, *x.shape[1:]), COLUMNS, f"from one test image's code to another's {how}", (), heads)


def _turn(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """sin(share * angle) / sin(angle), the angle being between two codes; `share` where they have one direction."""
    cosine = np.sum(one * other, axis=-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1) + 1e-12)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))[..., None]
    return np.where(np.sin(angle) < 1e-4, share, np.sin(share * angle) / np.maximum(np.sin(angle), 1e-4))


def traversals(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Rows of one latent each, which takes values from -3 to 3 where the others stay at a test image's code.

    The latents whose mean moves most over test images come first.
    """
    x, z, _ = _encode(method, key, state, data.test[:TRAVERSED], data.binarize)
    x, z = np.asarray(x), np.asarray(z)
    latents = np.argsort(-z.std(axis=0))[:COLUMNS]
    values = np.linspace(-3.0, 3.0, COLUMNS - 1)
    codes = np.broadcast_to(z[0], (len(latents), len(values), z.shape[1])).copy()
    for row, latent in enumerate(latents):
        codes[row, :, latent] = values
    decoded = np.asarray(_decode(method, state, codes.reshape(-1, z.shape[1]).astype(np.float32)))
    rows = decoded.reshape(len(latents), len(values), *x.shape[1:])
    rows = np.concatenate([np.broadcast_to(x[0], (len(latents), 1, *x.shape[1:])), rows], axis=1)
    labels, heads = [f"z{latent + 1}" for latent in latents], ("data", *(f"{value:.2g}" for value in values))
    return Grid(rows.reshape(-1, *x.shape[1:]), COLUMNS, "one latent at a time, the others as encoded", labels, heads)


def neighbours(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Samples, each next to the training images nearest to it (Euclidean, in pixels), the nearest first."""
    drawn = np.asarray(_sample(method, key, state, COLUMNS))
    flat = drawn.reshape(len(drawn), -1)
    best, where = np.empty((len(drawn), 0), np.float32), np.empty((len(drawn), 0), int)
    for first in range(0, len(data.train), BLOCK):
        block = as_pixels(data.train[first : first + BLOCK]).reshape(-1, flat.shape[1])
        distance = np.sum(block**2, axis=1) - 2.0 * flat @ block.T  # |a - b|^2 but for |a|^2
        best = np.concatenate([best, distance], axis=1)
        where = np.concatenate([where, np.broadcast_to(first + np.arange(len(block)), distance.shape)], axis=1)
        order = np.argsort(best, axis=1)[:, :NEIGHBOURS]
        best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
    near = as_pixels(data.train[np.sort(where.ravel())])
    near = near[np.argsort(np.argsort(where.ravel()))].reshape(*where.shape, *drawn.shape[1:])
    rows = np.concatenate([drawn[:, None], near], axis=1)
    heads = ("model", *[f"{i + 1}." for i in range(where.shape[1])])
    return Grid(rows.reshape(-1, *drawn.shape[1:]), len(heads), "samples, and the training images nearest to each", (), heads)


def latent_plane(key: Array, method: Method, state: State, data: Dataset) -> Grid:
    """Mean images of p(x|z) over the plane of two latents, z_1 to the right and z_2 upwards, at quantiles of N(0, 1)."""
    del key, data
    levels = ndtri(np.linspace(0.02, 0.98, PLANE))
    z = np.stack(np.meshgrid(levels, levels[::-1]), axis=-1).reshape(-1, 2).astype(np.float32)
    heads = [f"{level:.1f}" for level in levels]
    return Grid(np.asarray(_decode(method, state, z)), PLANE, "the latent plane, z1 to the right, z2 up", heads[::-1], heads)


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


def to_image(grid: Grid, title: str = "", smallest: int = SMALLEST) -> Image.Image:
    """A grid as a picture, enlarged in whole steps to about `smallest` pixels across, with its title and labels about it."""
    canvas = np.round(tile(grid.images, grid.columns) * 255.0).astype(np.uint8)
    canvas = canvas[..., 0] if canvas.ndim == 3 and canvas.shape[2] == 1 else canvas
    factor = max(1, round(smallest / canvas.shape[1]))
    picture = Image.fromarray(canvas.repeat(factor, axis=0).repeat(factor, axis=1))
    step_y, step_x = (factor * (size + 1) for size in grid.images.shape[1:3])
    font = ImageFont.load_default(size=min(16, max(9, step_x // 3 if grid.heads else 16)))
    large = ImageFont.load_default(size=16)
    left = 10 + max(int(font.getlength(label)) for label in grid.rows) if grid.rows else 0
    over = 28 * bool(title)
    top = over + 20 * bool(grid.heads)
    if not (left or top):
        return picture
    page = Image.new("RGB", (max(left + picture.width, int(large.getlength(title)) + 16), top + picture.height), "white")
    page.paste(picture, (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((8, 5), title, "black", large)
    for i, label in enumerate(grid.rows):
        draw.text((left - 5, top + (i + 0.5) * step_y), label, "black", font, anchor="rm")
    for i, head in enumerate(grid.heads):
        draw.text((left + (i + 0.5) * step_x, top - 3), head, "black", font, anchor="mb")
    return page


def interleave(originals: np.ndarray, reconstructions: np.ndarray, columns: int) -> np.ndarray:
    """Rows of originals, each above the row of its reconstructions."""
    rows = [part.reshape(-1, columns, *part.shape[1:]) for part in (np.asarray(originals), np.asarray(reconstructions))]
    return np.stack(rows, axis=1).reshape(-1, *originals.shape[1:])


@functools.partial(jax.jit, static_argnames=("method", "count"))
def _sample(method: Method, key: Array, state: State, count: int) -> Array:
    return method.sample(key, state, count)


@functools.partial(jax.jit, static_argnames="method")
def _decode(method: Method, state: State, z: Array) -> Array:
    return images_of(stream(jax.random.key(0), "images"), method.decode(state, z))


@functools.partial(jax.jit, static_argnames=("method", "binarize"))
def _encode(method: Method, key: Array, state: State, images: np.ndarray, binarize: str) -> tuple[Array, Array, Array]:
    """Stored images as x, a code of each, and its mean image."""
    x = to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(images), binarize)
    z = method.encode(key, state, x).z
    return x, z, images_of(stream(key, "images"), method.decode(state, z))
