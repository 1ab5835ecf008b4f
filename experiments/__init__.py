"""The paper's experiments, each run as `python -m experiments.NAME`."""

import os

# XLA of jaxlib 0.10 reports every program that it loads from the cache as an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
