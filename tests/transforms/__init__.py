"""Tests of `avb_jax.transforms`."""
