"""Faces by any method with the CelebA networks of section 4: samples, reconstructions, interpolations, image quality.

    python -m experiments.celeba --config=experiments/configs/celeba.py[:VARIANT] --config.data.dir=DIR --workdir=DIR
"""

import functools
import importlib
import pathlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from avb_jax import UserError, workdir
from avb_jax.data import Dataset
from avb_jax.evaluation import image_quality
from avb_jax.evaluation.elbo import elbo_terms
from avb_jax.players import Model
from avb_jax.streams import stream
from avb_jax.types import State
from experiments import build, launch, pictures, quality

ROWS = {
    "elbo": "ELBO",
    "reconstruction_error": "  reconstruction error",
    "kl": "  KL(q(z|x), p(z))",
    "reconstruction_rmse": "  root mean squared error of a pixel in [0, 1]",
    "ms_ssim": "MS-SSIM of pairs of samples",
    "frechet_distance": "Frechet distance",
}


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Trains what the config names, with pictures at each checkpoint, and measures its samples."""
    features = _features(config.evaluation.features)
    faces = build.dataset(config)
    launch.claim(config, folder)
    count = min(config.evaluation.images, len(faces.test), len(faces.train))
    results, protocols = {}, {}
    for name, method in build.methods(config).items():
        model = build.model(config, name, faces.x_shape)
        draw = functools.partial(pictures.save, folder / "figures", name, method, model, faces)
        states = launch.train(config, folder, name, method, model, faces, on_checkpoint=draw)
        print(f"{name}: evaluating on {count:,} test images", flush=True)
        state = jax.tree.map(lambda a: a[0], states)
        path = folder / "figures" / f"{name}_neighbours_{config.steps:06}.png"
        pictures.draw(path, "neighbours", method, model, faces, state)
        numbers = []
        for seed in range(config.num_seeds):
            state = jax.tree.map(lambda a, s=seed: a[s], states)
            key = jax.random.fold_in(stream(jax.random.key(config.seed), "evaluation"), seed)
            quantities, protocols[name] = evaluate(key, method, model, state, faces, config, count, features)
            numbers.append(quantities)
        results[name] = {quantity: workdir.summary([n[quantity] for n in numbers]) for quantity in numbers[0]}
        workdir.write_results(folder, {name: results[name]})
    real = image_quality.pyramid_distances(quality.pixels(faces.train[:count]), quality.pixels(faces.test[:count]))
    print(table(results, real, count))
    for name, protocol in protocols.items():
        if protocol:
            print(f"Frechet distance of {name}: {protocol}")
    if "avb" in results:
        print("AVB's KL and ELBO take T's word for the KL: estimates that bound nothing.")
    print(f"\nNumbers in {folder / 'results.json'}, pictures in {folder / 'figures'}")


def evaluate(
    key, method, model: Model, state: State, faces: Dataset, config: ml_collections.ConfigDict, count: int,
    features: Callable | None,
) -> tuple[dict[str, float], str]:  # fmt: skip
    """The quantities of `ROWS` and the sliced Wasserstein distances by level, for one run; the Frechet distance's protocol."""
    options = config.evaluation
    images, numbers = np.asarray(faces.test[:count]), {}
    if hasattr(method, "elbo_terms"):
        terms = elbo_terms(key, state, images, method=method, model=model, draws=options.draws, chunk=options.chunk)
        numbers |= {
            "elbo": float(terms.elbo.mean()), "reconstruction_error": float(terms.reconstruction.mean()),
            "kl": float(terms.kl.mean()),
        }  # fmt: skip
    if method.PLAYERS.encoder:
        numbers["reconstruction_rmse"] = quality.reconstruction_rmse(
            key, method, model, state, faces, images, options.chunk
        )
    test, half = quality.pixels(images), count // 2
    samples = quality.samples(key, method, model, state, count)
    numbers["ms_ssim"] = float(image_quality.ms_ssim(samples[:half], samples[half : 2 * half]).mean())
    distances = image_quality.pyramid_distances(samples, test)
    numbers |= {f"sliced_wasserstein_{level}": distance for level, distance in distances.items()}
    if features is None:
        return numbers, ""
    frechet = image_quality.frechet_distance(samples, test, features)
    return {**numbers, "frechet_distance": frechet.distance}, frechet.protocol


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
