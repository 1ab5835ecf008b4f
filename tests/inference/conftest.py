"""Fits are checked with fewer draws than outside of the tests."""

from avb_jax.inference import checks, fitting, watch

fitting.DRAWS, watch.WATCHED, checks.BLOCK = 2000, 250, 250
