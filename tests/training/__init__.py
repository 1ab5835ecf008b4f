"""Tests of `avb_jax.training`."""
