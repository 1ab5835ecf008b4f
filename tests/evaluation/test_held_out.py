"""The look at held-out examples while a method trains: the ELBO under T next to a bound that does not use T."""

import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import distributions as dist

import avb_jax
from avb_jax import UserError, networks
from avb_jax.data import from_arrays
from avb_jax.evaluation import held_out
from avb_jax.evaluation.held_out import Comparison, HeldOut
from avb_jax.inference.checks import Weigher
from avb_jax.training import checkpoints
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.test_examples import GREY, STATE, constant

FINITE = Comparison(-90.0, -91.0, 1.5, 0.1, 12.0)


def compare(key):
    """Of grey images that are binarised, by a model whose log p(x) is the ELBO's and the bound's own."""
    return held_out.summarise(jax.jit(lambda key: held_out.estimates(constant(), "dynamic", key, STATE, GREY))(key))


def test_the_bound_is_on_the_images_of_the_elbo():
    """Here both are log p(x), image by image, but for what weighing 128 draws of a proposal 1.2 times as wide leaves."""
    result = compare(jax.random.key(3))
    assert result.excess_error < 0.03
    assert abs(result.excess) < 4 * result.excess_error + 0.01
    assert result.excess == pytest.approx(result.elbo - result.log_likelihood, abs=1e-4)
    assert 64 < result.effective_sample_size <= held_out.SAMPLES
    assert not result.inconsistent
    assert abs(compare(jax.random.key(4)).elbo - result.elbo) > 0.5  # on other images


@pytest.mark.parametrize(("excess", "error", "inconsistent"), [(1.01, 0.3, True), (0.99, 0.1, False), (2.0, 0.7, False)])
def test_when_an_elbo_stands_too_high(excess, error, inconsistent):
    """By more than a nat and than three standard errors."""
    assert Comparison(0.0, 0.0, excess, error, 1.0).inconsistent == inconsistent


def test_numbers_of_a_comparison():
    """Means over the examples, and the standard error of their differences; of one example there is none."""
    terms = types.SimpleNamespace(elbo=np.array([-1.0, -2.0, -6.0]))
    bound = types.SimpleNamespace(
        log_likelihood=np.array([-2.0, -2.0, -5.0]), effective_sample_size=np.array([10.0, 20.0, 60.0])
    )
    found = held_out.summarise((terms, bound))
    assert found[:5] == pytest.approx((-3.0, -3.0, 0.0, 1.0 / math.sqrt(3), 30.0))
    assert found[5:] == (None, None, None)  # of an encoder that is not semi-implicit
    ends = types.SimpleNamespace(elbo_lower=np.array([-2.0, -3.0, -7.0]), elbo_upper=np.array([-2.0, -2.0, -4.0]))
    found = held_out.summarise((terms, bound, ends))
    assert found[5:] == pytest.approx((-4.0, -8 / 3, math.sqrt(7 / 9)))  # of 1, 0, -2
    terms.elbo, bound.log_likelihood, bound.effective_sample_size = terms.elbo[:1], bound.log_likelihood[:1], np.ones(1)
    assert held_out.summarise((terms, bound))[:5] == pytest.approx((-1.0, -2.0, 1.0, 0.0, 1.0))


class Recorded:
    """What a callback is given of a run, with what it records and notes."""

    def __init__(self, method, data, seeds=1):
        self.method, self.data, self.seed, self.start, self.steps = method, data, 0, 0, 100
        self.workdir, self.name = None, method.name
        self.numbers, self.notes, self.seeds = [], [], seeds

    def per_seed(self, state):
        return [jax.tree.map(lambda a, s=s: a[s], state) for s in range(self.seeds)] if self.seeds > 1 else [state]

    def record(self, step, numbers):
        self.numbers.append((step, numbers))

    def note(self, text):
        self.notes.append(text)


def looked(method, data, state, seeds=1, step=50, **options):
    """The run after one checkpoint."""
    run, callback = Recorded(method, data, seeds), HeldOut(**options)
    callback.start(run)
    callback.checkpoint(step, state)
    return run


DATA = from_arrays(game.points(8), np.float32(game.points(60)[8:]))


def test_what_a_run_is_shown():
    """Numbers of each seed on the first held-out examples; a T that is far off is warned of, by its seed."""
    states = [game.state(0.0), game.state(-4.0)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    run = looked(game.method(), DATA, both, seeds=2, images=16)
    ((step, numbers),) = run.numbers
    assert step == 50
    assert numbers.keys() == {f"held_out_{field}" for field in Comparison._fields[:5]}
    assert all(value.shape == (2,) for value in numbers.values())
    np.testing.assert_allclose(np.diff(numbers["held_out_elbo"]), 4.0, rtol=1e-4)  # on the same draws
    x = DATA.test[:16]
    assert abs(numbers["held_out_elbo"][0] - game.elbo(x).mean()) < 0.6
    assert abs(numbers["held_out_log_likelihood"][0] - game.log_evidence(x).mean()) < 0.1
    line, warning = run.notes
    assert line.startswith("step 50, held out: ELBO under T ")
    assert warning.startswith("warning: the ELBO under T stands ")
    assert "(seed number 1)" in warning
    again = looked(game.method(), DATA, both, seeds=2, images=16, quiet=True)
    np.testing.assert_equal(again.numbers, run.numbers)
    assert again.notes == [warning]


@pytest.mark.parametrize(("elbo", "above"), [(-3.4, True), (-3.6, False)])
def test_when_an_elbo_under_t_stands_above_what_q_can_have(elbo, above):
    """By more than half a nat and than three standard errors."""
    one = FINITE._replace(elbo=elbo, elbo_lower=-5.0, elbo_upper=-4.0, above_upper_error=0.1)
    assert one.above_its_bounds == above
    assert not one._replace(above_upper_error=0.3).above_its_bounds
    assert not FINITE._replace(elbo=10.0).above_its_bounds


@pytest.mark.slow
def test_a_semi_implicit_encoder_s_run_is_shown_both_ends():
    """And a T that is far off, which cannot be q's own KL, is warned of as what it is."""
    encoder = networks.SemiImplicitEncoder(networks.MLP((4,), input_rank=2), 3, (4,))
    of_t = small_method("avb", encoder=lambda trunk, latents: encoder, noise_dim=5)
    method = of_t._replace(elbo=lambda *given: (terms := of_t.elbo(*given))._replace(kl=terms.kl - 20.0))
    data = from_arrays(*np.random.default_rng(0).random((2, 8, 6, 6), np.float32), binarize="dynamic")
    run = looked(method, data, method.init(jax.random.key(0), jnp.asarray(data.train)))
    ((_, numbers),) = run.numbers
    assert numbers["held_out_elbo_lower"] < numbers["held_out_elbo_upper"]
    line, warning = run.notes
    assert "(without T: from " in line
    assert "above what q's own can be: T is behind the encoder" in warning


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bigan", DATA),  # no likelihood
        ("avb", from_arrays(game.points(8))),  # no held-out examples
        ("avb", iter(())),  # a user's own batches
    ],
)
def test_nothing_to_compare(name, data):
    run = looked(small_method(name), data, None)
    assert not run.numbers
    assert not run.notes


def test_a_prior_that_no_gaussian_fits_has_no_bound_to_compare():
    """Training goes on without it."""
    method = game.method(prior=dist.Uniform(-jnp.ones(2), 1).to_event(1))
    run = looked(method, from_arrays(game.points(8), game.points(4)), None)
    assert not run.numbers


def test_no_images():
    """None are asked for."""
    assert not looked(game.method(), DATA, game.state(), images=0).numbers


def test_the_best_state_is_kept(tmp_path, monkeypatch):
    """By the mean over seeds; through an interruption; that of the end counts, too; and it can be loaded and begun from."""
    method, data = small_method("vae"), from_arrays(*np.random.default_rng(0).random((2, 8, 6, 6), np.float32))
    bounds = []
    monkeypatch.setattr(held_out, "summarise", lambda found: FINITE._replace(log_likelihood=bounds.pop(0)))
    options = {"batch_size": 8, "num_seeds": 2, "checkpoint_every": 1, "log_every": 1, "workdir": tmp_path, "parallel": "jit"}

    def trained(steps, *of_pairs):
        bounds[:] = [of for mean in of_pairs for of in (mean - 1.0, mean + 1.0)]
        return avb_jax.fit(method, data, steps=steps, callbacks=[HeldOut(quiet=True)], **options)

    def best():
        return avb_jax.load(tmp_path, method, data.train, num_seeds=2, step="best").state

    second = trained(2, -9.0, -5.0)
    jax.tree.map(np.testing.assert_array_equal, best(), second)
    trained(4, -6.0, -5.5)
    jax.tree.map(np.testing.assert_array_equal, best(), second)  # of which checkpoints/ has nothing any more
    last = trained(5, -4.0)
    jax.tree.map(np.testing.assert_array_equal, best(), last)
    assert [path.name for path in (tmp_path / "best" / "vae").iterdir()] == ["5"]
    trained(5)  # it is finished, and nothing is looked at
    # Should the run have to begin again from an earlier state, the best one has never been.
    for step in (4, 5):
        shutil.rmtree(tmp_path / "checkpoints" / "vae" / str(step))
    with pytest.raises(IndexError):
        trained(5)
    with pytest.raises(UserError, match=r"no best checkpoint of vae in .*; held-out examples, and a method"):
        best()


@pytest.mark.slow
def test_a_run_that_has_stalled_ends(tmp_path, monkeypatch, capsys):
    """After so many checkpoints in a row without a better bound; it stays ended, and the best State is kept."""
    method, data = small_method("vae"), from_arrays(*np.random.default_rng(0).random((2, 8, 6, 6), np.float32))
    bounds = [-9.0, -8.0, math.nan, -7.0, -7.0, -7.5, -1.0]
    monkeypatch.setattr(held_out, "summarise", lambda found: FINITE._replace(log_likelihood=bounds.pop(0)))
    options = {"batch_size": 8, "checkpoint_every": 1, "log_every": 1, "steps": 10, "parallel": "jit"}

    def trained(**more):
        return avb_jax.fit(method, data, callbacks=[HeldOut(patience=2)], **options, **more)

    for _ in range(2):
        assert trained(workdir=tmp_path).step == 6
    assert "step 6: 2 checkpoints without a better bound than -7: done, and the best State is in" in capsys.readouterr().err
    assert checkpoints.steps(tmp_path / "best" / "vae") == [4]
    bounds[:] = [-9.0, -9.0, -9.5]
    assert trained().step == 3  # without a workdir, too
    with pytest.raises(UserError, match="patience=0: must be at least 1, or None"):
        HeldOut(patience=0)
    with pytest.raises(UserError, match=r"patience=2: vae has no bound on log p\(x\) to watch; give held-out examples"):
        avb_jax.fit(method, data.train, callbacks=[HeldOut(patience=2)], **options)


def test_a_disk_without_links(tmp_path, monkeypatch):
    """Files are copied then; and one that is full is a line."""
    state = {"a": jnp.arange(3)}
    checkpoints.save(tmp_path / "checkpoints", 1, state)
    monkeypatch.setattr(checkpoints.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    checkpoints.keep(tmp_path / "checkpoints", 1, tmp_path / "best", {"log_likelihood": -2.0})
    assert checkpoints.found(tmp_path / "best", 1) == {"log_likelihood": -2.0}
    np.testing.assert_array_equal(checkpoints.restore(tmp_path / "best", state)["a"], state["a"])
    monkeypatch.setattr(checkpoints.shutil, "copy2", lambda *paths: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match=r"the state of step 1 could not be kept there .*No space left on device"):
        checkpoints.keep(tmp_path / "checkpoints", 1, tmp_path / "other", {})
    assert not checkpoints.steps(tmp_path / "other")


@pytest.mark.slow
def test_products_are_in_float32_whatever_the_device_prefers():
    """In an evaluation, in looks at held-out examples, and in what weighs a density's draws; in nothing after them."""
    seen = []

    def noted(function):
        def with_note(*arguments):
            seen.append(jax.config.jax_default_matmul_precision)
            return function(*arguments)

        return with_note

    method = game.method()._replace(log_joint=noted(game.method().log_joint))
    avb_jax.evaluate(method, game.state(0.0), game.points(8), [avb_jax.evaluation.ImportanceSampling(samples=2)], quiet=True)
    looked(method, DATA, game.state(0.0), images=4)
    Weigher(lambda _, u: (u, jnp.ones_like(u)), noted(lambda z: -0.5 * jnp.sum(z**2)), 1, 1, 4)(None, jax.random.key(1), 10)
    assert {*seen} == {"float32"}
    assert jax.config.jax_default_matmul_precision != "float32"
