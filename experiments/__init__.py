"""The paper's experiments, each run as `python -m experiments.NAME`."""
