"""No two uses of randomness draw the same numbers."""

import ast
import collections
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import evaluation
from avb_jax.data import from_arrays
from avb_jax.evaluation import held_out
from avb_jax.evaluation.moments import Draws
from avb_jax.evaluation.optimality import AdversaryEstimator
from avb_jax.streams import stream
from avb_jax.training.loop import train
from tests.conftest import small_method

ROOT = pathlib.Path(__file__).parents[1]
CONSUMERS = ("normal", "uniform", "bernoulli", "logistic", "bits")
KEY = jax.random.key(0)  # the worst a user can do: the seed of the training


class Recorder:
    """Which keys were drawn from, and which others were derived from, whenever a compiled program runs."""

    def __init__(self):
        self.drawn, self.parents = collections.Counter(), set()

    def watch(self, function, note):
        @functools.wraps(function)
        def watched(key, *arguments, **options):
            data = key if key.dtype == jnp.uint32 else jax.random.key_data(key)
            jax.debug.callback(note, data, jnp.uint32(arguments[0] if function.__name__ == "fold_in" else 0))
            return function(key, *arguments, **options)

        return watched

    def note_draw(self, data, _):
        self.drawn.update([tuple(np.asarray(data).tolist())])

    def note_parent(self, data, count):
        if int(count) < 2**31:  # numbers drawn from a key overlap with its children by count, and not with those by name
            self.parents.add(tuple(np.asarray(data).tolist()))

    def take(self):
        """What was drawn from and derived from since the last call."""
        jax.effects_barrier()
        found = self.drawn, self.parents
        self.drawn, self.parents = collections.Counter(), set()
        return found


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    jax.clear_caches()
    for name in CONSUMERS:
        monkeypatch.setattr(jax.random, name, recorder.watch(getattr(jax.random, name), recorder.note_draw))
    for name in ("split", "fold_in"):
        monkeypatch.setattr(jax.random, name, recorder.watch(getattr(jax.random, name), recorder.note_parent))
    yield recorder
    jax.clear_caches()


def as_row(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_no_key_is_used_twice(mode, recorder):
    """In training (two seeds, steps of T's own, mirrored binary images); on one device in every estimator after it, too.

    Estimators under one key see the same binary images, which is the one thing that they share.
    """
    images = np.random.default_rng(0).random((2, 8, 6, 6), np.float32)
    dataset = from_arrays(*images, binarize="dynamic")._replace(flip=True)
    method = small_method("avb", adversary_steps=3, noise_draws=2, optimizers=optax.sgd(1e-3))
    states = train(
        method,
        dataset,
        steps=4,
        batch_size=4,
        num_seeds=2,
        log_every=2,
        checkpoint_every=2,
        parallel=mode,
        devices=jax.devices()[:2],
    )
    used = {}
    used["training"], parents = recorder.take()
    # Per step: pixels, mirrors, and per update of T noise and prior; by 2 seeds, 4 steps and the devices.
    assert used["training"].total() >= 2 * 4 * (2 + 2 * 3) * (2 if mode == "pmap" else 1)
    state, numbers, test = jax.tree.map(lambda a: a[0], states), jnp.arange(2), jnp.asarray(images[1][:2])
    annealing = {"chains": 2, "temperatures": 2, "leapfrog_steps": 1, "fit_draws": 3}
    estimators = {
        "elbo": evaluation.ELBO(draws=2),
        "importance": evaluation.ImportanceSampling(samples=3, fit_draws=3),
        "ais": evaluation.AIS(**annealing),
        "bdmc": evaluation.BDMC(**annealing),
        "moments": evaluation.Moments(draws=2),
        "draws": Draws(draws=2),
        "codes": Draws(draws=2, stream="codes"),
        "T's terms": AdversaryEstimator(draws=2),
    }
    checked = stream(KEY, "held_out")
    runs = {
        name: lambda estimator=estimator: estimator.over(method, KEY, state, test, numbers, "dynamic")
        for name, estimator in estimators.items()
    }
    runs["held-out check"] = lambda: held_out.estimates(method, "dynamic", checked, state, test)
    pixels = {as_row(jax.random.fold_in(stream(key, "pixels"), n)) for key in (KEY, checked) for n in range(2)}
    recorder.take()
    for name, estimate in runs.items() if mode == "jit" else ():
        jax.block_until_ready(estimate())
        drawn, more = recorder.take()
        assert pixels & set(drawn) or name == "bdmc", name
        used[name], parents = collections.Counter({k: n for k, n in drawn.items() if k not in pixels}), parents | more
    for name, drawn in used.items():
        assert len(drawn) > 0, name
        assert max(drawn.values()) == 1, f"{name} draws twice from one key"
        assert not parents & set(drawn), f"{name} draws from a key that others are derived from"
        for other, others in used.items():
            assert other == name or not set(drawn) & set(others), f"{name} and {other} share a key"


def test_names_are_apart_from_counts_and_from_each_other():
    names = ["pixels", "flip", "adversary", "held_out", "evaluation", "elbo", "ais"]
    keys = [as_row(stream(KEY, name)) for name in names]
    keys += [as_row(key) for key in jax.random.split(KEY, 1000)] + [as_row(KEY)]
    assert len(set(keys)) == len(keys)


# Roots without a name: the streams of training, by seed, and what is the same by design or draws nothing.
UNNAMED = {
    "avb_jax/training/loop.py": ("jax.random.key(seed)",) * 2,
    "avb_jax/contrast.py": ("jax.random.key(0)",),
    "avb_jax/network.py": ("jax.random.key(0)",),
    "avb_jax/networks/encoders.py": ("jax.random.key(0)",) * 2,
    "avb_jax/evaluation/samples.py": ("jax.random.key(0)",),
    "avb_jax/inference/checks.py": ("jax.random.key(0)",),
    "avb_jax/inference/fitting.py": ("jax.random.key(0)",),
}


def test_every_other_root_key_has_a_name():
    for path in [*(ROOT / "avb_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        tree, named, roots = ast.parse(path.read_text()), set(), []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "stream":
                named.add(id(node.args[0]))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.random.key":
                roots.append(node)
        unnamed = tuple(ast.unparse(node) for node in roots if id(node) not in named)
        assert unnamed == UNNAMED.get(str(path.relative_to(ROOT)), ()), path
