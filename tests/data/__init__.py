"""Tests of `avb_jax.data`."""
