"""Faults that the tests must notice: each a slip in one line, put into a copy of the code."""
