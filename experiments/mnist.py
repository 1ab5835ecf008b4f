"""Handwritten digits by any method: likelihood and ELBO on held-out digits where it has them, samples, reconstructions.

    python -m experiments.mnist --config=experiments/configs/mnist.py[:VARIANT] --config.data.dir=DIR --workdir=DIR
"""

import functools
import pathlib

import jax
import ml_collections
import numpy as np

from avb_jax import workdir
from avb_jax.data import Dataset
from avb_jax.evaluation import importance, knn, moments
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.evaluation.image_quality import sliced_wasserstein
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import State
from experiments import build, launch, pictures, quality

ROWS = {
    "log_likelihood": "log-likelihood, importance sampling (bound)",
    "effective_sample_size": "  effective sample size",
    "elbo": "ELBO",
    "reconstruction_error": "reconstruction error",
    "kl": "KL(q(z|x), p(z))",
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "reconstruction_rmse": "root mean squared error of a reconstructed pixel",
    "sliced_wasserstein": "sliced Wasserstein distance x 1,000 of samples, in pixels",
}

SAMPLES = 2000  # of the model, against as many test digits


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Trains what the config names, with pictures at each checkpoint, and evaluates on the held-out digits."""
    digits = build.dataset(config)
    launch.claim(config, folder)
    results = {}
    for name, method in build.methods(config).items():
        model = build.model(config, name, digits.x_shape)
        draw = functools.partial(pictures.save, folder / "figures", name, method, model, digits)
        states = launch.train(config, folder, name, method, model, digits, on_checkpoint=draw)
        print(f"{name}: evaluating on {len(digits.test):,} held-out digits", flush=True)
        results[name] = evaluate(method, model, states, digits, config)
        workdir.write_results(folder, {name: results[name]})
    for name, quantities in results.items():
        print(f"\n{name}, held-out, nats per digit")
        for quantity, label in ROWS.items():
            if number := quantities.get(quantity):
                error = "" if number["standard_error"] is None else f" +- {number['standard_error']:.2g} over seeds"
                print(f"  {label:58}{number['mean']:>9.4g}{error}")
                if "reason" in number:
                    print(f"    {number['reason']}")
        if name == "avb":
            print("  (KL and ELBO take T's word for the KL: estimates that bound nothing. The first line does not use T.)")
    print(f"\nNumbers in {folder / 'results.json'}, pictures in {folder / 'figures'}")


def evaluate(method, model: Model, states: State, digits: Dataset, config: ml_collections.ConfigDict) -> dict[str, dict]:
    """The quantities of `ROWS` on the held-out digits, in nats per digit, summarised over seeds."""
    per_seed, options = [], config.evaluation
    for seed in range(config.num_seeds):
        state = jax.tree.map(lambda a, s=seed: a[s], states)
        key = jax.random.fold_in(stream(jax.random.key(config.seed), "evaluation"), seed)
        numbers, of_examples = {}, {}
        if method.PLAYERS.decoder == "likelihood":
            estimate = importance.log_likelihood(
                key, state, digits.test[: options.importance_images], model=model, binarize=digits.binarize,
                samples=options.importance_samples,
            )  # fmt: skip
            of_examples |= {
                "log_likelihood": estimate.log_likelihood, "effective_sample_size": estimate.effective_sample_size,
            }  # fmt: skip
        if hasattr(method, "elbo_terms"):
            terms = elbo_terms(
                key, state, digits.test, method=method, model=model, binarize=digits.binarize, draws=options.draws,
                chunk=options.chunk,
            )  # fmt: skip
            of_examples |= {"elbo": terms.elbo, "reconstruction_error": terms.reconstruction, "kl": terms.kl}
        if method.PLAYERS.encoder:
            codes = moments.posterior_draws(
                key, state, digits.test, model=model, binarize=digits.binarize, draws=1, chunk=options.chunk, name="codes"
            ).z[:, 0]
            prior = model.prior.sample(stream(key, "prior"), (len(codes),))
            rmse = quality.reconstruction_rmse(key, method, model, state, digits, digits.test, options.chunk)
            numbers |= {"kl_aggregated_posterior": knn.kl_divergence(codes, prior), "reconstruction_rmse": rmse}
        count = min(len(digits.test), SAMPLES)
        drawn, test = quality.samples(key, method, model, state, count), quality.pixels(digits.test[:count])
        flat = (images.reshape(count, -1).astype(np.float32) for images in (drawn, test))
        numbers["sliced_wasserstein"] = 1000.0 * sliced_wasserstein(*flat)
        means = {quantity: workdir.mean(values) for quantity, values in of_examples.items()}
        per_seed.append(means | {quantity: (number, "") for quantity, number in numbers.items()})
    return {quantity: workdir.summary(*zip(*[seed[quantity] for seed in per_seed], strict=True)) for quantity in per_seed[0]}


if __name__ == "__main__":
    launch.run("mnist", main)
