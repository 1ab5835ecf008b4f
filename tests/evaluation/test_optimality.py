"""Whether T is near its optimum: what it says of examples, and a fresh one that is trained on frozen players."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avb_jax import UserError
from avb_jax.evaluation import Optimality, optimality
from avb_jax.evaluation.optimality import AdversaryEstimator
from avb_jax.evaluation.run import evaluate
from avb_jax.transforms import with_ema
from avb_jax.types import Variables
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.common import over

COUNT = 40


def losses(x, offset, draws=2000):
    """T's loss [N, draws] by NumPy, of a T that is off by `offset`."""
    z, prior, log_ratio = game.monte_carlo(x, draws)
    return np.logaddexp(0, -log_ratio(z) - offset) + np.logaddexp(0, log_ratio(prior) + offset)


def assert_mean_of(number, exact, error):
    """The mean of `exact` [COUNT] up to 4 errors, and the spread of the examples with that error added."""
    assert number.examples == COUNT
    assert abs(number.mean - exact.mean()) < 4 * error + 1e-4
    spread = exact.std(ddof=1) / np.sqrt(COUNT)
    by_chance = error * spread / (error**2 + spread**2) / np.sqrt(COUNT)  # one standard error, relative
    np.testing.assert_allclose(number.examples_error, np.hypot(spread, error), rtol=4 * by_chance + 0.02)


@pytest.mark.parametrize("after", [0.0, 3.0])
@pytest.mark.slow
def test_the_gap(monkeypatch, after):
    """T's loss less the fresh one's; a fresh T that is worse is noted, and the fresh T is trained as asked."""
    asked = {}

    def train(method, data, **options):
        start = options["state"]
        trained, _ = method.train_step(jax.random.key(0), start, jnp.zeros((2, 2)))
        asked.update(options, method=method, data=data, rate=trained.opt_state.adversary)
        return start._replace(params=start.params._replace(adversary={**start.params.adversary, "offset": jnp.asarray(after)}))

    monkeypatch.setattr(optimality, "train", train)
    x = game.points(COUNT)
    estimator = Optimality(draws=100, steps=5, batch_size=20, rate=0.03)
    report = evaluate(game.method(), game.state(), x, [estimator], seed=7, quiet=True)
    assert (asked["steps"], asked["batch_size"], asked["parallel"]) == (5, 20, "auto")
    assert asked["seed"] not in (7, 8)  # whose streams a training may have used
    assert asked["state"].params.adversary["offset"] == 0
    np.testing.assert_array_equal(asked["data"].train, x)
    by_name = {}
    for name, offset in (("adversary", game.OFFSET), ("fresh_adversary", after)):
        by_name[name] = losses(x, offset)
        error = np.sqrt(by_name[name].var(axis=1).mean() / 100 / COUNT)
        assert_mean_of(report["adversary_loss", name], by_name[name].mean(axis=1), error)
    gap = by_name["adversary"].mean() - by_name["fresh_adversary"].mean()
    assert (gap > 0) == (after == 0)
    assert report["optimality_gap", "fresh_adversary"].mean == pytest.approx(gap, abs=0.05)
    assert_mean_of(report["kl", "fresh_adversary"], game.posterior_kl(x) + after, 0.02)
    assert [("still worse than T after 5 steps" in note) for note in report.notes] == ([True] if after else [])


@pytest.mark.slow
def test_a_fresh_adversary_finds_what_is_missing(tmp_path):
    """T is off by a constant of 1; the fresh one starts at the optimum and stays about there, on players that do not move."""
    x = np.random.default_rng(0).random((200, 2), np.float32)
    method = with_ema(game.method(optimizers=optax.sgd(1.0)), 0.5)
    trained = game.state()
    state = trained._replace(ema=Variables(trained.params, trained.collections), step=jnp.array(7))
    estimator = Optimality(draws=100, steps=20, batch_size=50, rate=1e-3, parallel="jit")
    report = evaluate(method, state, x, [estimator], quiet=True, workdir=tmp_path)
    own, fresh = report["adversary_loss", "adversary"], report["adversary_loss", "fresh_adversary"]
    gap = report["optimality_gap", "fresh_adversary"]
    assert gap.mean == pytest.approx(own.mean - fresh.mean, abs=1e-5)
    exact = losses(x, 1.0).mean() - losses(x, 0.0).mean()
    assert abs(gap.mean - exact) < 4 * gap.examples_error + 5e-3
    assert abs(report["kl", "fresh_adversary"].mean - game.posterior_kl(x).mean()) < 0.1
    assert report.notes == []
    for steps in (20, 5):  # of fewer steps is the one of more that is there
        again = evaluate(method, state, x, [dataclasses.replace(estimator, steps=steps)], quiet=True, workdir=tmp_path)
        assert again.to_json() == report.to_json()
    checkpoints = list((tmp_path / "evaluation" / "avb-0" / "fresh_adversary").rglob("checkpoints/*/*"))
    assert [path.name for path in checkpoints if path.name.isdigit()] == ["20"]


@pytest.mark.parametrize("ema", [False, True])
def test_frozen_players_stay_as_they_are_evaluated(ema):
    """A fresh T starts at step 0 with params of its own; a step moves it alone."""
    method = small_method("avb", batch_norm=True, optimizers=optax.sgd(1.0), ema_decay=0.9 if ema else None)
    x = jax.random.uniform(jax.random.key(2), (4, 6, 6))
    state = method.init(jax.random.key(0), x)
    state = state._replace(step=jnp.array(5), params=jax.tree.map(lambda a: a + 1.0, state.params))
    evaluated = state.ema if ema else Variables(state.params, state.collections)
    fresh = method.fresh_adversary(optax.sgd(0.1), state)
    start = fresh.init(jax.random.key(3), x)
    after, _ = jax.jit(fresh.train_step)(jax.random.key(4), start, x)
    assert (int(start.step), int(after.step)) == (0, 1)
    for one in (start, after):
        for player in ("encoder", "decoder"):
            for field in ("params", "collections"):
                expected, found = (getattr(getattr(of, field), player) for of in (evaluated, one))
                jax.tree.map(np.testing.assert_array_equal, found, expected)
    kernels = [jax.tree.leaves(one.params.adversary) for one in (start, after, evaluated)]
    for one, other in ((0, 1), (0, 2)):
        assert any(not np.array_equal(a, b) for a, b in zip(kernels[one], kernels[other], strict=True))
    assert start.opt_state[:2] == (None, None)


@pytest.mark.slow
def test_a_t_that_says_nothing_of_each_example_s_kl():
    """The adversarial autoencoder's, of q(z): its loss has a gap, and there is no KL(q(z|x), p(z))."""
    method, x = small_method("aae"), np.random.default_rng(0).random((8, 6, 6), np.float32)
    state = method.init(jax.random.key(0), jnp.asarray(x))
    report = evaluate(method, state, x, [Optimality(draws=2, steps=2, batch_size=4, parallel="jit")], quiet=True)
    names = {("adversary_loss", "adversary"), ("adversary_loss", "fresh_adversary"), ("optimality_gap", "fresh_adversary")}
    assert set(report.estimates) == names


def test_what_t_says_of_known_examples():
    """Loss, accuracy, saturation and KL of each example, by NumPy; the same key gives two T the same z."""
    x, estimator = game.points(COUNT), AdversaryEstimator(draws=2000, chunk=10)
    found = over(estimator, game.method(), game.state(), x)
    z, prior, log_ratio = game.monte_carlo(x, 4000)
    t_q, t_p = log_ratio(z) + game.OFFSET, log_ratio(prior) + game.OFFSET
    loss = np.logaddexp(0, -t_q) + np.logaddexp(0, t_p)
    np.testing.assert_allclose(found.loss, loss.mean(axis=1), atol=0.15)
    np.testing.assert_allclose(found.accuracy, 0.5 * ((t_q > 0).mean(axis=1) + (t_p < 0).mean(axis=1)), atol=0.04)
    saturation = 0.5 * ((abs(t_q) > 5).mean(axis=1) + (abs(t_p) > 5).mean(axis=1))
    np.testing.assert_allclose(found.saturation, saturation, atol=0.04)
    np.testing.assert_allclose(found.kl, game.posterior_kl(x) + game.OFFSET, atol=0.15)
    exact = over(estimator, game.method(), game.state(offset=0.0), x)
    np.testing.assert_allclose(found.kl - exact.kl, game.OFFSET, rtol=1e-4)


def test_what_it_needs():
    assert Optimality().lacks(small_method("avb")) == ""
    assert Optimality().lacks(small_method("vae")) == "has no T"
    lacking = small_method("avb")._replace(fresh_adversary=None)
    assert Optimality().lacks(lacking) == "has no T whose optimality could be measured"
    for field in ("draws", "steps", "batch_size", "chunk", "images"):
        with pytest.raises(UserError, match=f"{field}=0: must be at least 1"):
            Optimality(**{field: 0})
    with pytest.raises(UserError, match="rate=0: must be positive"):
        Optimality(rate=0)
