"""Densities of which all is known."""

import jax.numpy as jnp
import numpy as np


def gaussian(z):
    """N((0.3, -0.2), [[1, .9], [.9, 1.2]]), times e^1.5."""
    d, precision = z - jnp.array([0.3, -0.2]), np.linalg.inv([[1.0, 0.9], [0.9, 1.2]])
    return 1.5 - 0.5 * d @ precision @ d - np.log(2 * np.pi) - 0.5 * np.log(1.2 - 0.81)


def torus(z):
    """A tube about the circle of radius 2: angle uniform, density of the radius r * exp(-((r - 2) / 0.3)^2 / 2), z_3 normal."""
    radius = jnp.sqrt(z[0] ** 2 + z[1] ** 2 + 1e-12)
    return -0.5 * ((radius - 2) / 0.3) ** 2 - 0.5 * (z[2] / 0.3) ** 2


def rosenbrock(z):
    """z_1 ~ N(0, 1) and z_2 - z_1^2 ~ N(0, 0.5^2), independent; its integral is 1."""
    return -0.5 * z[0] ** 2 - 0.5 * ((z[1] - z[0] ** 2) / 0.5) ** 2 - np.log(2 * np.pi * 0.5)
