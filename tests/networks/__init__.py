"""Tests of `avb_jax.networks`."""
