"""Tests of `avb_jax.inference`."""
