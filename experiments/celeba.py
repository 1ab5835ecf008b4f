"""Faces by any method with the CelebA networks of section 4: samples, reconstructions, interpolations, image quality.

python -m experiments.celeba --config=experiments/configs/celeba.py[:VARIANT] --config.data.dir=DIR --workdir=DIR
"""

import importlib
import pathlib
from collections.abc import Callable

import ml_collections

import avb_jax
from avb_jax import UserError, build, figures
from avb_jax.evaluation import ELBO, ImageQuality, ReconstructionError, image_quality
from avb_jax.evaluation.elbo import of_kl
from avb_jax.evaluation.samples import as_pixels
from avb_jax.training import workdir
from avb_jax.transforms import of_seed
from experiments import launch

SHOWING = 1000  # steps after which samples look like faces, with the small networks
ROWS = {
    "elbo": "ELBO",
    "reconstruction_error": "  reconstruction error",
    "kl": "  KL(q(z|x), p(z))",
    "reconstruction_rmse_pixels": "  root mean squared error of a pixel in [0, 1]",
    "ms_ssim_samples": "MS-SSIM of pairs of samples",
    "frechet_distance_features": "Frechet distance",
}


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, dict]:
    """Trains what the config names, with pictures at each checkpoint, and measures its samples."""
    features = _features(config.evaluation.features)
    faces = build.dataset(config)
    methods = build.methods(config, faces.x_shape)
    launch.check(config, folder)
    options = config.evaluation
    count = min(options.images, len(faces.test), len(faces.train))
    results, notes = {}, []
    for name, method in methods.items():
        state = launch.train(config, folder, method, faces, [figures.Pictures(folder / "figures")], built=True)
        print(f"{name}: evaluating on {count:,} test images", flush=True)
        neighbours = figures.draw("neighbours", method, of_seed(state, 0), faces, name=f"{folder.name}, {name}")
        figures.save(folder / "figures" / f"{name}_neighbours_{config.steps:06}.png", neighbours)
        estimators = [
            ELBO(draws=options.draws, chunk=options.chunk, images=count),
            ReconstructionError(chunk=options.chunk, images=count),
            ImageQuality(images=count, features=features),
        ]
        report = avb_jax.evaluate(
            method,
            state,
            faces,
            [estimator for estimator in estimators if not estimator.lacks(method)],
            num_seeds=config.num_seeds,
            seed=config.seed,
        )
        kind = of_kl(method)
        headlines = {name: (name, kind) for name in ("elbo", "reconstruction_error", "kl")}
        results[name], notes = launch.headline(report, headlines), [*notes, *report.notes]
        workdir.write_results(folder, {name: results[name]})
    real = image_quality.pyramid_distances(as_pixels(faces.train[:count]), as_pixels(faces.test[:count]))
    print(table(results, real, count))
    print("".join(f"{note}\n" for note in notes))
    if config.steps < SHOWING:
        print(f"{config.steps} steps show that everything runs; pictures are colour noise until some {SHOWING}: --config.steps")
    print(f"Numbers in {folder / 'results.json'}, pictures in {folder / 'figures'}")
    return results


def table(results: dict[str, dict], real: dict[int, float], count: int) -> str:
    """The quantities as text, a column per method."""
    lines = [f"\n{'nats per image, test set':50}" + "".join(f"{name:>14}" for name in results)]
    for quantity, label in ROWS.items():
        if any(quantity in quantities for quantities in results.values()):
            numbers = [f"{q[quantity]['mean']:>14,.6g}" if quantity in q else f"{'':14}" for q in results.values()]
            lines.append(f"{label:50}" + "".join(numbers).rstrip())
    lines.append(f"\nsliced Wasserstein distance x 1,000 to {count:,} test images, by level of the pyramid")
    lines.append(f"{'pixels':50}" + "".join(f"{name:>14}" for name in [*results, "training set"]))
    for level, distance in real.items():
        numbers = [q[f"sliced_wasserstein_{level}"]["mean"] for q in results.values()]
        lines.append(f"{level:<50}" + "".join(f"{number:>14.4g}" for number in [*numbers, distance]))
    return "\n".join(lines)


def _features(name: str) -> Callable | None:
    """The user's 'MODULE:FUNCTION'."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"evaluation.features={name!r}: not MODULE:FUNCTION of an importable module ({error})") from None


if __name__ == "__main__":
    launch.run("celeba", main)
