"""Faces with the CelebA networks of section 4 (Figures 5 and 6).

    python -m experiments.celeba --config=experiments/configs/celeba.py --config.data.dir=DIR --workdir=DIR
        64x64, three ResNet units for every hidden layer, 64 channels: for GPUs and TPUs; not yet trained to its end
    python -m experiments.celeba --config=experiments/configs/celeba.py:small --config.method=avb,vae [...]
        37 minutes on 2 shared cores, for 20,000 faces; sliced Wasserstein distance at 32 pixels 0.062 (AVB), 0.060 (VAE)
    python -m experiments.celeba --config=experiments/configs/celeba.py:smoke
        drawn faces, no files; about a minute on 2 cores, to see that everything runs

data.dir holds img_align_celeba (or img_align_celeba.zip) and list_eval_partition.txt. Or data.name is 'images', and data.dir
any folder or zip of images; or 'tfds:celeb_a'; or 'drawn_faces'. Variants: '' (AVB), 'vae' (same decoder, Gaussian posterior),
'small' and 'small_vae' (a quarter of the channels, one unit: for CPUs), 'smoke'.
"""

import ml_collections

from experiments.launch import variant_of

SMALL = {
    "network.channels": 16, "network.adversary_channels": 16, "network.units": 1, "network.adversary_widths": (256,),
    "batch_size": 32, "steps": 6000, "checkpoint_every": 1000, "log_every": 50, "latent_dim": 32, "ema_decay": 0.995,
    "optimizer.encoder_rate": 5e-4, "optimizer.decoder_rate": 1e-3, "optimizer.adversary_rate": 1e-3, "optimizer.b1": 0.9,
    # Squared error: a learned scale asks for hundreds of nats in z, which the aggregated posterior fills, and samples miss,
    # for longer than a CPU trains (0.5 showed no faces after 600 steps, 1.0 did).
    "likelihood_std": 1.0,
}  # fmt: skip
SMOKE = {
    **SMALL, "data.name": "drawn_faces", "data.size": 32, "data.crop": 0, "latent_dim": 16, "steps": 60,
    "log_every": 10, "checkpoint_every": 60, "network.channels": 8, "network.adversary_channels": 8,
    "evaluation.images": 128,
}  # fmt: skip
VARIANTS = {
    "": {}, "vae": {"method": "vae"}, "small": SMALL, "small_vae": {**SMALL, "method": "vae"}, "smoke": SMOKE,
}  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '', 'vae', 'small', 'small_vae' or 'smoke'."""
    config = ml_collections.ConfigDict(
        {
            "method": "avb",
            "steps": 100_000,
            "batch_size": 128,
            "seed": 0,
            "num_seeds": 1,
            "latent_dim": 64,
            "noise_dim": 16,
            "parallel": "auto",
            "likelihood": "gaussian",  # or 'logistic', discretised to 256 levels
            "likelihood_std": 0.0,  # of a Gaussian; 0 learns it
            "likelihood_scale": "global",  # one learned scale, or one for each pixel ("pixel")
            "beta": 1.0,
            "beta_warmup": 0,
            "adversary_steps": 1,
            "adversary_floor": 0.0,  # c: the KL term takes max(T, -c), at a cost of at most e^-c nats; 0: none
            "divergence": "jensen_shannon",  # the adversary's objective; or kl, reverse_kl, pearson, hellinger
            "feature_weight": 1.0,  # gamma of a VAE/GAN
            "noise_draws": 1,  # of z per example: all for T, the first one to decode
            "ema_decay": 0.999,
            "log_every": 100,
            "check_images": 16,  # held-out, at each checkpoint: the ELBO under T beside a bound without T
            "checkpoint_every": 5000,
            "data": {
                "name": "celeba",
                "dir": "",
                "binarize": "none",
                "size": 64,  # 32, 64 or 128; any from 4 on will do
                "crop": 140,  # central pixels kept before resizing; 108 is the other convention; 0: the largest square
                "held_out": 0.05,  # share of 'images' that is for testing; celeba has its own partition
                "split_seed": 0,
                "flip": True,
                "cache": "",  # decoded images; ~/.cache/avb_jax by default
            },
            # 'adaptive': T tells q(z|x) from a Gaussian with its moments. With `bases`, noise networks of latent_dim +
            # noise_dim inputs, the encoder knows its moments, and gaussian_share of its noise is Gaussian; with 0 it is a black
            # box, whose moments are those of moment_draws draws. moment_gradients: the moments are trained without T, which
            # shapes q alone; what makes the shape moves at shape_rate times the encoder's rate.
            "contrast": {
                "kind": "adaptive", "bases": 4, "widths": (64, 64), "gaussian_share": 0.5, "moment_draws": 8,
                "moment_gradients": False, "shape_rate": 1.0,
            },
            # Of a VAE: diagonal, full, planar, iaf, realnvp or auxiliary (whose auxiliary variable has noise_dim dimensions).
            "posterior": {"kind": "diagonal", "flows": 4, "widths": (64, 64)},
            "network": {
                "family": "resnet",
                "channels": 64,
                "kernel_size": 3,
                "units": 3,
                "activation": "leaky_relu",
                "batch_norm": True,  # in encoder and adversary, as in the paper
                "decoder_batch_norm": False,
                "adversary_channels": 64,
                "adversary_kernel_size": 5,
                "adversary_widths": (1024,),
                "head_scale": 0.01,  # variance of the initial kernels behind the mean and scale of q; near 0, q starts near p
                "minus_log_prior": False,  # under adaptive contrast T starts, and if q is Gaussian ends, at 0
            },
            "optimizer": {
                "encoder_rate": 1e-4,
                "decoder_rate": 3e-4,
                "adversary_rate": 3e-4,
                "b1": 0.5,
                "b2": 0.999,
                "schedule": "cosine",
                "clip": 0.0,
            },
            # Image quality over so many samples and test images. `features`: 'MODULE:FUNCTION', for a Frechet distance.
            "evaluation": {"draws": 1, "chunk": 50, "images": 2000, "features": ""},
        }
    )
    config.update_from_flattened_dict(variant_of(VARIANTS, variant))
    return config.lock()
