"""Tests mirror the modules, plus end-to-end runs."""
