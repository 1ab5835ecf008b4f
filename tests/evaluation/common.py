"""What the estimators' tests share."""

import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(1)


def over(estimator, method, state, images, *, key=KEY, numbers=None, binarize="none"):
    """The estimates for several stored examples, compiled, as NumPy arrays."""
    numbers = jnp.arange(len(images)) if numbers is None else numbers

    @jax.jit
    def of(key, state, images, numbers):
        return estimator.over(method, key, state, images, numbers, binarize)

    return jax.device_get(of(key, state, None if images is None else jnp.asarray(images), numbers))


def assert_agree(estimates, errors, expected, sigmas=3.0):
    """The mean error over examples is within `sigmas` of its standard error, and the spread is what the errors say."""
    difference = np.asarray(estimates, np.float64) - np.asarray(expected, np.float64)
    errors = np.asarray(errors, np.float64)
    assert abs(difference.mean()) < sigmas * np.sqrt(np.sum(errors**2)) / len(errors), (difference.mean(), errors)
    assert np.sqrt(np.mean((difference / errors) ** 2)) < 1 + sigmas / np.sqrt(len(errors)), difference / errors
