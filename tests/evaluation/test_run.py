"""`evaluate`: blocks, devices, seeds, results that are kept and continued, and an estimator of the user's own."""

import dataclasses
import json
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avb_jax
from avb_jax import Diverged, Interrupted, UserError, distributions
from avb_jax.data import Dataset, from_arrays
from avb_jax.evaluation import AIS, BDMC, ELBO, KNN, Estimator, ImportanceSampling, Moments, Quadrature
from avb_jax.evaluation import run as running
from avb_jax.evaluation.estimator import mean
from avb_jax.evaluation.run import by_blocks, evaluate, keep_folder, over_examples
from avb_jax.locks import locked
from tests.conftest import small_method
from tests.evaluation import game
from tests.evaluation.common import KEY, over


class Square(NamedTuple):
    """A result with a field that is left out."""

    value: jax.Array
    nothing: jax.Array | None = None


class Counting:
    """What notes the examples that it was asked for, and is interrupted after some calls."""

    def __init__(self, calls=100):
        self.asked, self.calls = [], calls

    def __call__(self, numbers):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += list(numbers)
        return Square(jnp.square(numbers))


def blocks(folder, estimate, count=10, block=4, **settings):
    """Squares of the numbers by blocks, kept in a folder."""
    keep_folder(folder, settings)
    return by_blocks("test", estimate, Square(jnp.zeros(block)), count, block, folder, lambda r: f"mean {r.value.mean()}")


def test_all_examples_once_in_blocks_of_one_size(tmp_path, capsys):
    estimate = Counting()
    result = blocks(tmp_path / "a", estimate)
    np.testing.assert_array_equal(result.value, np.arange(10) ** 2)
    assert result.nothing is None
    assert estimate.asked == list(range(12))  # the last block runs past the end
    assert "test example 10/10  mean 28.5" in capsys.readouterr().err


def test_blocks_that_were_interrupted_continue(tmp_path, capsys):
    with pytest.raises(Interrupted, match="stopped after example 4 of 10; what was done is kept"):
        blocks(tmp_path / "a", Counting(calls=1), draws=3)
    rest = Counting()
    np.testing.assert_array_equal(blocks(tmp_path / "a", rest, draws=3).value, np.arange(10) ** 2)
    assert rest.asked[0] == 4
    assert "test: continues after example 4" in capsys.readouterr().err
    nothing, more = Counting(), Counting()
    blocks(tmp_path / "a", nothing, draws=3)
    assert not nothing.asked
    np.testing.assert_array_equal(blocks(tmp_path / "a", nothing, count=6, draws=3).value, np.arange(6) ** 2)
    np.testing.assert_array_equal(blocks(tmp_path / "a", more, count=15, block=3, draws=3).value, np.arange(15) ** 2)
    assert more.asked == [10, 11, 12, 13, 14, 15]
    assert not list(tmp_path.rglob("*.partial"))
    with pytest.raises(Interrupted, match=r"stopped after example 4 of 10$"):
        by_blocks("test", Counting(calls=1), Square(jnp.zeros(4)), 10, 4, None, str, quiet=True)


def test_a_damaged_block_is_evaluated_again(tmp_path, capsys):
    """It and those after it; a bit that is flipped in an array counts, by the archive's own checksums."""
    blocks(tmp_path / "a", Counting())
    path = tmp_path / "a" / "0000004.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 130] ^= 1  # within the numbers
    for harmed in (bytes(content), b""):
        path.write_bytes(harmed)
        again = Counting()
        np.testing.assert_array_equal(blocks(tmp_path / "a", again).value, np.arange(10) ** 2)
        assert again.asked[0] == 4
        assert f"test: {path} is damaged; evaluated again from there" in capsys.readouterr().err


def test_an_estimator_without_a_number_leaves_the_others():
    class Without(MeanMass):
        name: ClassVar[str] = "without"

        def run(self, subject):
            raise Diverged("a: some sample occurs more than 10 times")

    report = evaluate(game.method(), game.state(0.5), game.points(7), [Without(), MeanMass()], quiet=True)
    assert ("mass", "mass") in report
    assert "avb: without has no number: a: some sample occurs more than 10 times" in report.notes


def test_other_settings_begin_anew(tmp_path):
    blocks(tmp_path / "a", Counting(), draws=3)
    again = Counting()
    blocks(tmp_path / "a", again, draws=4)
    assert again.asked[0] == 0
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"draws": 4}


class Mass(NamedTuple):
    """Per example."""

    mass: jax.Array  # [N]
    noise: jax.Array  # [N]


@dataclasses.dataclass(frozen=True)
class MeanMass(Estimator):
    """A user's own: the sum of an example's numbers, and a number of its own randomness, scaled."""

    scale: float = 1.0

    name: ClassVar[str] = "mass"
    requires: ClassVar[tuple[str, ...]] = ("decode",)
    traces: ClassVar[list] = []

    def __call__(self, method, key, state, x):
        self.traces.append(x.shape)
        return Mass(self.scale * x.sum() + state.params.adversary["offset"], jax.random.normal(key))

    def numbers(self, subject, found):
        return {("mass", self.name): mean(found.mass), ("noise", self.name): mean(found.noise)}

    def describe(self, found):
        return f"so far {found.mass.mean():.2f}"


def test_an_estimator_of_the_user_s_own(capsys):
    """By the name and settings that it has, on the held-out examples; its progress on the terminal, where it is wanted."""
    data = Dataset(game.points(9) + 5.0, game.points(7))
    report = avb_jax.evaluate(game.method(), game.state(offset=0.5), data, [MeanMass(scale=2.0, chunk=2)])
    number = report["mass", "mass"]
    expected = 2.0 * game.points(7).sum(axis=1) + 0.5
    np.testing.assert_allclose(number.per_example, expected, rtol=1e-5)
    assert number.mean == pytest.approx(expected.mean(), rel=1e-5)
    assert number.examples == 7
    assert report.name == "avb"
    assert f"avb mass example 7/7  so far {expected.mean():.2f}" in capsys.readouterr().err
    np.testing.assert_array_equal(report.results[0]["mass"].mass, number.per_example)
    few = avb_jax.evaluate(game.method(), game.state(0.5), data, [MeanMass(scale=2.0, images=3)], name="mine", quiet=True)
    np.testing.assert_allclose(few["mass", "mass"].per_example, expected[:3], rtol=1e-5)
    assert few.name == "mine"
    assert capsys.readouterr().err == ""
    avb_jax.evaluate(game.method(), game.state(0.5), data, [MeanMass(images=3)])
    assert "avb: mass: 3 images\n" in capsys.readouterr().err
    avb_jax.evaluate(game.method(), game.state(0.5), data, [ELBO(draws=2)])
    assert "avb: elbo: 7 images, 2 draws\n" in capsys.readouterr().err  # all of them


def test_several_seeds_compile_once(capsys):
    """Each with its own state and randomness, and one program for all."""
    offsets = jnp.array([0.0, 1.0, 5.0])
    states = jax.vmap(lambda offset: game.state()._replace(params=game.state(offset).params))(offsets)
    assert states.params.adversary["offset"].shape == (3,)
    MeanMass.traces.clear()
    one = evaluate(game.method(), game.state(0.0), game.points(8), [MeanMass()], quiet=True)
    traces = len(MeanMass.traces)
    report = evaluate(game.method(), states, game.points(8), [MeanMass()], num_seeds=3, quiet=True)
    assert len(MeanMass.traces) == 2 * traces
    mass, noise = report["mass", "mass"], report["noise", "mass"]
    assert mass.per_example.shape == noise.per_example.shape == (3, 8)
    np.testing.assert_allclose(mass.per_example, one["mass", "mass"].per_example + np.asarray(offsets)[:, None], rtol=1e-5)
    np.testing.assert_allclose(mass.per_seed, mass.per_example.mean(axis=1), rtol=1e-5)
    assert mass.seeds_error == pytest.approx(np.std(mass.per_seed, ddof=1) / np.sqrt(3))
    assert len(np.unique(noise.per_example)) == 24
    np.testing.assert_array_equal(noise.per_example[0], one["noise", "mass"].per_example)
    assert len(report.results) == 3
    evaluate(game.method(), states, game.points(8), [MeanMass(images=2)], num_seeds=3)
    shown = capsys.readouterr().err
    assert shown.count("avb: mass: 2 images, for each of 3 seeds\n") == 1
    assert "of seed" not in shown  # each is one call
    evaluate(game.method(), states, game.points(20), [MeanMass(chunk=1)], num_seeds=3)
    assert "avb mass of seed 2 example 20/20" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """The numbers of the examples that `evaluate` has asked for, in order; it is interrupted where 'stop' is in the list."""
    numbers = []

    def counted(function, devices=None):
        split = over_examples(function, devices)

        def run(key, state, these, *arrays):
            if isinstance(these, np.ndarray):
                if "stop" in numbers:
                    raise KeyboardInterrupt
                numbers.extend(these.tolist())
            return split(key, state, these, *arrays)

        return run

    monkeypatch.setattr(running, "over_examples", counted)
    monkeypatch.setattr(running, "examples_per_call", lambda count, chunk: chunk)
    return numbers


@pytest.mark.slow
def test_an_evaluation_continues_and_does_no_work_twice(tmp_path, asked):
    method, state, x = game.method(), game.state(), game.points(12)
    whole = evaluate(method, state, x, [MeanMass(chunk=4), ImportanceSampling(samples=3, chunk=4)], quiet=True)
    assert asked == [*range(12)] * 2
    asked[:] = []

    def again(*estimators, images=x, **options):
        before = len(asked)
        report = evaluate(method, state, images, estimators, quiet=True, workdir=tmp_path, **options)
        return report, asked[before:]

    _, new = again(MeanMass(images=8, chunk=4))
    assert new == [*range(8)]
    asked.append("stop")
    with pytest.raises(Interrupted, match="avb mass: stopped after example 8 of 12; what was done is kept"):
        again(MeanMass(chunk=4), ImportanceSampling(samples=3, chunk=4))
    asked.remove("stop")
    report, new = again(MeanMass(chunk=4), ImportanceSampling(samples=3, chunk=4))
    assert new == [*range(8, 12), *range(12)]
    assert report.to_json() == whole.to_json()
    report, new = again(ImportanceSampling(samples=3, chunk=8), MeanMass(chunk=12))  # other blocks, and in another order
    assert new == []
    assert report.to_json().keys() == whole.to_json().keys()
    assert again(MeanMass(chunk=4), name="other")[1] == [*range(12)]
    assert again(MeanMass(chunk=4, scale=3.0))[1] == [*range(12)]  # which are kept in the place of the others
    assert again(MeanMass(chunk=4))[1] == [*range(12)]


@pytest.mark.slow
def test_results_are_of_the_state_the_data_and_the_seed(tmp_path):
    """Other params, examples, or another seed: other numbers, and none is taken for another's."""
    estimator, x = ImportanceSampling(samples=20), game.points(8)

    def of(state=None, x=x, folder=tmp_path, **options):
        state = game.state() if state is None else state
        return evaluate(game.method(), state, x, [estimator], quiet=True, workdir=folder, **options).to_json()

    first = of()
    two = jax.tree.map(lambda a: jnp.stack([a, a]), game.state())
    seeds = evaluate(game.method(), two, x, [estimator], num_seeds=2, quiet=True)["log_likelihood", "importance"].per_seed
    assert seeds[0] == first["log_likelihood_importance"]["mean"] != seeds[1]
    binary = from_arrays(np.clip(x, 0, 1), binarize="threshold")
    for other in ({"state": game.state(w=jnp.full(2, 0.8))}, {"x": x + 0.1}, {"seed": 1}, {"x": binary}):
        assert of(**other) != first
        assert of() == first
    assert of(x=binary, folder=None) != of(x=np.clip(x, 0, 1), folder=None)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert written
    assert of() == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == written
    assert {path.parent for path in written} == {tmp_path / "evaluation" / "avb-0" / "importance"}


@pytest.mark.slow
def test_results_are_of_the_method_and_of_all_examples(tmp_path):
    """Also where it differs in what no State has, its likelihood, and they after the first sixteen."""
    x = np.array(game.points(24))

    def of(sigma=game.SIGMA, x=x, folder=tmp_path):
        made = game.method(likelihood=distributions.gaussian(sigma))
        return evaluate(made, game.state(), x, [ImportanceSampling(samples=5)], quiet=True, workdir=folder).to_json()

    first, changed = of(), x.copy()
    changed[20] += 1.0
    for other in ({"sigma": 2 * game.SIGMA}, {"x": changed}):
        assert of(**other) == of(**other, folder=None) != first
    assert of() == first


def test_a_state_of_other_seeds_is_refused():
    """JAX takes an index beyond the end for the last one."""
    three, x = jax.tree.map(lambda a: jnp.stack([a, a, a]), game.state()), game.points(4)
    for state, num_seeds, message in (
        (three, 5, "num_seeds=5: the State has 3 seeds; give 3"),
        (three, None, "num_seeds=None: the State has 3 seeds; give 3"),
        (game.state(), 1, "num_seeds=1: the State has no axis of seeds; give None"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(game.method(), state, x, [ImportanceSampling(samples=2)], num_seeds=num_seeds, quiet=True)


class Locking(MeanMass):
    """An estimator that sees whether others may write where it does."""

    def run(self, subject):
        with pytest.raises(UserError, match="writes to it"), locked(subject.folder / "evaluation", "workdir"):
            pass
        return super().run(subject)


def test_one_evaluation_at_a_time_writes_to_a_workdir(tmp_path):
    evaluate(game.method(), game.state(), game.points(4), [Locking()], quiet=True, workdir=tmp_path)
    with locked(tmp_path / "evaluation", "workdir"):
        pass


ANNEALED = {"chains": 2, "temperatures": 3, "leapfrog_steps": 2}
ESTIMATORS = {
    "ais": ("game", AIS(**ANNEALED), AIS(chunk=2, **ANNEALED)),
    "bdmc": ("game", BDMC(images=12, **ANNEALED), BDMC(images=12, chunk=2, **ANNEALED)),
    "quadrature": ("game", Quadrature(points=10), Quadrature(points=10, chunk=100)),
    "importance": ("avb", ImportanceSampling(samples=8), ImportanceSampling(samples=8, chunk=2)),
    "elbo": ("avb", ELBO(draws=2), ELBO(draws=2, chunk=2)),
    "elbo with a density": ("vae", ELBO(draws=2), ELBO(draws=2, chunk=2)),
    "moments": ("avb", Moments(draws=3), Moments(draws=3, chunk=2)),
}


LONG = ("ais", "bdmc", "quadrature")  # to compile; what they share with the others is tested by those


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in ESTIMATORS])
def test_estimates_do_not_depend_on_chunk_or_devices(name):
    """Of twelve examples in another order: binarised images, by small methods with batch statistics, or the game's points."""
    kind, whole, in_chunks = ESTIMATORS[name]
    if kind == "game":
        method, state, images, binarize = game.method(), game.state(), jnp.asarray(game.points(12)), "none"
    else:
        images, binarize = jax.random.uniform(jax.random.key(7), (12, 6, 6)), "dynamic"
        method = small_method(kind, batch_norm=True)
        state = method.init(jax.random.key(0), images)
    arrays = () if name == "bdmc" else (images,)  # which makes its own

    def split(key, state, numbers, images=None):
        return in_chunks.over(method, key, state, images, numbers, binarize)

    one = over(whole, method, state, *(arrays or (None,)), numbers=jnp.arange(12), binarize=binarize)
    key, state, *arrays = jax.device_put((KEY, state, *arrays), jax.devices()[0])  # committed, as a restored State is
    order = np.roll(np.arange(12), 5)  # an example's estimate follows from its number
    on_four = over_examples(split, jax.devices()[:4])(key, state, order, *(array[order] for array in arrays))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[order], b, rtol=1e-4, atol=1e-4), one, on_four)


def test_what_a_method_lacks_is_named():
    method = small_method("bigan")
    with pytest.raises(UserError, match=r"^AIS: mine has no likelihood p\(x\|z\)$"):
        evaluate(method, None, game.points(4), [Moments(), AIS()], name="mine")
    with pytest.raises(UserError, match=r"^KNN: gan has no encoder$"):
        evaluate(small_method("gan"), None, game.points(4), [KNN()])
    requires = dataclasses.make_dataclass("Odd", [], bases=(MeanMass,), frozen=True, namespace={"requires": ("train_step",)})
    assert requires().lacks(method._replace(train_step=None)) == "has no train_step"


def test_two_of_one_name_are_refused():
    """Or else the numbers of one would stand in the place of the other's."""
    with pytest.raises(UserError, match="estimators: 'ais' is given 2 times; evaluate each in a call of its own"):
        evaluate(game.method(), game.state(), game.points(4), [AIS(), AIS(initial="prior")])


@pytest.mark.slow
def test_an_infinite_example_is_reported(capsys):
    """In the mean, with a note and a reason, and in the progress; the others' mean is in the reason alone."""
    x = np.ones((8, 2), np.float32)
    x[5] = 1e20  # whose square is infinite
    estimators = [ImportanceSampling(samples=500), Quadrature(points=20), ELBO(draws=2)]
    report = evaluate(game.method(), game.state(), x, estimators)
    finite = evaluate(game.method(), game.state(), np.delete(x, 5, axis=0), estimators, quiet=True)
    lost = [("log_likelihood", "importance"), ("log_likelihood", "quadrature"), ("elbo", "adversary")]
    for key in [*lost, ("reconstruction_error", "adversary")]:
        number = report[key]
        assert number.mean == (-np.inf if key in lost else np.inf), key
        assert number.examples_error is number.estimator_error is number.standard_error is None
        assert number.reason.startswith("1 of 8 examples have no finite value; the mean over the other 7, "), key
        assert number.reason.endswith("is biased upwards" if key in lost else "is biased downwards")
        assert f"avb: {', '.join(key)}: {number.reason}" in report.notes
    number, expected = report[lost[0]], finite[lost[0]]
    others = float(number.reason.split(", ")[1])
    assert abs(others - expected.mean) < 4 * np.sqrt(2) * expected.estimator_error + 1e-3
    assert "example 8/8  log-likelihood -inf (1 of 8 examples have no finite value" in capsys.readouterr().err


@pytest.mark.slow
def test_all_log_likelihoods_of_the_game():
    """Estimators that share nothing but the model agree with log p(x), and bounds of simulated data with its entropy."""
    x = game.points(40)
    annealing = {"chains": 10, "temperatures": 6, "leapfrog_steps": 3, "fit_draws": 500, "inflation": 1.5}
    estimators = [
        ImportanceSampling(samples=1000, fit_draws=500, inflation=1.5),
        AIS(**annealing),
        Quadrature(points=200),
        BDMC(images=40, **annealing),
    ]
    report = evaluate(game.method(), game.state(), x, estimators, quiet=True)
    exact = game.log_evidence(x)
    for estimator in ("importance", "ais", "quadrature"):
        number = report["log_likelihood", estimator]
        assert number.examples == 40
        assert abs(number.mean - exact.mean()) < 4 * (number.estimator_error or 0.0) + 1e-3
        np.testing.assert_allclose(number.examples_error, exact.std(ddof=1) / np.sqrt(40), rtol=0.1)
    assert report["log_likelihood", "quadrature"].estimator_error is None
    entropy = 1 + np.log(2 * np.pi) + 2 * np.log(np.hypot(game.W, game.SIGMA))
    lower, upper, width = (report[f"{what}", "bdmc"] for what in ("log_likelihood_lower", "log_likelihood_upper", "width"))
    for number in (lower, upper):
        assert abs(number.mean + entropy) < 4 * number.examples_error
        np.testing.assert_allclose(number.examples_error, 1 / np.sqrt(40), rtol=0.4)  # log p(x) is chi^2_2 / 2: variance 1
    assert -4 * width.estimator_error < width.mean < 0.5
    assert report.notes == []

    found, weight = report.results[0]["ais"], np.exp(np.float64(report.results[0]["ais"].log_weight))
    relative = weight.std(axis=1, ddof=1) / weight.mean(axis=1) / np.sqrt(10)
    number = report["log_likelihood", "ais"]
    assert number.mean == pytest.approx(np.log(weight.mean(axis=1)).mean(), rel=1e-4)
    assert number.estimator_error == pytest.approx(np.sqrt(np.sum(relative**2)) / 40, rel=1e-3)
    size = weight.sum(axis=1) ** 2 / np.square(weight).sum(axis=1)
    assert report["effective_sample_size", "ais"].mean == pytest.approx(size.mean(), rel=1e-4)
    assert 0.5 < found.acceptance.mean() < 1
    assert report["acceptance", "ais"].mean == pytest.approx(found.acceptance.mean(), rel=1e-4)
    assert report["divergent", "ais"].mean == 0
