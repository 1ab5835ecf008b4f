"""How `python -m experiments.evaluate --workdir=RUN` evaluates a run, of whatever experiment and method.

Variants, with the time for one method and one seed of the MNIST config on 2 cores:

    ''     about 40 minutes, a third of it for `ais`, of which benchmarks/ais.py measures the cost
    quick  5 minutes on a core that other work shared: every estimator, to look at a run and not to report it

An estimator's `images` counts test images, from the first; None is all of them.
"""

import ml_collections

from experiments.configs.common import changes_of
from experiments.configs.fields import Field, nested

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
IMAGES, DRAWS, CHUNK = "test images, from the first; None: all", "draws of z per image", "images at once, on each device"
FIELDS = {
    "method": Field("", "which of the run's methods, several with commas; all by default"),
    "step": Field("", "step of the checkpoint; best: that of the best held-out bound; the latest by default"),
    "seeds": Field(0, "how many of the run's seeds, from the first; 0: all"),
    "seed": Field(0, "seed of the estimators' own randomness"),
    "estimators": Field(
        "auto",
        "which, with commas: exact, elbo, semi_implicit, optimality, importance, ais, bdmc, quadrature, moments, "
        "linear_probe, knn; auto: all that apply",
    ),
    "data_dir": Field("", "where the data is, if no longer where the run found it"),
    "exact.images": Field(None, IMAGES, int),
    "exact.draws": Field(1, "dequantised values per image"),
    "exact.chunk": Field(20, CHUNK),
    "elbo.images": Field(None, IMAGES, int),
    "elbo.draws": Field(4, DRAWS),
    "elbo.chunk": Field(250, CHUNK),
    "semi_implicit.images": Field(200, IMAGES),
    "semi_implicit.draws": Field(16, DRAWS),
    "semi_implicit.inner": Field(10_000, "draws of u that score each draw of z"),
    "semi_implicit.inner_chunk": Field(250, "draws of u at once"),
    "semi_implicit.chunk": Field(10, CHUNK),
    "optimality.images": Field(None, IMAGES, int),
    "optimality.draws": Field(4, DRAWS),
    "optimality.chunk": Field(250, CHUNK),
    "optimality.steps": Field(10_000, "steps of the fresh T's training"),
    "optimality.batch_size": Field(128, "examples of a step of the fresh T"),
    "optimality.rate": Field(1e-3, "Adam's learning rate for the fresh T"),
    "importance.images": Field(1000, IMAGES),
    "importance.samples": Field(256, "importance samples per image"),
    "importance.initial": Field("encoder", "the proposal: encoder, prior or semi_implicit"),
    "importance.fit_draws": Field(64, "draws of z that the proposal is fitted to"),
    "importance.inflation": Field(1.2, "factor on the proposal's standard deviation"),
    "importance.chunk": Field(20, CHUNK),
    "ais.images": Field(100, IMAGES),
    "ais.chains": Field(16, "chains per image"),
    "ais.temperatures": Field(500, "temperatures from the initial distribution to the posterior"),
    "ais.leapfrog_steps": Field(10, "leapfrog steps of Hamiltonian Monte Carlo at each temperature"),
    "ais.initial": Field("encoder", "where chains begin: encoder, prior or semi_implicit"),
    "ais.fit_draws": Field(64, "draws of z that the initial distribution is fitted to"),
    "ais.inflation": Field(1.2, "factor on the initial distribution's standard deviation"),
    "ais.chunk": Field(10, "images at once, on each device; 100 or more on a GPU"),
    "bdmc.images": Field(20, "images that are simulated; all else as for ais"),
    "quadrature.images": Field(100, IMAGES),
    "quadrature.points": Field(None, "cells of the first grid per latent; None: 200, 60, 12 for 1, 2, 3 latents", int),
    "quadrature.chunk": Field(2000, "cells at once"),
    "moments.images": Field(None, IMAGES, int),
    "moments.draws": Field(64, DRAWS),
    "moments.chunk": Field(20, CHUNK),
    "linear_probe.images": Field(None, IMAGES, int),
    "linear_probe.examples": Field(5000, "training examples whose codes the classifier is fitted to"),
    "linear_probe.steps": Field(500, "steps of the classifier's training"),
    "linear_probe.decay": Field(1e-4, "decay of the classifier's weights"),
    "knn.images": Field(64, "test images whose q(z|x) is compared with the prior; 0: none"),
    "knn.draws": Field(1000, "draws of z from each of these"),
    "knn.codes": Field(10_000, "draws of q(z), spread over the test images"),
    "knn.neighbours": Field(10, "k, the nearest neighbours looked at"),
    "knn.chunk": Field(4, CHUNK),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '' or 'quick'."""
    config = ml_collections.ConfigDict(nested(FIELDS))
    config.update_from_flattened_dict(changes_of(VARIANTS, variant))
    return config.lock()
