"""What `experiments.evaluate` can measure: one function per estimator, and `ESTIMATORS` to find them by name."""

import functools
import pathlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from avb_jax import Model, Players, fit, parallel, plotting, workdir
from avb_jax.data import Dataset
from avb_jax.estimation import by_blocks, keep_folder
from avb_jax.evaluation import ais, bdmc, importance, knn, moments, optimality, quadrature
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.players import evaluation_variables
from avb_jax.streams import stream
from avb_jax.types import PyTree, State

DIVERGED = 0.1  # share of a chain's transitions from which on the chain is reported
VERSION = 2  # of kept results: raised when an estimator gives other numbers for the same settings


class Number(NamedTuple):
    """A quantity of one run."""

    mean: float  # infinite, or not a number, where that of some example is
    examples: int | None = None  # that it is a mean over
    examples_error: float | None = None  # standard error over these examples
    estimator_error: float | None = None  # what the estimator's own randomness contributes to that mean
    reason: str = ""  # why the mean is not finite, and what the other examples have for a mean


class Subject(NamedTuple):
    """One method's run from one seed, and how to evaluate it."""

    name: str
    method: object
    model: Model
    dataset: Dataset
    config: ml_collections.ConfigDict  # the run's
    options: ml_collections.ConfigDict  # the evaluation's
    folder: pathlib.Path  # the run directory
    seed: int
    state: State
    notes: list  # lines for the reader, added to

    def note(self, text: str) -> None:
        """Adds a line for the reader."""
        self.notes.append(f"{self.name}: {text}")

    @property
    def key(self) -> jax.Array:
        """One for all estimators and methods, so that they see the same binary images."""
        return jax.random.fold_in(stream(jax.random.key(self.options.seed), "evaluation"), self.seed)

    def images(self, count: int) -> np.ndarray:
        """The first `count` test images; all where it is 0."""
        return self.dataset.test[: count or None]

    def kept(self, what: str) -> pathlib.Path:
        """The folder of an estimator's results per example."""
        return self.folder / "evaluation" / f"{self.name}-{self.seed}" / what

    def settings(self, **others) -> dict:
        """What results depend on: params, data, key, and `others`."""
        leaves = jax.tree.leaves(evaluation_variables(self.state))
        params = functools.reduce(lambda crc, leaf: zlib.crc32(np.ascontiguousarray(leaf), crc), leaves, 0)
        sample = zlib.crc32(np.ascontiguousarray(self.dataset.test[:16]))
        data = {"name": self.config.data.name, "binarize": self.config.data.binarize, "test": sample}
        return {"version": VERSION, "params": params, "data": data, "seed": self.options.seed, **others}

    def on_images(
        self, what: str, estimator: Callable, images: np.ndarray, chunk: int, describe: Callable[[PyTree], str], *,
        parts: dict | None = None, **settings,
    ) -> PyTree:  # fmt: skip
        """An estimator of `avb_jax.evaluation` on images; `parts` are further arguments that settings cannot hold."""

        def estimate(key, state, numbers, images):
            return estimator(
                key, state, images, numbers=numbers, model=self.model, binarize=self.dataset.binarize, chunk=chunk,
                **settings, **(parts or {}),
            )  # fmt: skip

        return self.by_blocks(what, estimate, (images,), len(images), chunk, describe, settings)

    def by_blocks(self, what, estimate, arrays, count, chunk, describe, settings) -> PyTree:
        """`estimate(key, state, numbers, *arrays)` over `count` examples, `chunk` of them on each device at once."""
        block = parallel.examples_per_call(count, chunk)
        split = parallel.over_examples(estimate)

        def of(numbers: np.ndarray) -> PyTree:
            return split(self.key, self.state, numbers, *[array[np.minimum(numbers, count - 1)] for array in arrays])

        abstract = [jax.ShapeDtypeStruct((block, *array.shape[1:]), array.dtype) for array in arrays]
        like = jax.eval_shape(split, self.key, self.state, jax.ShapeDtypeStruct((block,), np.int32), *abstract)
        kept = self.kept(what), self.settings(**settings, fields=like._fields)  # a version that knows fewer left other files
        return by_blocks(f"{self.name} {what}", of, like, count, block, *kept, describe)


def evaluate_elbo(subject: Subject) -> dict[str, Number]:
    """The ELBO and its terms; where there is a T, under T."""
    options = subject.options.elbo
    terms = subject.on_images(
        "elbo", elbo_terms, subject.images(options.images), options.chunk, lambda r: _so_far("ELBO", r.elbo),
        parts={"method": subject.method}, draws=options.draws,
    )  # fmt: skip
    if subject.model.networks.adversary is not None:
        subject.note("the ELBO and its KL take T's word for the KL: estimates that bound nothing")
    return {
        "elbo": _mean(terms.elbo, terms.standard_error), "reconstruction_error": _mean(terms.reconstruction),
        "kl": _mean(terms.kl),
    }  # fmt: skip


def evaluate_optimality(subject: Subject) -> dict[str, Number]:
    """What T's loss has yet to lose: a fresh adversary is trained on the frozen players."""
    options, adam = subject.options.optimality, subject.config.optimizer
    optimizers = Players(*[optax.adam(options.rate, b1=adam.b1, b2=adam.b2)] * 3)
    training = {"batch_size": options.batch_size, "rate": options.rate}  # more steps continue what is there
    x = jnp.zeros((2, *subject.dataset.x_shape))
    key = stream(subject.key, "fresh_adversary")
    start = optimality.restart_adversary(key, subject.state, subject.model, optimizers, x)
    folder = subject.kept("fresh_adversary")
    keep_folder(folder, subject.settings(**training))
    states = fit(
        optimality, subject.model, optimizers, subject.dataset, steps=options.steps, batch_size=options.batch_size,
        seed=int(jax.random.bits(key)) // 2, mode=subject.config.parallel, log_every=50, checkpoint_every=500, workdir=folder,
        name=f"{subject.name} fresh T", state=jax.tree.map(lambda a: a[None], start),
    )  # fmt: skip
    fresh = subject._replace(state=jax.tree.map(lambda a: a[0], states))
    own, others = (
        each.on_images(
            what, optimality.adversary_terms, subject.images(options.images), options.chunk,
            lambda r: _so_far("T loss", r.loss, 4), draws=options.draws,
        )
        for each, what in ((subject, "adversary"), (fresh, "adversary_fresh"))
    )  # fmt: skip
    gap = _mean(own.loss - others.loss)
    if gap.mean < 0:
        subject.note(
            f"a fresh T is still worse than T after {options.steps} steps, so that the optimality gap says nothing yet; raise "
            "optimality.steps (the training continues)"
        )
    numbers = {"adversary_loss": _mean(own.loss), "adversary_loss_fresh": _mean(others.loss), "optimality_gap": gap}
    return numbers if "elbo" in missing(subject) else numbers | {"kl_fresh_adversary": _mean(others.kl)}


def evaluate_importance(subject: Subject) -> dict[str, Number]:
    """Importance sampling, from a Gaussian fitted to the encoder's draws."""
    options = subject.options.importance
    result = subject.on_images(
        "importance", importance.log_likelihood, subject.images(options.images), options.chunk, _log_likelihood_so_far,
        **_fields(options, "samples", "initial", "fit_draws", "inflation"),
    )  # fmt: skip
    return {
        "log_likelihood_importance": _mean(result.log_likelihood, result.standard_error),
        "effective_sample_size_importance": _mean(result.effective_sample_size),
    }


def evaluate_ais(subject: Subject) -> dict[str, Number]:
    """Annealed importance sampling, with figures of its weights and of its way."""
    options = subject.options.ais
    result = subject.on_images(
        "ais", ais.log_likelihood, subject.images(options.images), options.chunk, _log_likelihood_so_far, **_annealing(options)
    )
    _check_chains(subject, "ais", result.divergent)
    finite = np.isfinite(result.log_weight).all(axis=1)
    if not finite.all():
        subject.note(f"ais: the figures leave out {np.sum(~finite)} of {len(finite)} examples, with chains of no finite weight")
    if finite.any():
        figures = subject.folder / "figures"
        plotting.save_weights(
            figures / f"{subject.name}_ais_weights.png", result.log_weight[finite], result.effective_sample_size[finite]
        )
        traces = {
            "effective sample size": result.effective_sample_size_path[finite], "acceptance": result.acceptance[finite],
            "step size": result.step_size[finite],
        }  # fmt: skip
        beta = np.asarray(ais.schedule(options.temperatures))[1:]
        plotting.save_annealing(figures / f"{subject.name}_ais_annealing.png", traces, beta)
    return {
        "log_likelihood_ais": _mean(result.log_likelihood, result.standard_error),
        "effective_sample_size_ais": _mean(result.effective_sample_size),
        "acceptance_ais": _mean(result.acceptance.mean(axis=1)),
        "divergent_ais": _mean(result.divergent.mean(axis=1)),
    }


def evaluate_bdmc(subject: Subject) -> dict[str, Number]:
    """How far annealed importance sampling is off, on data that the model itself simulates."""
    options = subject.options.ais
    settings = _annealing(options)

    def estimate(key, state, numbers):
        return bdmc.sandwich(key, state, numbers, model=subject.model, chunk=options.chunk, **settings)

    result = subject.by_blocks(
        "bdmc", estimate, (), subject.options.bdmc.images, options.chunk, lambda r: _so_far("width", r.width, 3), settings
    )
    _check_chains(subject, "bdmc", result.divergent)
    return {
        "bdmc_lower": _mean(result.lower, result.lower_error),
        "bdmc_upper": _mean(result.upper, result.upper_error),
        "bdmc_width": _mean(result.width, np.hypot(result.lower_error, result.upper_error)),
    }


def evaluate_quadrature(subject: Subject) -> dict[str, Number]:
    """Log p(x) on a grid over 1 to 3 latents."""
    options = subject.options.quadrature
    result = subject.on_images(
        "quadrature", quadrature.log_likelihood, subject.images(options.images), options.chunk, _log_likelihood_so_far,
        points=options.points or None,
    )  # fmt: skip
    for doubt in quadrature.doubts(result):
        subject.note(f"quadrature: {doubt}")
    return {"log_likelihood_quadrature": _mean(result.log_likelihood)}


def evaluate_moments(subject: Subject) -> dict[str, Number]:
    """The posterior's moments per latent, and how many latents are used."""
    options = subject.options.moments
    result = subject.on_images(
        "moments", moments.posterior_moments, subject.images(options.images), options.chunk, lambda r: "", draws=options.draws
    )
    activity = moments.activity(result)
    figure = subject.folder / "figures" / f"{subject.name}_latents.png"
    plotting.save_latents(figure, activity, result.variance.mean(axis=0), moments.ACTIVE)
    return {
        "active_units": Number(float(np.sum(activity > moments.ACTIVE))),
        "posterior_variance": _mean(result.variance.mean(axis=1)),
    }


def evaluate_knn(subject: Subject) -> dict[str, Number]:
    """The KL divergences behind the ELBO from draws alone, and I(x; z), which is their difference."""
    options, test = subject.options.knn, subject.images(0)
    posterior_draws = functools.partial(subject.on_images, estimator=moments.posterior_draws, describe=lambda r: "")
    per_image = -(-options.codes // len(test))
    chunk = max(1, options.chunk * options.draws // per_image)
    codes = posterior_draws("codes", images=test, chunk=chunk, draws=per_image, name="codes").z
    codes = codes.reshape(-1, codes.shape[-1])
    prior = np.asarray(subject.model.prior.sample(stream(subject.key, "prior"), (len(codes),)))
    aggregated = knn.kl_to_standard_normal(codes, options.neighbours)

    posterior = posterior_draws("posterior", images=subject.images(options.images), chunk=options.chunk, draws=options.draws)
    kl = np.array([knn.kl_to_standard_normal(z, options.neighbours) for z in posterior.z])
    of_x = kl if posterior.kl is None else np.asarray(posterior.kl)
    if "elbo" not in missing(subject) and subject.model.networks.adversary is not None:
        terms = subject.on_images(
            "calibration", optimality.adversary_terms, subject.images(options.images), options.chunk, lambda r: "",
            draws=options.draws,
        )  # fmt: skip
        path, finite = subject.folder / "figures" / f"{subject.name}_adversary_calibration.png", np.isfinite(terms.kl)
        if finite.any():
            plotting.save_calibration(path, kl[finite], terms.kl[finite])
    return {
        "kl_knn": _mean(kl),
        "kl_aggregated_posterior": Number(knn.kl_divergence(codes, prior, options.neighbours)),
        "kl_aggregated_posterior_gaussian": Number(aggregated),
        "mutual_information": _mean(of_x - aggregated),
    }


ESTIMATORS = {
    "elbo": evaluate_elbo, "optimality": evaluate_optimality, "knn": evaluate_knn, "moments": evaluate_moments,
    "quadrature": evaluate_quadrature, "importance": evaluate_importance, "bdmc": evaluate_bdmc, "ais": evaluate_ais,
}  # fmt: skip


def missing(subject: Subject) -> dict[str, str]:
    """The estimators that the method lacks something for, and what."""
    kinds, lacks = subject.method.PLAYERS, {}
    if kinds.decoder != "likelihood":
        lacks |= dict.fromkeys(("elbo", "quadrature", "importance", "ais", "bdmc", "optimality"), "has no likelihood p(x|z)")
    if kinds.encoder is None:
        lacks |= dict.fromkeys(("knn", "moments"), "has no encoder")
    if kinds.adversary is None:
        lacks["optimality"] = "has no T whose optimality could be measured"
    if not hasattr(subject.method, "elbo_terms"):
        lacks["elbo"] = "has no ELBO"
    return lacks


def applicable(subject: Subject) -> list[str]:
    """What 'auto' stands for: every estimator that this method and model have what it takes for."""
    lacks = {*missing(subject), *(() if subject.model.prior.dim in quadrature.POINTS else ("quadrature",))}
    return [what for what in ESTIMATORS if what not in lacks]


def _fields(options: ml_collections.ConfigDict, *names: str) -> dict:
    return {name: options[name] for name in names}


def _annealing(options: ml_collections.ConfigDict) -> dict:
    return _fields(options, "chains", "temperatures", "leapfrog_steps", "initial", "fit_draws", "inflation")


def _so_far(what: str, values: np.ndarray, digits: int = 2) -> str:
    """Words of progress."""
    number = _mean(values)
    error = "" if number.examples_error is None else f" +- {number.examples_error:.{digits}f}"
    return f"{what} {number.mean:.{digits}f}{error}{number.reason and f' ({number.reason})'}"


def _log_likelihood_so_far(result: PyTree) -> str:
    return _so_far("log-likelihood", result.log_likelihood)


def _mean(values: np.ndarray, errors: np.ndarray | None = None) -> Number:
    """The mean over all examples, with its errors where it is finite."""
    count, (mean, reason) = len(values), workdir.mean(values)
    if reason:
        return Number(mean, count, reason=reason)
    spread = float(np.std(values, ddof=1, dtype=np.float64) / np.sqrt(count)) if count > 1 else None
    own = None if errors is None else float(np.sqrt(np.sum(np.square(errors, dtype=np.float64))) / count)
    return Number(mean, count, spread, own if own is not None and np.isfinite(own) else None)  # one draw alone has no spread


def _check_chains(subject: Subject, what: str, divergent: np.ndarray) -> None:
    """Notes chains [N, K] that diverged."""
    count = int(np.sum(divergent > DIVERGED))
    if count:
        subject.note(
            f"{what}: {count} of {divergent.size} chains diverged in more than {DIVERGED:.0%} of their transitions; they "
            "count, and lower the estimate; raise ais.temperatures, so that the step size has time to adapt"
        )
