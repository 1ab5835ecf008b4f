"""Which State of a fit counts, by bounds that do not use T."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Diverged
from avb_jax.inference import fitting
from avb_jax.inference.watch import Watch
from tests.inference.densities import gaussian

KEY = jax.random.key(11)


def test_which_state_counts():
    """The latest, unless its bounds lie below those of one before, or importance sampling finds less; of each seed its own."""
    numbers = {
        "elbo_lower": np.array([-1.0, -3.0, -1.0, -1.0]),
        "elbo_upper": np.array([-0.9, -2.5, 0.5, -0.8]),
        "elbo_error": np.full(4, 0.01),
        "log_evidence": np.array([-0.8, -0.8, -1.9, np.nan]),
        "log_evidence_error": np.full(4, 0.05),
    }
    watch = Watch(None, 0.0)
    watch._of_best = {
        "elbo_lower": np.full(4, -0.95),
        "elbo_upper": np.full(4, -0.9),
        "elbo_error": np.full(4, 0.01),
        "log_evidence": np.full(4, -0.75),
        "log_evidence_error": np.full(4, 0.05),
    }
    assert watch._worse(numbers).tolist() == [False, True, True, True]


def test_a_fit_that_diverges_goes_back_to_its_best_state():
    """With a warning; without one the error names the arguments that there are."""

    def diverge(watch):
        with fitting._named_points(gaussian, jnp.zeros(2), KEY, watch):
            raise Diverged("sivi: elbo is not finite by step 10; lower the learning rates")

    watch = Watch(None, 0.0)
    watch.best = None
    with pytest.raises(Diverged, match=r"^sivi: elbo is not finite by step 10; lower sampler_rate, adversary_rate or clip"):
        diverge(watch)
    watch.best = object()
    with pytest.warns(RuntimeWarning, match=r"by step 10; lower sampler_rate.* that of the best step before"):
        diverge(watch)
