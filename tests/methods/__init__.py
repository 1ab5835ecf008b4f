"""Tests of `avb_jax.methods`."""
