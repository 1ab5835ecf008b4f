"""The paper's synthetic example: Table 1 and Figure 3.

    python -m experiments.synthetic
        75 seconds on 2 cores; AVB's log-likelihood -1.412
    python -m experiments.synthetic --config=experiments/configs/synthetic.py:full
        12 minutes on 2 cores; -1.394, of at most -log 4 = -1.386
    python -m experiments.synthetic --config=experiments/configs/synthetic.py:paper
        the paper's 512-unit networks; with --config.method=avb 13 minutes on 2 shared cores; -1.408
"""

import ml_collections

from experiments.launch import variant_of

VARIANTS = {
    "": {},
    "full": {"steps": 16_000, "num_seeds": 8, "log_every": 500, "checkpoint_every": 4000, "evaluation.samples": 100_000},
    "paper": {
        "network.widths": (512, 512), "network.adversary_features": 512, "num_seeds": 1, "steps": 3000, "log_every": 100,
        "optimizer.encoder_rate": 5e-4, "optimizer.decoder_rate": 2e-3, "optimizer.adversary_rate": 1e-3,
    },
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '', 'full' or 'paper'."""
    config = ml_collections.ConfigDict(
        {
            "method": "avb,vae",
            "steps": 2000,
            "batch_size": 256,
            "seed": 0,
            "num_seeds": 4,
            "latent_dim": 2,
            "noise_dim": 4,  # of AVB's encoder; the Gaussian one has latent_dim
            "parallel": "auto",
            "likelihood": "bernoulli",
            "likelihood_std": 0.0,  # of a Gaussian likelihood; 0 learns it
            "likelihood_scale": "pixel",  # a learned scale for each pixel, or one for all ("global")
            "beta": 1.0,
            "beta_warmup": 0,
            "adversary_steps": 3,
            "adversary_floor": 0.0,  # c: the KL term takes max(T, -c), at a cost of at most e^-c nats; 0: none
            "divergence": "jensen_shannon",  # the adversary's objective; or kl, reverse_kl, pearson, hellinger
            "feature_weight": 1.0,  # gamma of a VAE/GAN
            "noise_draws": 1,  # of z per example: all for T, the first one to decode
            "ema_decay": 0.0,
            "log_every": 250,
            "check_images": 32,  # held-out, at each checkpoint: the ELBO under T beside a bound without T
            "checkpoint_every": 1000,
            "data": {"name": "four_points", "dir": "", "binarize": "none"},
            # 'adaptive': T tells q(z|x) from a Gaussian with its moments. With `bases`, noise networks of latent_dim +
            # noise_dim inputs, the encoder knows its moments, and gaussian_share of its noise is Gaussian; with 0 it is a black
            # box, whose moments are those of moment_draws draws. moment_gradients: the moments are trained without T, which
            # shapes q alone; what makes the shape moves at shape_rate times the encoder's rate.
            "contrast": {
                "kind": "none", "bases": 4, "widths": (64, 64), "gaussian_share": 0.5, "moment_draws": 8,
                "moment_gradients": False, "shape_rate": 1.0,
            },
            # Of a VAE: diagonal, full, planar, iaf, realnvp or auxiliary (whose auxiliary variable has noise_dim dimensions).
            "posterior": {"kind": "diagonal", "flows": 4, "widths": (64, 64)},
            "network": {
                "family": "mlp",
                "widths": (64, 64),
                "activation": "relu",
                "adversary_features": 64,
                "head_scale": 1.0,  # variance of the initial kernels behind the mean and scale of q; near 0, q starts near p
                "minus_log_prior": True,
            },
            "optimizer": {
                "encoder_rate": 2e-3,
                "decoder_rate": 8e-3,
                "adversary_rate": 4e-3,
                "b1": 0.5,
                "b2": 0.999,
                "schedule": "cosine",
                "clip": 0.0,  # of each player's gradient norm; 0 does not clip
            },
            "evaluation": {"samples": 20_000},  # draws for the ELBO and for the nearest-neighbour estimate
        }
    )
    config.update_from_flattened_dict(variant_of(VARIANTS, variant))
    return config.lock()
