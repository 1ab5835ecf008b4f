"""Faces-like images that the code draws itself, to try the face experiment without any data."""

import numpy as np


def draw(count: int, size: int, seed: int) -> np.ndarray:
    """Images [count, size, size, 3] uint8: heads with hair, eyes and a mouth, each of random shape, colour and light.

    An image follows from the seed and its number.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : 1j * size, -1 : 1 : 1j * size].astype(np.float32)
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        background, skin, hair = rng.uniform(0.1, 0.9, 3), _skin(rng), rng.uniform(0.03, 0.55) * np.array([1.0, 0.8, 0.6])
        tilt, turn = rng.normal(0.0, 0.12), rng.normal(0.0, 0.12)
        u, v = x * np.cos(tilt) - y * np.sin(tilt) - 0.1 * turn, x * np.sin(tilt) + y * np.cos(tilt) - 0.1
        width, height = rng.uniform(0.42, 0.55), rng.uniform(0.6, 0.75)
        canvas = np.broadcast_to(background * (1.0 - 0.2 * y[..., None]), (size, size, 3)).copy()
        _paint(canvas, _inside(u, v + 0.15, width + rng.uniform(0.08, 0.25), height + rng.uniform(0.05, 0.2), size), hair)
        _paint(canvas, _inside(u, v - 0.9, 0.35, 0.5, size), 0.8 * skin)
        _paint(canvas, _inside(u, v, width, height, size), skin)
        if rng.random() < 0.6:  # a fringe
            _paint(canvas, _inside(u, v + height, width * 1.05, rng.uniform(0.25, 0.45), size), hair)
        eyes, opening = rng.uniform(0.18, 0.24), rng.uniform(0.035, 0.07)
        for side in (-1, 1):
            centre = u - side * eyes - 0.3 * turn
            _paint(canvas, _inside(centre, v + 0.1, 0.1, opening, size), np.full(3, 0.95))
            _paint(canvas, _inside(centre - 0.1 * turn, v + 0.1, 0.045, opening, size), np.full(3, 0.1))
            _paint(canvas, _inside(centre, v + 0.23, 0.12, 0.025, size), 0.7 * hair)
        _paint(canvas, _inside(u - 0.35 * turn, v - 0.12, 0.05, 0.12, size), 0.85 * skin)
        smile = v - 0.36 + rng.uniform(-0.6, 0.2) * -np.square(u - 0.3 * turn)
        mouth = _inside(u - 0.3 * turn, smile, rng.uniform(0.13, 0.22), rng.uniform(0.03, 0.07), size)
        _paint(canvas, mouth, np.array([0.65, 0.25, 0.25]))
        light = 1.0 + rng.uniform(-0.3, 0.3) * u[..., None]
        images[i] = np.clip(np.round(255.0 * canvas * light), 0, 255)
    return images


def _skin(rng: np.random.Generator) -> np.ndarray:
    return np.array([0.95, 0.76, 0.62]) * rng.uniform(0.45, 1.0) + rng.normal(0.0, 0.02, 3)


def _inside(u: np.ndarray, v: np.ndarray, width: float, height: float, size: int) -> np.ndarray:
    """How far each pixel lies inside an ellipse, in [0, 1]; its edge is about a pixel wide."""
    radius = np.sqrt(np.square(u / width) + np.square(v / height))
    return np.clip(0.5 + (1.0 - radius) * min(width, height) * size / 2.0, 0.0, 1.0)


def _paint(canvas: np.ndarray, share: np.ndarray, colour: np.ndarray) -> None:
    canvas += share[..., None] * (colour - canvas)
