"""Faces-like images that the code draws itself, to try the face experiment without any data."""

from typing import NamedTuple

import numpy as np

CHUNK = 16  # images painted at once


class Look(NamedTuple):
    """What one head looks like; sizes in halves of the image."""

    background: np.ndarray  # colours [3]
    skin: np.ndarray
    hair: np.ndarray
    tilt: float  # of the head, radians
    turn: float
    width: float  # of the face
    height: float
    hair_width: float
    hair_height: float
    fringe: float  # its height; 0: none
    eyes: float  # how far apart
    opening: float  # of the eyes
    smile: float
    mouth_width: float
    mouth_height: float
    light: float  # how much brighter one side is


def draw(count: int, size: int, seed: int) -> np.ndarray:
    """Images [count, size, size, 3] uint8: heads with hair, eyes and a mouth, each of random shape, colour and light.

    An image follows from the seed and its number.
    """
    rng = np.random.default_rng(seed)
    looks = [_look(rng) for _ in range(count)]
    return np.concatenate([_painted(looks[first : first + CHUNK], size) for first in range(0, count, CHUNK)])


def _look(rng: np.random.Generator) -> Look:
    background = rng.uniform(0.1, 0.9, 3)
    skin = np.array([0.95, 0.76, 0.62]) * rng.uniform(0.45, 1.0) + rng.normal(0.0, 0.02, 3)
    hair = rng.uniform(0.03, 0.55) * np.array([1.0, 0.8, 0.6])
    tilt, turn = rng.normal(0.0, 0.12), rng.normal(0.0, 0.12)
    width, height = rng.uniform(0.42, 0.55), rng.uniform(0.6, 0.75)
    hair_width, hair_height = width + rng.uniform(0.08, 0.25), height + rng.uniform(0.05, 0.2)
    fringe = rng.uniform(0.25, 0.45) if rng.random() < 0.6 else 0.0
    eyes, opening = rng.uniform(0.18, 0.24), rng.uniform(0.035, 0.07)
    smile, mouth = rng.uniform(-0.6, 0.2), (rng.uniform(0.13, 0.22), rng.uniform(0.03, 0.07))
    head = (background, skin, hair, tilt, turn, width, height, hair_width, hair_height, fringe)
    return Look(*head, eyes, opening, smile, *mouth, rng.uniform(-0.3, 0.3))


def _painted(looks: list[Look], size: int) -> np.ndarray:
    """Images [N, size, size, 3] uint8 of so many looks."""
    # Numbers are [N, 1, 1], colours [3, N, 1, 1], coordinates [N, size, size].
    look = Look(*(np.array(values, np.float32).T[..., None, None] for values in zip(*looks, strict=True)))
    y, x = np.mgrid[-1 : 1 : 1j * size, -1 : 1 : 1j * size].astype(np.float32)
    u = x * np.cos(look.tilt) - y * np.sin(look.tilt) - 0.1 * look.turn
    v = x * np.sin(look.tilt) + y * np.cos(look.tilt) - 0.1
    canvas = look.background * (1.0 - 0.2 * y) + np.zeros_like(u)

    def paint(u: np.ndarray, v: np.ndarray, width, height, colour, there=1.0) -> None:
        """An ellipse about the origin of (u, v), whose edge is about a pixel wide."""
        radius = np.sqrt(np.square(u / width) + np.square(v / height))
        share = there * np.clip(0.5 + (1.0 - radius) * (np.minimum(width, height) * (size / 2.0)), 0.0, 1.0)
        canvas[...] += share * (colour - canvas)

    paint(u, v + 0.15, look.hair_width, look.hair_height, look.hair)
    paint(u, v - 0.9, 0.35, 0.5, 0.8 * look.skin)
    paint(u, v, look.width, look.height, look.skin)
    paint(u, v + look.height, 1.05 * look.width, np.maximum(look.fringe, 0.1), look.hair, look.fringe > 0.0)
    for side in (-1, 1):
        centre = u - side * look.eyes - 0.3 * look.turn
        paint(centre, v + 0.1, 0.1, look.opening, 0.95)
        paint(centre - 0.1 * look.turn, v + 0.1, 0.045, look.opening, 0.1)
        paint(centre, v + 0.23, 0.12, 0.025, 0.7 * look.hair)
    paint(u - 0.35 * look.turn, v - 0.12, 0.05, 0.12, 0.85 * look.skin)
    smile = v - 0.36 - look.smile * np.square(u - 0.3 * look.turn)
    lips = np.array([0.65, 0.25, 0.25], np.float32)[:, None, None, None]
    paint(u - 0.3 * look.turn, smile, look.mouth_width, look.mouth_height, lips)
    pixels = np.clip(np.round(255.0 * canvas * (1.0 + look.light * u)), 0, 255).astype(np.uint8)
    return np.moveaxis(pixels, 0, -1)
