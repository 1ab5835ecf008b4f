"""What `experiments.evaluate` reports, end to end, on models whose every quantity is known; and what it makes of infinities."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from avb_jax import Players, StandardNormal, State, workdir
from avb_jax.data import Dataset
from avb_jax.evaluation import knn, quadrature
from avb_jax.evaluation.ais import AnnealedEstimate
from avb_jax.evaluation.elbo import ElboEstimate
from avb_jax.evaluation.importance import ImportanceEstimate
from avb_jax.evaluation.moments import PosteriorDraws
from avb_jax.evaluation.optimality import AdversaryTerms
from avb_jax.methods import avb, vae
from experiments import compare, estimators, evaluate, mnist, suites, synthetic
from experiments.configs import evaluate as evaluate_config
from experiments.configs import mnist as mnist_config
from experiments.configs import synthetic as synthetic_config
from experiments.estimators import Number, Subject
from tests import gaussian, ppca

COUNT = 40  # of 60 test examples
OPTIONS = {
    "elbo.images": COUNT, "elbo.draws": 100, "optimality.images": COUNT, "optimality.draws": 100, "optimality.steps": 5,
    "optimality.batch_size": 20, "optimality.rate": 0.03, "importance.images": COUNT, "importance.samples": 1000,
    "importance.fit_draws": 500, "importance.inflation": 1.5, "ais.images": COUNT, "ais.chains": 10, "ais.temperatures": 6,
    "ais.leapfrog_steps": 3, "ais.chunk": 10, "bdmc.images": COUNT, "quadrature.images": COUNT, "quadrature.points": 200,
    "moments.images": 60, "moments.draws": 50, "knn.images": COUNT, "knn.draws": 1000, "knn.codes": 9000,
}  # fmt: skip
M, C, S, W = 0.8, -0.3, np.exp(-0.5), 0.9  # the game of tests/gaussian.py: z = m x + c + s noise, x = w z + sigma noise
OFFSET = 1.0  # by which T is off


def subject_of(folder, method, model, state, test, **options):
    """A run of the method, as `evaluate.load` gives it, whose training examples are others than `test`."""
    config, chosen = synthetic_config.get_config(), evaluate_config.get_config()
    chosen.update_from_flattened_dict({**OPTIONS, **options})
    dataset = Dataset(test[::-1] + 5.0, test)
    return Subject(method.__name__.rpartition(".")[2], method, model, dataset, config, chosen, folder, 0, state, [])


def game(folder, test=None, offset=OFFSET, **options):
    """The Gaussian game; the second of its two pixels hardly moves, so that one of two latents is active."""
    if test is None:
        test = np.random.default_rng(0).standard_normal((60, 2)) * [1.0, 0.05] + [1.0, -1.0]
    encoder = {name: jnp.full(2, value) for name, value in (("m", M), ("c", C), ("log_s", np.log(S)))}
    params = Players(encoder, {"w": jnp.full(2, W)}, {**encoder, "offset": jnp.asarray(offset)})
    state = State(jnp.zeros((), jnp.int32), params, Players(), Players({}, {}, {}), None)
    return subject_of(folder, avb, gaussian.model(), state, np.float32(test), **options)


def monte_carlo(x, draws=20_000):
    """Of the game, z ~ q(z|x) and z ~ p(z) [N, draws, 2], and the exact log q(z|x) - log p(z) as a function of z."""
    noise = np.random.default_rng(1).standard_normal((2, len(x), draws, 2))
    mean = M * x[:, None] + C
    return mean + S * noise[0], noise[1], lambda z: np.sum(
        stats.norm.logpdf(z, mean, S) - stats.norm.logpdf(z), axis=-1
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All numbers of the game but those of T's optimality, the subject, and its first COUNT test examples."""
    subject = game(tmp_path_factory.mktemp("game"))
    numbers = {}
    for what, estimator in estimators.ESTIMATORS.items():
        numbers |= estimator(subject) if what != "optimality" else {}
    return numbers, subject, np.float64(subject.dataset.test[:COUNT])


def log_evidence(x):
    return np.sum(stats.norm.logpdf(x, 0, np.hypot(W, gaussian.SIGMA)), axis=-1)


def posterior_kl(x):
    """KL(q(z|x), p(z)) [N]."""
    return 0.5 * np.sum((M * x + C) ** 2 + S**2 - 1 - 2 * np.log(S), axis=-1)


def assert_mean_of(number, exact, error=0.0):
    """The mean of `exact` [COUNT] up to 4 of the estimator's errors, and the spread of the examples with those errors added."""
    error = number.estimator_error or error
    assert number.examples == COUNT
    assert abs(number.mean - exact.mean()) < 4 * error + 1e-4
    spread = exact.std(ddof=1) / np.sqrt(COUNT)
    by_chance = error * spread / (error**2 + spread**2) / np.sqrt(COUNT)  # one standard error, relative
    np.testing.assert_allclose(number.examples_error, np.hypot(spread, error), rtol=4 * by_chance + 0.02)


def test_elbo_under_t(found):
    """With T's offset in it, and errors as the spread of the draws has them."""
    numbers, _, x = found
    z, _, log_ratio = monte_carlo(x, 2000)
    reconstruction = -np.sum(stats.norm.logpdf(x[:, None], W * z, gaussian.SIGMA), axis=-1)
    t = log_ratio(z) + OFFSET
    elbo = -reconstruction - t
    assert_mean_of(numbers["elbo"], elbo.mean(axis=1))
    error = np.sqrt(np.mean(elbo.var(axis=1)) / OPTIONS["elbo.draws"] / COUNT)
    np.testing.assert_allclose(numbers["elbo"].estimator_error, error, rtol=0.1)
    for quantity, values in (("reconstruction_error", reconstruction), ("kl", t)):
        assert_mean_of(numbers[quantity], values.mean(axis=1), np.sqrt(values.var(axis=1).mean() / 100 / COUNT))


def test_log_likelihoods(found):
    numbers, _, x = found
    exact = log_evidence(x)
    for quantity in ("log_likelihood_importance", "log_likelihood_ais", "log_likelihood_quadrature"):
        assert_mean_of(numbers[quantity], exact)
    assert numbers["log_likelihood_quadrature"].estimator_error is None
    # Importance weights p(z|x) / r(z) of r = N(m x + c, (1.5 s)^2): E[w^2], by draws of r.
    precision = 1 + W**2 / gaussian.SIGMA**2
    mean, std = W / gaussian.SIGMA**2 / precision * x[:, None], 1 / np.sqrt(precision)
    start = M * x[:, None] + C, 1.5 * S
    z = start[0] + start[1] * np.random.default_rng(2).standard_normal((COUNT, 20_000, 2))
    square = np.exp(2 * np.sum(stats.norm.logpdf(z, mean, std) - stats.norm.logpdf(z, *start), axis=-1)).mean(axis=1)
    size = numbers["effective_sample_size_importance"]
    np.testing.assert_allclose(size.mean, np.mean(1000 / square), rtol=0.05)
    error = np.sqrt(np.mean(square - 1) / 1000 / COUNT)
    np.testing.assert_allclose(numbers["log_likelihood_importance"].estimator_error, error, rtol=0.1)


def test_annealed_importance_sampling_reports_its_chains(found):
    """By NumPy from the weights that are kept of each image."""
    numbers, subject, _ = found
    kept = [dict(np.load(block)) for block in sorted((subject.folder / "evaluation" / "avb-0" / "ais").glob("*.npz"))]
    weight = np.exp(np.concatenate([block["log_weight"] for block in kept]), dtype=np.float64)
    assert weight.shape == (COUNT, 10)
    relative = weight.std(axis=1, ddof=1) / weight.mean(axis=1) / np.sqrt(10)
    size = weight.sum(axis=1) ** 2 / np.square(weight).sum(axis=1)
    assert numbers["log_likelihood_ais"].mean == pytest.approx(np.log(weight.mean(axis=1)).mean(), rel=1e-4)
    assert numbers["log_likelihood_ais"].estimator_error == pytest.approx(np.sqrt(np.sum(relative**2)) / COUNT, rel=1e-3)
    assert numbers["effective_sample_size_ais"].mean == pytest.approx(size.mean(), rel=1e-4)
    acceptance = np.concatenate([block["acceptance"] for block in kept]).mean()
    assert 0.5 < acceptance < 1
    assert numbers["acceptance_ais"].mean == pytest.approx(acceptance, rel=1e-4)
    assert numbers["divergent_ais"].mean == 0


def test_bounds_of_simulated_data(found):
    """About the negative entropy of the model's x, in order, at so few temperatures; the width has the errors of both."""
    numbers, _, _ = found
    lower, upper, width = (numbers[f"bdmc_{what}"] for what in ("lower", "upper", "width"))
    entropy = 1 + np.log(2 * np.pi) + 2 * np.log(np.hypot(W, gaussian.SIGMA))
    for number in (lower, upper):
        assert abs(number.mean + entropy) < 4 * number.examples_error
        np.testing.assert_allclose(number.examples_error, 1 / np.sqrt(COUNT), rtol=0.4)  # log p(x) is chi^2_2 / 2: variance 1
    np.testing.assert_allclose(width.mean, upper.mean - lower.mean, rtol=1e-3)
    np.testing.assert_allclose(width.estimator_error, np.hypot(lower.estimator_error, upper.estimator_error), rtol=1e-5)
    assert -4 * width.estimator_error < width.mean < 0.5


def test_moments(found, tmp_path):
    """One latent of two is active, and both where both pixels move."""
    numbers, subject, _ = found
    assert numbers["active_units"] == Number(1.0)
    variance = numbers["posterior_variance"]
    assert variance.examples == 60
    assert abs(variance.mean - S**2) < 4 * variance.examples_error
    np.testing.assert_allclose(variance.examples_error, S**2 * np.sqrt(1 / 49 / 60), rtol=0.4)  # two variances of 50 draws
    assert (subject.folder / "figures" / "avb_latents.png").exists()
    both = game(tmp_path, np.random.default_rng(0).standard_normal((60, 2)))
    assert estimators.evaluate_moments(both)["active_units"].mean == 2


def test_knn_and_mutual_information(found):
    """KL(q(z), p(z)) against a grid, and not KL(p(z), q(z)); I(x; z) above 0 by more than that KL."""
    numbers, subject, x = found
    test = np.float64(subject.dataset.test)
    means, stds = jnp.asarray(M * test + C), jnp.full((60, 2), S)
    aggregated = float(quadrature.mixture_kl(means, stds, StandardNormal(2)))
    assert aggregated > 0.3
    assert_mean_of(numbers["kl_knn"], posterior_kl(x), 0.01)
    assert numbers["kl_aggregated_posterior"].mean == pytest.approx(aggregated, abs=0.06)
    assert numbers["kl_aggregated_posterior_gaussian"].mean == pytest.approx(aggregated, abs=0.04)
    information = numbers["mutual_information"]
    assert information.mean == pytest.approx(posterior_kl(x).mean() - aggregated, abs=0.06)
    assert information.mean == pytest.approx(numbers["kl_knn"].mean - numbers["kl_aggregated_posterior_gaussian"].mean)
    assert information.examples_error == pytest.approx(numbers["kl_knn"].examples_error)
    assert (subject.folder / "figures" / "avb_adversary_calibration.png").exists()


def test_notes_of_the_game(found):
    """T's word, and no more: nothing diverges, nothing is coarse, nothing is infinite."""
    assert found[1].notes == ["avb: the ELBO and its KL take T's word for the KL: estimates that bound nothing"]


@pytest.mark.parametrize("after", [0.0, 3.0])
def test_optimality(tmp_path, monkeypatch, after):
    """The gap is T's loss less the fresh one's, and a fresh T that is worse is noted; the fresh T is trained as told."""
    told = {}

    def fit(method, model, optimizers, dataset, **options):
        gradient = jax.tree.map(jnp.ones_like, options["state"].params.adversary)
        gradient = jax.tree.map(lambda a: a[0], gradient)
        step, _ = optimizers.adversary.update(gradient, optimizers.adversary.init(gradient))
        told.update(options, method=method, dataset=dataset, step=float(step["offset"]))
        adversary = {**options["state"].params.adversary, "offset": jnp.full(1, after)}
        return options["state"]._replace(params=options["state"].params._replace(adversary=adversary))

    monkeypatch.setattr(estimators, "fit", fit)
    subject = game(tmp_path, seed=7)
    numbers, x = estimators.evaluate_optimality(subject), np.float64(subject.dataset.test[:COUNT])
    assert (told["steps"], told["batch_size"]) == (5, 20)
    assert told["seed"] not in (subject.options.seed, subject.options.seed + 1)  # whose streams a training may have used
    assert told["step"] == pytest.approx(-0.03, rel=1e-4)
    assert told["dataset"] is subject.dataset
    assert told["state"].params.adversary["offset"] == 0
    z, prior, log_ratio = monte_carlo(x, 2000)
    losses = {}
    for quantity, offset in (("adversary_loss", OFFSET), ("adversary_loss_fresh", after)):
        losses[quantity] = np.logaddexp(0, -log_ratio(z) - offset) + np.logaddexp(0, log_ratio(prior) + offset)
        error = np.sqrt(losses[quantity].var(axis=1).mean() / 100 / COUNT)
        assert_mean_of(numbers[quantity], losses[quantity].mean(axis=1), error)
    gap = losses["adversary_loss"].mean() - losses["adversary_loss_fresh"].mean()
    assert (gap > 0) == (after == 0)
    assert numbers["optimality_gap"].mean == pytest.approx(gap, abs=0.05)
    assert_mean_of(numbers["kl_fresh_adversary"], posterior_kl(x) + after, 0.02)
    assert [("still worse than T after 5 steps" in note) for note in subject.notes] == ([True] if after else [])


def test_a_vae_of_known_posterior(tmp_path):
    """Probabilistic PCA: what the encoder tells is taken as it is, and there is no T to note."""
    case = ppca.Case(2, count=60)
    subject = subject_of(tmp_path, vae, case.model, case.state, case.x)
    numbers = {**estimators.evaluate_elbo(subject), **estimators.evaluate_knn(subject)}
    means = (case.x - np.asarray(case.state.params.encoder["b"])) @ np.asarray(case.state.params.encoder["a"]).T
    means, variance = means + 0.2 * case.posterior_std, case.posterior_std**2
    kl = 0.5 * np.sum(means**2 + variance - 1 - np.log(variance), axis=1)
    np.testing.assert_allclose(numbers["kl"].mean, kl[:COUNT].mean(), rtol=1e-4)
    aggregated = numbers["kl_aggregated_posterior_gaussian"].mean
    np.testing.assert_allclose(numbers["mutual_information"].mean, kl[:COUNT].mean() - aggregated, rtol=1e-4)
    np.testing.assert_allclose(
        numbers["mutual_information"].examples_error, kl[:COUNT].std(ddof=1) / np.sqrt(COUNT), rtol=1e-4
    )
    assert abs(numbers["kl_knn"].mean - kl[:COUNT].mean()) < 0.02
    blocks = sorted((tmp_path / "evaluation" / "vae-0" / "posterior").glob("*.npz"))
    by_draws = [knn.kl_to_standard_normal(z) for block in blocks for z in np.load(block)["z"]]
    assert numbers["kl_knn"].mean == pytest.approx(np.mean(by_draws))
    assert not subject.notes


def test_the_runs_that_are_evaluated(tmp_path, monkeypatch, capsys):
    """Each seed with its own state, the methods and as many seeds as are named; a run that is not finished is said to be so."""
    config = synthetic_config.get_config()
    config.num_seeds, config.steps = 3, 50
    workdir.claim(tmp_path, config.to_dict())
    states = State(jnp.full(3, 40), jnp.arange(3), None, None, None)
    restored = []
    monkeypatch.setattr(evaluate, "initial_state", lambda *arguments: arguments[-2:])
    monkeypatch.setattr(evaluate, "_restore", lambda folder, name, like: restored.append((name, like)) or states)
    options = evaluate_config.get_config()
    loaded = evaluate.load(options, tmp_path, notes := [])
    assert restored == [("avb", (0, 3)), ("vae", (0, 3))]
    for name, subjects in loaded.items():
        assert [(s.name, s.seed, int(s.state.params)) for s in subjects] == [(name, 0, 0), (name, 1, 1), (name, 2, 2)]
        assert all(s.notes is notes and s.folder == tmp_path and s.config.steps == 50 for s in subjects)
    assert "vae: 3 of 3 seeds at step 40, not finished: its config has 50" in capsys.readouterr().out
    options.method, options.seeds = "vae", 2
    ((name, subjects),) = evaluate.load(options, tmp_path, []).items()
    assert (name, len(subjects), subjects[0].method) == ("vae", 2, vae)
    assert restored[-1] == ("vae", (0, 3))  # the checkpoint has all seeds


def test_randomness_is_of_the_seed_and_results_are_kept(tmp_path):
    """Another seed of the run or of the evaluation, other params or images: other numbers; but none is made twice."""
    options = {"importance.images": 8, "importance.samples": 20}
    of = lambda subject: estimators.evaluate_importance(subject)["log_likelihood_importance"].mean  # noqa: E731
    one = game(tmp_path, **options)
    first = of(one)
    others = [one._replace(seed=1), game(tmp_path, seed=1, **options), game(tmp_path, test=one.dataset.test + 0.1, **options)]
    params = one.state.params._replace(decoder={"w": jnp.full(2, 0.8)})
    others.append(one._replace(state=one.state._replace(params=params)))
    for other in others:
        assert of(other) != first
        assert of(one) == first  # the other's are not taken for its own
    assert of(game(tmp_path / "others", **options, **{"importance.chunk": 1})) == pytest.approx(first, rel=1e-6)
    binary = game(tmp_path / "binary", **options)
    assert of(binary._replace(dataset=binary.dataset._replace(binarize="threshold"))) != pytest.approx(first, rel=1e-3)
    blocks = list((tmp_path / "evaluation" / "avb-0" / "importance").glob("*.npz"))
    written = [block.stat().st_mtime_ns for block in blocks]
    assert of(one) == first
    assert [block.stat().st_mtime_ns for block in blocks] == written


def test_chains_that_diverge_are_noted(tmp_path):
    subject = game(tmp_path)
    estimators._check_chains(subject, "ais", np.array([[0.05, 0.1], [0.2, 0.9]]))
    (note,) = subject.notes
    assert note.startswith("avb: ais: 2 of 4 chains diverged in more than 10%")


def test_what_a_method_lacks(tmp_path):
    """By the kinds of its players, and for 'auto' by the number of latents."""
    subject, everything = game(tmp_path), set(estimators.ESTIMATORS)
    assert set(estimators.applicable(subject)) == everything
    assert not estimators.missing(subject)
    many = subject._replace(model=types.SimpleNamespace(prior=StandardNormal(4)))
    assert set(estimators.applicable(many)) == everything - {"quadrature"}
    likelihoods = {"elbo", "quadrature", "importance", "ais", "bdmc", "optimality"}
    for players, elbo, lacking in (
        (Players("gaussian", "likelihood", None), True, {"optimality"}),
        (Players("implicit", "likelihood", "pairs"), False, {"elbo"}),
        (Players("implicit", "deterministic", "pairs"), True, likelihoods),
        (Players(None, "likelihood", "pairs"), True, {"knn", "moments"}),
    ):
        method = types.SimpleNamespace(PLAYERS=players, **({"elbo_terms": None} if elbo else {}))
        assert set(estimators.missing(subject._replace(method=method))) == lacking


def test_a_number_of_seeds_and_of_examples():
    """Means and standard errors by hand; over seeds, those over examples add up as of independent means."""
    number = estimators._mean(np.array([1.0, 2.0, 6.0]), np.array([0.3, 0.4, 1.2]))
    assert number == Number(3.0, 3, pytest.approx(np.sqrt(7 / 3)), pytest.approx(1.3 / 3))
    assert estimators._mean(np.array([2.0]), np.array([np.nan])) == Number(2.0, 1)
    assert estimators._so_far("ELBO", np.array([1.0, 2.0, 6.0])) == "ELBO 3.00 +- 1.53"
    assert estimators._so_far("T loss", np.array([1.25]), 4) == "T loss 1.2500"
    assert estimators._mean(np.array([2.0, 4.0])) == Number(3.0, 2, pytest.approx(1.0))
    others = Number(7.0, 4, 2.0, 0.1)
    assert evaluate._summary([number, others]) == {
        "mean": 5.0, "standard_error": pytest.approx(2.0), "per_seed": [3.0, 7.0], "examples": 3,
        "examples_standard_error": pytest.approx(np.sqrt(7 / 3 + 4) / 2),
        "estimator_standard_error": pytest.approx(np.hypot(1.3 / 3, 0.1) / 2),
    }  # fmt: skip
    assert evaluate._summary([Number(1.0)]) == {"mean": 1.0, "standard_error": None, "per_seed": [1.0]}
    assert evaluate._summary([others, Number(1.0, 4, 2.0)]).keys() == {
        "mean", "standard_error", "per_seed", "examples", "examples_standard_error"
    }  # fmt: skip
    assert workdir.summary([1.0, 2.0, 6.0], what=1) == {
        "mean": 3.0, "standard_error": pytest.approx(np.sqrt(7 / 3)), "per_seed": [1.0, 2.0, 6.0], "what": 1
    }  # fmt: skip


def test_the_table_of_an_evaluation():
    """Each error in its column, and T's word told where there is a T."""
    number = {"mean": -1.25, "standard_error": 0.5, "examples_standard_error": 0.25, "estimator_standard_error": 0.125}
    rows = {"elbo": {**number, "examples": 1234}, "kl": {"mean": 2.0, "standard_error": None}}
    for under_t, elbo in ((True, "ELBO under T: an estimate, no bound"), (False, "ELBO")):
        header, line, kl, _ = evaluate.table("avb", rows, under_t)[1:].splitlines()
        assert header.split()[-5:] == ["mean", "seeds", "examples", "estimator", "of"]
        assert " ".join(line.split()) == f"{elbo} -1.250 +-0.5 +-0.25 +-0.125 1,234"
        for title, cell in zip(header.split()[-5:], ("-1.250", "0.5", "0.25", "0.125", "1,234"), strict=True):
            assert header.rindex(title) + len(title) == line.rindex(cell) + len(cell)
        assert kl.split()[-1] == "2.000"


INFINITE = np.array([-1.0, -np.inf, -3.0, -2.0])
REASON = "1 of 4 examples have no finite value; the mean over the other 3, -2.000, is biased upwards"


@pytest.mark.parametrize(
    ("values", "mean", "reason"),
    [
        ([1.0, 2.0], 1.5, ""),
        (INFINITE, -np.inf, REASON),
        ([np.inf, 2.0], np.inf, "1 of 2 examples have no finite value; the mean over the other 1, 2.000, is biased downwards"),
        ([np.inf, 2.0, -np.inf], np.nan, "2 of 3 examples have no finite value; the mean over the other 1, 2.000, is biased"),
        ([np.nan, 2.0], np.nan, "1 of 2 examples have no finite value; the mean over the other 1, 2.000, is biased"),
        ([-np.inf], -np.inf, "1 of 1 examples have no finite value"),
    ],
)
def test_means_are_over_all_examples(values, mean, reason):
    np.testing.assert_equal(workdir.mean(np.asarray(values)), (mean, reason))


def no_constants(text):
    """JSON as others than Python read it."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_an_infinite_example_is_told(tmp_path, monkeypatch, capsys):
    """Through the command: in the table and a note, null with a reason in JSON, and in the progress."""
    test = np.ones((8, 2))
    test[5] = 1e20  # whose square is infinite
    subject = game(tmp_path, test, **{"importance.images": 8, "quadrature.points": 20, "elbo.draws": 2})
    finite = subject._replace(dataset=Dataset(test, np.delete(test, 5, axis=0).astype(np.float32)), folder=tmp_path / "finite")
    expected = estimators.evaluate_importance(finite)["log_likelihood_importance"]
    monkeypatch.setattr(evaluate, "load", lambda options, folder, notes: {"avb": [subject._replace(notes=notes)]})
    options = subject.options.copy_and_resolve_references()
    options.estimators = "importance,quadrature,elbo"
    evaluate.main(options, tmp_path)
    out, err = capsys.readouterr()
    numbers = no_constants((tmp_path / "results.json").read_text())["avb"]
    of_all = {"log_likelihood_importance", "log_likelihood_quadrature", "elbo", "reconstruction_error"}
    for quantity in of_all:
        assert numbers[quantity].keys() == {"mean", "standard_error", "per_seed", "examples", "reason"}, quantity
        assert (numbers[quantity]["mean"], numbers[quantity]["per_seed"], numbers[quantity]["examples"]) == (None, [None], 8)
    assert numbers["log_likelihood_importance"]["reason"].startswith("1 of 8 examples have no finite value; the mean over the ")
    assert numbers["log_likelihood_importance"]["reason"].endswith("is biased upwards")
    assert numbers["reconstruction_error"]["reason"].endswith("is biased downwards")
    others = float(numbers["log_likelihood_importance"]["reason"].split(", ")[1])
    assert abs(others - expected.mean) < 4 * np.sqrt(2) * expected.estimator_error + 1e-3
    note = f"avb: importance, log p(x), importance sampling (bound): {numbers['log_likelihood_importance']['reason']}"
    assert note in out.splitlines()
    assert "ELBO under T: an estimate, no bound" in out
    (line,) = (line for line in out.splitlines() if line.startswith("log p(x), quadrature"))
    assert line.split()[-2:] == ["-inf", "8"]
    assert "example 8/8  log-likelihood -inf (1 of 8 examples have no finite value" in err


def test_figures_of_what_is_finite(tmp_path, monkeypatch):
    """Chains of weight zero, and a T of infinity, do not end an evaluation; all examples count in the numbers."""
    rng, ones = np.random.default_rng(0), np.ones((3, 6))
    weight = rng.standard_normal((3, 2))
    weight[1, 0] = -np.inf
    likelihood = np.logaddexp.reduce(weight, axis=1) - np.log(2)
    results = {
        "ais": AnnealedEstimate(likelihood, np.ones(3), np.ones(3), likelihood, weight, np.zeros((3, 2)), ones, ones, ones),
        "codes": PosteriorDraws(rng.standard_normal((60, 5, 2)), None),
        "posterior": PosteriorDraws(rng.standard_normal((3, 50, 2)), None),
        "calibration": AdversaryTerms(np.ones(3), np.ones(3), np.array([1.0, np.inf, 2.0])),
    }  # fmt: skip
    monkeypatch.setattr(Subject, "on_images", lambda self, what, *arguments, **options: results[what])
    subject = game(tmp_path)
    numbers = {**estimators.evaluate_ais(subject), **estimators.evaluate_knn(subject)}
    assert numbers["log_likelihood_ais"].mean == pytest.approx(likelihood.mean())
    assert subject.notes == ["avb: ais: the figures leave out 1 of 3 examples, with chains of no finite weight"]
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"avb_ais_weights.png", "avb_ais_annealing.png", "avb_adversary_calibration.png"}


@pytest.mark.parametrize(("module", "estimator"), [(mnist, "importance"), (synthetic, "quadrature")])
def test_infinite_means_of_the_experiments(tmp_path, monkeypatch, capsys, module, estimator):
    """Of those that evaluate themselves: one example of the second seed. JSON has null and why, and so has what is printed."""
    subject, calls = game(tmp_path, np.random.default_rng(0).random((40, 2))), []

    def log_likelihood(*arguments, **options):
        calls.append(0)
        values = INFINITE if len(calls) == 2 else np.full(4, -2.0)
        return ImportanceEstimate(values, np.ones(4), np.full(4, 5.0))

    def elbo_terms(*arguments, **options):
        return ElboEstimate(np.array([1.0, 2.0, 3.0, 4.0 if len(calls) == 1 else np.inf]), np.full(4, 0.5), np.ones(4))

    config = {mnist: mnist_config, synthetic: synthetic_config}[module].get_config()
    config.method, config.latent_dim, config.num_seeds = "avb", 2, 2
    points = subject.dataset._replace(train=subject.dataset.train[:4])
    stand_in = types.SimpleNamespace(log_likelihood=log_likelihood, POINTS={2: 1}, doubts=lambda estimate: [])
    monkeypatch.setattr(module, estimator, stand_in)
    monkeypatch.setattr(module, "elbo_terms", elbo_terms)
    monkeypatch.setattr(module.build, "dataset", lambda config: points)
    monkeypatch.setattr(module.build, "model", lambda *arguments: subject.model)
    states = jax.tree.map(lambda a: jnp.stack([a, a]), subject.state)
    monkeypatch.setattr(module.launch, "train", lambda *arguments, **options: states)
    module.main(config, tmp_path)
    out, results = capsys.readouterr().out, no_constants((tmp_path / "results.json").read_text())["avb"]
    likelihood, lost = results["log_likelihood"], results["reconstruction_error"]
    assert likelihood == {"mean": None, "standard_error": None, "per_seed": [-2.0, None], "reason": f"seed 1: {REASON}"}
    assert lost["per_seed"] == [2.5, None]
    assert lost["reason"] == f"seed 1: {REASON.replace('-2.000', '2.000').replace('upwards', 'downwards')}"
    assert results["elbo"]["per_seed"] == [-3.0, None]
    assert results["elbo"]["reason"] == f"seed 1: {REASON.replace('-2.000', '-2.500')}"
    assert out.count(f"seed 1: {REASON}") == 1
    assert " -inf" in out
    if module is synthetic:
        assert results["reconstruction_error_per_pixel"]["per_seed"] == [1.25, None]
        assert results["elbo_knn"]["per_seed"][0] < -2.5
        assert results["elbo_knn"]["reason"].endswith("is biased upwards")
    else:
        assert results["effective_sample_size"]["per_seed"] == [5.0, 5.0]
        assert results["kl"]["mean"] == 0.5


def test_infinite_numbers_in_a_comparison(tmp_path):
    """In the table with a reason, the same from JSON; and in paired differences."""
    values, reference = np.stack([INFINITE, INFINITE]), np.full((2, 4), -2.0)
    difference = compare.paired(values, reference)
    np.testing.assert_equal(difference["mean"], -np.inf)
    assert difference["standard_error"] is None
    assert difference["reason"] == "2 of 8 examples have no finite value; the mean over the other 6, 0.000, is biased upwards"
    assert np.isnan(compare.paired(values, values)["mean"])
    suite = suites.SUITES["digits"]
    row = {"published": None, "steps": 7, "difference": difference}
    row["elbo"] = workdir.summary([-np.inf], [REASON])
    workdir.write_json(tmp_path / "rows.json", {"a|b": row, "vae": {**row, "minutes": float("nan")}})
    for rows in ({"avb": row}, {"avb": no_constants((tmp_path / "rows.json").read_text())["a|b"]}):
        _, _, line, _, *reasons = compare.table(rows, suite).splitlines()
        assert [cell.strip() for cell in line.split("|")[2:4]] == ["not finite"] * 2
        assert reasons == [f"- avb, ELBO: {REASON}", f"- avb, log p(x) above vae's, paired: {difference['reason']}"]
    workdir.claim(tmp_path, {"clip": float("inf")})
    workdir.claim(tmp_path, {"clip": float("inf")})
