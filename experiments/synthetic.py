"""Table 1 and Figure 3 of the paper, AVB and the Gaussian VAE on four data points with exact numbers; or any other method.

    python -m experiments.synthetic [--config=experiments/configs/synthetic.py[:full|:paper]] [--workdir=DIR]
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from avb_jax import UserError, data, plotting, workdir
from avb_jax.data import Dataset
from avb_jax.evaluation import knn, quadrature
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.evaluation.image_quality import sliced_wasserstein
from avb_jax.players import Model, encode, evaluation_variables
from avb_jax.streams import stream
from avb_jax.types import Array, State
from experiments import build, launch, quality

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
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "kl_aggregated_posterior_quadrature": "KL(q(z), p(z)), grid",
    "reconstruction_rmse": "pixel error (RMS)",
    "sliced_wasserstein": "samples, SWD x 1,000",
}
CODES = 2000  # per data point, in Figure 3
REPEATS = 250  # reconstructions of each data point
SAMPLES = 2000  # of the model, against the data points


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Trains what the config names, then prints Table 1 and draws Figure 3."""
    if config.latent_dim not in quadrature.POINTS:
        raise UserError(f"latent_dim={config.latent_dim}: the log-likelihood's quadrature serves 1 to 3 latents")
    points = build.dataset(config)
    launch.claim(config, folder)
    results, codes = {}, {}
    for name, method in build.methods(config).items():
        model = build.model(config, name, points.x_shape)
        states = launch.train(config, folder, name, method, model, points)
        print(f"{name}: evaluating {config.num_seeds} seeds", flush=True)
        seeds = [jax.tree.map(lambda a, s=s: a[s], states) for s in range(config.num_seeds)]
        per_seed = [evaluate(method, model, state, points, config, seed) for seed, state in enumerate(seeds)]
        shared = [quantity for quantity in per_seed[0] if all(quantity in numbers for numbers in per_seed)]
        results[name] = {
            quantity: workdir.summary(*zip(*[seed[quantity] for seed in per_seed], strict=True)) for quantity in shared
        }
        if method.PLAYERS.encoder:
            likelihood = per_seed[0].get("log_likelihood")
            title = name.upper() + ("" if likelihood is None else f", log-likelihood {likelihood[0]:.3f}")
            key = stream(jax.random.key(config.seed), "figure")
            codes[title] = posterior_draws(key, model, seeds[0], points, CODES)
    workdir.write_results(folder, results)
    paper = ("avb", "vae") if config.posterior.kind == "diagonal" else ("avb",)  # its VAE is Gaussian
    print(table(results, config.num_seeds, [name for name in paper if name in results]))
    print(f"\nOptimal log-likelihood -log 4 = {-math.log(4):.3f}. Numbers in {folder / 'results.json'}", flush=True)
    if config.latent_dim == 2 and codes:
        figure = folder / "figures" / "figure_3.png"
        plotting.save_latent_codes(figure, codes, [str(i + 1) for i in range(len(points.train))])
        print(f"Figure 3 in {figure}")


def evaluate(
    method, model: Model, state: State, points: Dataset, config: ml_collections.ConfigDict, seed: int
) -> dict[str, tuple[float, str]]:
    """The quantities of `ROWS` that the method has, for one run, in nats unless said otherwise, and why one is not finite."""
    total = config.evaluation.samples
    count = total // len(points.train)  # per point
    key = jax.random.fold_in(stream(jax.random.key(config.seed), "evaluation"), seed)
    numbers, of_points = {}, {}
    if method.PLAYERS.decoder == "likelihood":
        on_grid = quadrature.log_likelihood(key, state, points.train, model=model, binarize=config.data.binarize)
        of_points["log_likelihood"] = on_grid.log_likelihood
        for doubt in quadrature.doubts(on_grid):
            print(f"seed {seed}: {ROWS['log_likelihood']}: {doubt}", flush=True)
    if hasattr(method, "elbo_terms"):
        terms = elbo_terms(
            key, state, points.train, method=method, model=model, draws=count, binarize=config.data.binarize
        )
        of_points |= {
            "reconstruction_error": terms.reconstruction, "elbo": terms.elbo,
            "reconstruction_error_per_pixel": terms.reconstruction / math.prod(points.x_shape),
        }  # fmt: skip
    if method.PLAYERS.encoder:
        z = posterior_draws(stream(key, "codes"), model, state, points, count)
        prior = np.asarray(model.prior.sample(stream(key, "prior"), (count * len(points.train),)))
        numbers["kl_aggregated_posterior"] = knn.kl_divergence(z.reshape(-1, config.latent_dim), prior)
        if "elbo" in of_points:
            kl_per_point = np.array([knn.kl_divergence(draws, prior) for draws in z])  # does not use T
            of_points["elbo_knn"] = -terms.reconstruction - kl_per_point
        posterior = _posterior(model, state, points, jnp.zeros((len(points.train), model.noise_dim)))
        if posterior.gaussian:
            try:  # q(z) is a mixture of Gaussians
                kl = quadrature.mixture_kl(posterior.mean, posterior.std, model.prior)
                numbers["kl_aggregated_posterior_quadrature"] = kl
            except UserError as error:
                print(f"seed {seed}: {ROWS['kl_aggregated_posterior_quadrature']} is left out: {error}", flush=True)
        repeated = np.repeat(points.train, REPEATS, axis=0)
        numbers["reconstruction_rmse"] = quality.reconstruction_rmse(key, method, model, state, points, repeated)
    drawn = quality.samples(key, method, model, state, min(total, SAMPLES))
    repeated = np.repeat(pixels(points), -(-len(drawn) // len(points.train)), axis=0)
    flat = (np.asarray(images, np.float32).reshape(len(images), -1) for images in (drawn, repeated))
    numbers["sliced_wasserstein"] = 1000.0 * sliced_wasserstein(*flat)
    means = {quantity: workdir.mean(values) for quantity, values in of_points.items()}
    return means | {quantity: (number, "") for quantity, number in numbers.items()}


def posterior_draws(key: Array, model: Model, state: State, points: Dataset, count: int) -> np.ndarray:
    """Draws [N, count, Z] from q(z|x) of each point."""
    noise = jax.random.normal(key, (count, len(points.train), model.noise_dim))
    draw = jax.jit(jax.vmap(lambda n: _posterior(model, state, points, n).z, 0, 1))
    return np.asarray(draw(noise))


def _posterior(model: Model, state: State, points: Dataset, noise: Array):
    params, stats = evaluation_variables(state)
    return encode(model, params.encoder, stats.encoder, pixels(points), noise, train=False)[0]


def pixels(points: Dataset) -> Array:
    """The data points [N, ...] as the networks see them."""
    return data.to_pixels(stream(jax.random.key(0), "pixels"), jnp.asarray(points.train), points.binarize)


def table(results: dict[str, dict[str, dict]], num_seeds: int, paper: list[str]) -> str:
    """Table 1 as text, the paper's numbers beside those of the methods `paper`."""
    header = f"{'':24}" + "".join(f"{name.upper():>20}{'paper' if name in paper else '':>9}" for name in results).rstrip()
    lines = [f"\nTable 1: nats, mean over {num_seeds} seeds +- standard error", header]
    for quantity, label in ROWS.items():
        if not any(quantity in quantities for quantities in results.values()):
            continue
        line = f"{label:24}"
        for name, quantities in results.items():
            number, published = quantities.get(quantity), PAPER.get(quantity, {}).get(name) if name in paper else None
            error = "" if not number or number["standard_error"] is None else f" +- {number['standard_error']:.4f}"
            line += f"{number['mean']:>10.4f}{error:10}" if number else " " * 20
            line += f"{published:>9.3f}" if published is not None else " " * 9
        lines.append(line.rstrip())
    for name, quantities in results.items():
        reasons = {ROWS[quantity].strip(): number["reason"] for quantity, number in quantities.items() if "reason" in number}
        lines += [f"{name.upper()}, {label}: {reason}" for label, reason in reasons.items()]
    if "avb" in results:
        lines.append("AVB's ELBO takes its KL from T and is an estimate; the k-NN one does not use T.")
    return "\n".join(lines)


if __name__ == "__main__":
    launch.run("synthetic", main)
