"""How `python -m experiments.evaluate --workdir=RUN` evaluates a run, of whatever experiment and method.

With these settings, one method and one seed of the MNIST config take about 40 minutes on 2 cores, a third of it for `ais`, of
which benchmarks/ais.py measures the cost. An estimator's `images` counts test images, from the first; None is all of them.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from experiments.configs.common import changes_of

# Every part, at the least cost: to look at a run, not to report it.
QUICK = {
    "exact.images": 1000,
    "elbo.images": 1000,
    "semi_implicit.images": 50,
    "semi_implicit.inner": 1000,
    "optimality.steps": 300,
    "importance.images": 100,
    "ais.images": 8,
    "ais.temperatures": 100,
    "bdmc.images": 8,
    "quadrature.images": 20,
    "moments.images": 1000,
    "knn.images": 8,
}
VARIANTS = {"": {}, "quick": QUICK}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '' or 'quick'."""
    config = ml_collections.ConfigDict(
        {
            "method": "",  # one of the run's, several with commas; all by default
            "step": "",  # of the checkpoint; best: that of the best held-out bound; the latest by default
            "seeds": 0,  # how many of the run's seeds, from the first; 0 is all
            "seed": 0,  # of the estimators' own randomness
            # Which, with commas: exact, elbo, semi_implicit, optimality, importance, ais, bdmc, quadrature, moments, knn.
            # 'auto': all that apply.
            "estimators": "auto",
            "data_dir": "",  # where the data is, if no longer where the run found it
            "exact": {"images": placeholder(int), "draws": 1, "chunk": 20},
            "elbo": {"images": placeholder(int), "draws": 4, "chunk": 250},
            "semi_implicit": {"images": 200, "draws": 16, "inner": 10_000, "inner_chunk": 250, "chunk": 10},
            "optimality": {
                "images": placeholder(int),
                "draws": 4,
                "chunk": 250,
                "steps": 10_000,
                "batch_size": 128,
                "rate": 1e-3,
            },
            "importance": {
                "images": 1000,
                "samples": 256,
                "initial": "encoder",
                "fit_draws": 64,
                "inflation": 1.2,
                "chunk": 20,
            },
            "ais": {
                "images": 100,
                "chains": 16,
                "temperatures": 500,
                "leapfrog_steps": 10,
                "initial": "encoder",
                "fit_draws": 64,
                "inflation": 1.2,
                "chunk": 10,  # per device; 100 or more on a GPU
            },
            "bdmc": {"images": 20},  # simulated; all else as for ais
            # Points: cells of the first grid per latent, from -6 to 6; None: 200, 60, 12 for 1, 2, 3 latents.
            "quadrature": {"images": 100, "points": placeholder(int), "chunk": 2000},
            "moments": {"images": placeholder(int), "draws": 64, "chunk": 20},
            # Of q(z|x): images (0: none) and draws from each. Of q(z): codes in all, spread over the test set.
            "knn": {"images": 64, "draws": 1000, "codes": 10_000, "neighbours": 10, "chunk": 4},
        }
    )
    config.update_from_flattened_dict(changes_of(VARIANTS, variant))
    return config.lock()
