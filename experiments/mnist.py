"""Handwritten digits by any method: likelihood and ELBO on held-out digits where it has them, samples, reconstructions.

python -m experiments.mnist --config=experiments/configs/mnist.py[:VARIANT] --config.data.dir=DIR --workdir=DIR
"""

import pathlib

import ml_collections

import avb_jax
from avb_jax import build
from avb_jax.evaluation import ELBO, KNN, Exact, ImportanceSampling, ReconstructionError, SampleDistance, SemiImplicit
from avb_jax.evaluation.elbo import of_kl
from avb_jax.figures import Pictures
from avb_jax.training import workdir
from experiments import launch

ROWS = {
    "log_likelihood": "log-likelihood, by importance sampling a bound",
    "log_likelihood_exact": "log-likelihood, exact; of realnvp a bound",
    "effective_sample_size_importance": "  effective sample size",
    "elbo": "ELBO",
    **launch.OF_Q,
    "reconstruction_error": "reconstruction error",
    "kl": "KL(q(z|x), p(z))",
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "reconstruction_rmse_pixels": "root mean squared error of a reconstructed pixel",
    "sliced_wasserstein_pixels": "sliced Wasserstein distance x 1,000 of samples, in pixels",
}


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, dict]:
    """Trains what the config names, with pictures at each checkpoint, and evaluates on the held-out digits."""
    digits = build.dataset(config)
    methods = build.methods(config, digits.x_shape)
    launch.check(config, folder)
    results, options = {}, config.evaluation
    for name, method in methods.items():
        state = launch.train(config, folder, method, digits, [Pictures(folder / "figures")], built=True)
        print(f"{name}: evaluating on {len(digits.test):,} held-out digits", flush=True)
        estimators = [
            Exact(),
            ImportanceSampling(images=options.importance_images, samples=options.importance_samples),
            ELBO(draws=options.draws, chunk=options.chunk),
            SemiImplicit(images=options.importance_images),
            KNN(images=0, codes=len(digits.test)),
            ReconstructionError(chunk=options.chunk),
            SampleDistance(),
        ]
        report = avb_jax.evaluate(
            method,
            state,
            digits,
            [estimator for estimator in estimators if not estimator.lacks(method)],
            num_seeds=config.num_seeds,
            seed=config.seed,
        )
        kind = of_kl(method)
        results[name] = launch.headline(
            report,
            {
                "log_likelihood": ("log_likelihood", "importance"),
                "elbo": ("elbo", kind),
                "reconstruction_error": ("reconstruction_error", kind),
                "kl": ("kl", kind),
                "kl_aggregated_posterior": ("kl_aggregated_posterior", "knn"),
                **{name: (name, "semi_implicit") for name in launch.OF_Q},
            },
        )
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
            print("  (KL and ELBO have the KL from T: estimates that bound nothing. The first line does not use T.)")
    print(f"\nNumbers in {folder / 'results.json'}, pictures in {folder / 'figures'}")
    return results


if __name__ == "__main__":
    launch.run("mnist", main)
