"""Eight schools: AVB for a posterior given as a NumPyro model, next to NUTS and Gaussian variational inference.

    python -m experiments.eight_schools --config=experiments/configs/eight_schools.py --workdir=DIR

Variants, with the time on one core that other work shared, and KL(q, NUTS) in nats by nearest neighbours:

    ''     11 minutes; AVB 0.00, a full-rank Gaussian 0.84
    smoke  3 minutes, most of them compiling, to see that everything runs: its numbers mean nothing
"""

import ml_collections

from experiments.configs.common import changes_of
from experiments.configs.fields import Field, nested

VARIANTS = {"": {}, "smoke": {"avb.steps": 50, "gaussian.steps": 50, "nuts.samples": 200, "nuts.warmup": 100, "samples": 500}}

FIELDS = {
    "seed": Field(0, "seed of everything random"),
    "samples": Field(5000, "draws of each posterior, compared with as many of NUTS"),
    "nuts.chains": Field(4, "chains of NUTS side by side"),
    "nuts.warmup": Field(1000, "steps of each chain that are left out"),
    "nuts.samples": Field(5000, "draws of each chain"),
    "gaussian.steps": Field(10_000, "steps of SVI for the Gaussians"),
    "gaussian.rate": Field(5e-3, "Adam's learning rate for the Gaussians, falling to 0 along a cosine"),
    "gaussian.particles": Field(8, "draws of a step of SVI"),
    "gaussian.bound_draws": Field(10_000, "draws for the Gaussians' bound"),
    "avb.steps": Field(8000, "steps at most; `avb_jax.inference.fit` explains what follows"),
    "avb.batch_size": Field(512, "draws of a step of AVB"),
    "avb.noise_dim": Field(0, "numbers of noise beyond twice those of z"),
    "avb.widths": Field((128, 128), "widths of the sampler's network"),
    "avb.adversary_widths": Field((256, 256), "widths of T's network"),
    "avb.adversary_steps": Field(2, "updates of T per step"),
    "avb.gaussian_share": Field(0.3, "share of q's variance at the start that is independent Gaussian noise"),
    "avb.sampler_rate": Field(2e-4, "Adam's learning rate for the sampler"),
    "avb.adversary_rate": Field(1e-3, "Adam's learning rate for T"),
    "avb.inflation": Field(1.0, "how many times as wide as q the Gaussian is that T compares q with"),
    "avb.clip": Field(10.0, "largest norm of a gradient"),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '' or 'smoke'."""
    config = ml_collections.ConfigDict(nested(FIELDS))
    config.update_from_flattened_dict(changes_of(VARIANTS, variant))
    return config.lock()
