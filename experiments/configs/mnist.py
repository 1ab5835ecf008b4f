"""Handwritten digits with the DC-GAN family of section 4 (Figure 4).

    python -m experiments.mnist --config=experiments/configs/mnist.py --config.data.dir=DIR --workdir=DIR
        9 minutes of training on 2 cores; held-out ELBO -104.5 nats under T, likelihood bound -108.4
    python -m experiments.mnist --config=experiments/configs/mnist.py:digits
        scikit-learn's 8x8 digits, no files; 9 minutes on 2 cores; held-out ELBO -22.6 nats under T, likelihood bound -22.8

data.dir holds MNIST's four IDX files. Variants: '' (AVB), 'vae' (same decoder, Gaussian posterior), 'digits', 'digits_vae'; and
the paper's comparison, which `python -m experiments.compare --suite=mnist` runs, with results in the README: 'avb8', 'avb8_ac',
'avb32_ac' (adaptive contrast), 'vae8', 'vae32', with 8 or 32 latents; on 2 cores about 20 minutes for AVB and 5 for the VAE.
Under adaptive contrast they train the moments of q without T, and its shape slowly; the README says what that changed.
"""

import ml_collections

from experiments.launch import variant_of

DIGITS = {
    "data.name": "digits", "network.kernel_size": 3, "log_every": 100, "adversary_steps": 2,
}  # fmt: skip
# The paper's comparison: the same decoder throughout, 8 or 32 latents, plain, with adaptive contrast, or a VAE.
PAPER = {
    "steps": 10_000, "batch_size": 128, "network.adversary_features": 1024, "network.z_widths": (512, 512),
    "checkpoint_every": 1000, "evaluation.importance_images": 1000,
}  # fmt: skip
ADAPTIVE = {
    **PAPER, "contrast.kind": "adaptive", "adversary_floor": 3.0, "noise_dim": 16, "noise_draws": 8,
    "network.minus_log_prior": False, "network.head_scale": 0.01, "contrast.gaussian_share": 0.3,
    "contrast.moment_gradients": True, "contrast.shape_rate": 0.1,
}  # fmt: skip
VARIANTS = {
    "": {}, "vae": {"method": "vae"}, "digits": DIGITS, "digits_vae": {**DIGITS, "method": "vae"},
    "avb8": PAPER, "avb8_ac": ADAPTIVE, "avb32_ac": {**ADAPTIVE, "latent_dim": 32},
    "vae8": {**PAPER, "method": "vae", "network.head_scale": 0.01},
    "vae32": {**PAPER, "method": "vae", "network.head_scale": 0.01, "latent_dim": 32},
}  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '', 'vae', 'digits', 'digits_vae', 'avb8', 'avb8_ac', 'avb32_ac', 'vae8' or 'vae32'."""
    config = ml_collections.ConfigDict(
        {
            "method": "avb",
            "steps": 3000,
            "batch_size": 128,
            "seed": 0,
            "num_seeds": 1,
            "latent_dim": 8,
            "noise_dim": 32,
            "parallel": "auto",
            "likelihood": "bernoulli",
            "likelihood_std": 0.0,  # of a Gaussian; 0 learns it
            "likelihood_scale": "pixel",  # a learned scale for each pixel, or one for all ("global")
            "beta": 1.0,
            "beta_warmup": 0,
            "adversary_steps": 1,
            "adversary_floor": 0.0,  # c: the KL term takes max(T, -c), at a cost of at most e^-c nats; 0: none
            "divergence": "jensen_shannon",  # the adversary's objective; or kl, reverse_kl, pearson, hellinger
            "feature_weight": 1.0,  # gamma of a VAE/GAN
            "noise_draws": 1,  # of z per example: all for T, the first one to decode
            "ema_decay": 0.999,
            "log_every": 50,
            "check_images": 32,  # held-out, at each checkpoint: the ELBO under T beside a bound without T
            "checkpoint_every": 500,
            "data": {"name": "mnist", "dir": "", "binarize": "dynamic"},
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
                "family": "conv",  # or mlp
                "widths": (256, 256),  # of mlp, which reads none of the next five
                "channels": 16,
                "kernel_size": 5,
                "batch_norm": True,  # in encoder and adversary, as in the paper
                "decoder_batch_norm": False,
                "z_widths": (512,),  # the adversary's z-net: one hidden layer
                "activation": "leaky_relu",
                "adversary_features": 512,
                "head_scale": 1.0,  # variance of the initial kernels behind the mean and scale of q; near 0, q starts near p
                "minus_log_prior": True,
            },
            "optimizer": {
                # At 1e-3 and 2e-3, after 7,500 steps, the ELBO under T stood 12 nats over the sampled bound, not 4 (README).
                "encoder_rate": 3e-4,
                "decoder_rate": 1e-3,
                "adversary_rate": 1e-3,
                "b1": 0.5,
                "b2": 0.999,
                "schedule": "cosine",
                "clip": 0.0,
            },
            "evaluation": {"draws": 4, "chunk": 250, "importance_images": 1000, "importance_samples": 256},
        }
    )
    config.update_from_flattened_dict(variant_of(VARIANTS, variant))
    return config.lock()
