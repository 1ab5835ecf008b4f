"""Table 1 and Figure 3 of the paper, AVB and the Gaussian VAE on four data points with exact numbers; or any other method.

python -m experiments.synthetic [--config=experiments/configs/synthetic.py[:full|:semi_implicit|:paper]] [--workdir=DIR]
"""

import dataclasses
import math
import pathlib
from typing import ClassVar

import jax
import ml_collections
import numpy as np

import avb_jax
from avb_jax import Report, UserError, build
from avb_jax.evaluation import (
    ELBO,
    Estimator,
    Number,
    Quadrature,
    ReconstructionError,
    SampleDistance,
    SemiImplicit,
    knn,
    quadrature,
)
from avb_jax.evaluation.estimator import mean
from avb_jax.evaluation.moments import Draws
from avb_jax.evaluation.samples import draw_samples
from avb_jax.figures import Pictures, save
from avb_jax.method import prior_at
from avb_jax.streams import stream
from avb_jax.training import workdir
from avb_jax.transforms import of_seed
from experiments import launch

# Table 1 of Mescheder et al. (2017). Its reconstruction error is read as a mean over the four pixels: in nats per
# example it would leave the VAE KL(q(z|x), p(z)) = 1.700 - 0.091 = 1.609 on average, but that is I(x; z) + KL(q(z), p(z)), at
# most log 4 + 0.175 = 1.561; and AVB 1.462, of at most 1.414.
PAPER = {
    "log_likelihood": {"avb": -1.462, "vae": -1.593},
    "reconstruction_error_per_pixel": {"avb": 0.021, "vae": 0.091},
    "elbo": {"avb": -1.483, "vae": -1.700},
    "kl_aggregated_posterior": {"avb": 0.028, "vae": 0.175},
}
ROWS = {
    "log_likelihood": "log-likelihood",
    "reconstruction_error": "reconstruction error",
    "reconstruction_error_per_pixel": "  per pixel",
    "elbo": "ELBO",
    "elbo_knn": "ELBO, KL by k-NN",
    **launch.OF_Q,
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "kl_aggregated_posterior_quadrature": "KL(q(z), p(z)), grid",
    "reconstruction_rmse_pixels": "pixel error (RMS)",
    "sliced_wasserstein_pixels": "samples, SWD x 1,000",
    "points_generated": "points that are sampled",
}
CODES = 2000  # per data point, in Figure 3
REPEATS = 250  # reconstructions of each data point
OF_Q_DRAWS, INNER = 500, 50_000  # draws of z, and of u, for bounds on a semi-implicit q's ELBO
SAMPLES = 2000  # of the model, against the data points


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, dict]:
    """Trains what the config names, then prints Table 1 and draws Figure 3."""
    if config.latent_dim not in quadrature.POINTS:
        raise UserError(f"latent_dim={config.latent_dim}: the log-likelihood's quadrature serves 1 to 3 latents")
    points = build.dataset(config)
    methods = build.methods(config, points.x_shape)
    launch.check(config, folder)
    results, codes = {}, {}
    for name, method in methods.items():
        state = launch.train(config, folder, method, points, [Pictures(folder / "figures", ("codes",))], built=True)
        print(f"{name}: evaluating {config.num_seeds} seeds", flush=True)
        total = config.evaluation.samples
        estimators = [
            Quadrature(),
            ELBO(draws=total // len(points.train)),
            SemiImplicit(draws=OF_Q_DRAWS, inner=INNER),
            PointDivergences(draws=total // len(points.train)),
            ReconstructionError(repeats=REPEATS),
            SampleDistance(count=min(total, SAMPLES), repeat=True),
            SampledPoints(),
        ]
        report = avb_jax.evaluate(
            method,
            state,
            points,
            [estimator for estimator in estimators if not estimator.lacks(method)],
            num_seeds=config.num_seeds,
            seed=config.seed,
        )
        for note in report.notes:
            print(note, flush=True)
        results[name] = numbers(report)
        workdir.write_results(folder, {name: results[name]})
        if method.encode is not None:
            likelihood = results[name].get("log_likelihood")
            title = name.upper() + ("" if likelihood is None else f", log-likelihood {likelihood['per_seed'][0]:.3f}")
            codes[title] = figure_codes(config, method, state, points)
    paper = ("avb", "vae") if config.posterior.kind == "diagonal" else ("avb",)  # its VAE is Gaussian
    print(table(results, config.num_seeds, [name for name in paper if name in results]))
    print(f"\nOptimal log-likelihood -log 4 = {-math.log(4):.3f}. Numbers in {folder / 'results.json'}", flush=True)
    if config.latent_dim == 2 and codes:
        from avb_jax.figures import plots  # not at every start: Matplotlib takes a fifth of all imports

        labels = [str(i + 1) for i in range(len(points.train))]
        path = save(folder / "figures" / "figure_3.png", plots.latent_codes(codes, labels), folder.name)
        print(f"Figure 3 in {path}")
    return results


@dataclasses.dataclass(frozen=True)
class PointDivergences(Estimator):
    """KL divergences of q(z|x) and of q(z) by many draws for each of few data points.

    Of each point's by two samples, with which the ELBO depends on no T (after an `ELBO` has run); of q(z) likewise, as in the
    paper's Table 1; and exactly, where q(z) is a mixture of Gaussians.

    Attributes:
      draws: of z from q(z|x) of each point.
    """

    draws: int = 5000

    name: ClassVar[str] = "points"
    requires: ClassVar[tuple[str, ...]] = ("encode", "prior")

    def run(self, subject) -> dict[tuple[str, str], Number]:
        method = subject.method
        z = subject.on_examples(Draws(draws=self.draws, stream="codes")).z
        prior = np.asarray(prior_at(method, subject.state).sample(stream(subject.key, "prior"), (z.shape[0] * z.shape[1],)))
        found = {("kl_aggregated_posterior", "knn"): Number(knn.kl_divergence(z.reshape(-1, z.shape[-1]), prior))}
        terms = subject.results.get("elbo")
        if terms is not None:
            found["elbo", "knn"] = mean(-terms.reconstruction - np.array([knn.kl_divergence(draws, prior) for draws in z]))
            per_pixel = terms.reconstruction / math.prod(subject.data.x_shape)
            found["reconstruction_error_per_pixel", "draws"] = mean(per_pixel)
        posterior = method.encode(subject.key, subject.state, subject.x())
        if posterior.gaussian:
            try:
                kl = quadrature.mixture_kl(posterior.mean, posterior.std, prior_at(method, subject.state))
                found["kl_aggregated_posterior", "quadrature"] = Number(kl)
            except UserError as error:
                subject.note(f"{ROWS['kl_aggregated_posterior_quadrature']} is left out: {error}")
        return found


@dataclasses.dataclass(frozen=True)
class SampledPoints(Estimator):
    """How many of the data points the samples come near to: a generator without a likelihood may leave some out.

    A sample is near a point at a squared distance below 0.25, and 5% of the samples have to be.
    """

    name: ClassVar[str] = "generated"
    requires: ClassVar[tuple[str, ...]] = ("sample",)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        points = np.asarray(subject.x()).reshape(len(subject.x()), -1)
        drawn = draw_samples(subject.key, subject.method, subject.state, SAMPLES).reshape(SAMPLES, -1)
        near = np.sum((drawn[:, None] - points) ** 2, axis=-1) < 0.25
        return {("points", self.name): Number(float(np.sum(near.mean(axis=0) >= 0.05)))}


def numbers(report: Report) -> dict[str, dict]:
    """What `results.json` has of a method: all numbers, and the headlines."""
    kind = next((kind for quantity, kind in report.estimates if quantity == "elbo" and kind != "knn"), "density")
    return launch.headline(
        report,
        {
            "log_likelihood": ("log_likelihood", "quadrature"),
            "elbo": ("elbo", kind),
            "reconstruction_error": ("reconstruction_error", kind),
            "reconstruction_error_per_pixel": ("reconstruction_error_per_pixel", "draws"),
            "kl_aggregated_posterior": ("kl_aggregated_posterior", "knn"),
            **{name: (name, "semi_implicit") for name in launch.OF_Q},
        },
    )


def figure_codes(config: ml_collections.ConfigDict, method, state, points) -> np.ndarray:
    """Draws [points, CODES, 2] from q(z|x) of each data point, by the first seed's run."""
    first = of_seed(state, 0)
    key = stream(jax.random.key(config.seed), "figure")
    x = points.prepare(stream(jax.random.key(0), "pixels"), points.test)
    return np.asarray(jax.jit(lambda key, state, x: method.encode(key, state, x, CODES).z)(key, first, x)).swapaxes(0, 1)


def table(results: dict[str, dict[str, dict]], num_seeds: int, paper: list[str]) -> str:
    """Table 1 as text, the paper's numbers next to those of the methods `paper`."""
    width = 2 + max(len(label) for quantity, label in ROWS.items() if any(quantity in row for row in results.values()))
    header = f"{'':{width}}" + "".join(f"{name.upper():>20}{'paper' if name in paper else '':>9}" for name in results).rstrip()
    lines = [f"\nTable 1: nats, mean over {num_seeds} seeds +- standard error", header]
    for quantity, label in ROWS.items():
        if not any(quantity in quantities for quantities in results.values()):
            continue
        line = f"{label:{width}}"
        for name, quantities in results.items():
            number, published = quantities.get(quantity), PAPER.get(quantity, {}).get(name) if name in paper else None
            error = "" if not number or number["standard_error"] is None else f" +- {number['standard_error']:.4f}"
            line += f"{number['mean']:>10.4f}{error:10}" if number else " " * 20
            line += f"{published:>9.3f}" if published is not None else " " * 9
        lines.append(line.rstrip())
    if "avb" in results:
        lines.append("AVB's ELBO has its KL from T and is an estimate; the k-NN one does not use T.")
    return "\n".join(lines)


if __name__ == "__main__":
    launch.run("synthetic", main)
