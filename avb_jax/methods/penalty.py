"""R1: what an adversary pays for its slope (Mescheder, Geiger & Nowozin 2018, "Which training methods for GANs do converge?").

Where data lie on points or thin sheets, the best T is infinitely steep at their edges: the game then turns about its optimum,
or the generator keeps to what T has not yet closed. A penalty on the slope at the data makes the game converge.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from avb_jax.types import Array, PyTree


def r1(t: Callable[[PyTree], Array], inputs: PyTree) -> Array:
    """1/2 |dT/dinput|^2 [...], for T [...] at inputs whose leading axes are T's."""
    shape = jax.eval_shape(t, inputs).shape
    slopes = jax.grad(lambda inputs: jnp.sum(t(inputs)))(inputs)
    return 0.5 * sum(jnp.sum(jnp.square(slope.reshape(*shape, -1)), axis=-1) for slope in jax.tree.leaves(slopes))
