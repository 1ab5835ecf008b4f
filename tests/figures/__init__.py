"""Tests of the same-named folder."""
