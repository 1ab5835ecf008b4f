"""The examples in the docstrings of what users call."""

import doctest
import sys

import pytest

import avb_jax
from avb_jax import inference, transforms

EXAMPLES = {
    "avb": avb_jax.avb,
    "fit": avb_jax.fit,
    "evaluate": avb_jax.evaluate,
    "with_ema": transforms.with_ema,
    "over_seeds": transforms.over_seeds,
    "AutoAVB": inference.AutoAVB,
}


@pytest.mark.parametrize("name", [*list(EXAMPLES)[:-1], pytest.param("AutoAVB", marks=pytest.mark.slow)])
def test_example(name):
    function = EXAMPLES[name]
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(vars(sys.modules[function.__module__])))
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
