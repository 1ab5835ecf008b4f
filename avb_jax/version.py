"""The version, which packaging reads."""

__version__ = "0.4.0"
