"""Eight schools: AVB for a posterior given as a NumPyro model, next to NUTS and Gaussian variational inference.

python -m experiments.eight_schools --config=experiments/configs/eight_schools.py --workdir=DIR
"""

import ml_collections

from experiments.configs.common import changes_of

VARIANTS = {"": {}, "smoke": {"avb.steps": 50, "gaussian.steps": 50, "nuts.samples": 200, "nuts.warmup": 100, "samples": 500}}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '' or 'smoke'."""
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "samples": 5000,  # of each posterior, compared with as many of NUTS
            "nuts": {"chains": 4, "warmup": 1000, "samples": 5000},  # per chain
            "gaussian": {"steps": 10_000, "rate": 5e-3, "particles": 8, "bound_draws": 10_000},  # particles: per step
            "avb": {
                "steps": 8000,
                "batch_size": 512,
                "noise_dim": 16,
                "widths": (128, 128),
                "adversary_widths": (256, 256),
                "adversary_steps": 2,
                "gaussian_share": 0.05,
                "sampler_rate": 2e-4,
                "adversary_rate": 1e-3,
                "clip": 10.0,
            },
        }
    )
    config.update_from_flattened_dict(changes_of(VARIANTS, variant))
    return config.lock()
