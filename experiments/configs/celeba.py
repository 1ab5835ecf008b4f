"""Faces with the CelebA networks of section 4 (Figures 5 and 6).

    python -m experiments.celeba --config=experiments/configs/celeba.py --config.data.dir=DIR --workdir=DIR
    python -m experiments.celeba --config=experiments/configs/celeba.py:small --config.method=avb,vae [...]
    python -m experiments.celeba --config=experiments/configs/celeba.py:smoke

data.dir holds img_align_celeba (or img_align_celeba.zip) and list_eval_partition.txt. Or data.name is 'images', and data.dir
any folder or zip of images; or 'tfds:celeb_a'; or 'drawn_faces'. Variants, with the time of training and the sliced Wasserstein
distance x 1,000 of 1,000 samples at 64, 32 and 16 pixels:

    ''         AVB at 64x64, three ResNet units for every hidden layer, 64 channels, for GPUs and TPUs: on paper 15 minutes on
               an H100 at 40% of its peak; no number, not yet trained to its end
    vae        the same decoder, Gaussian posterior: less than AVB's minutes; no number yet either
    small      a quarter of the channels, one unit, for CPUs: 36 minutes on one shared core, 20,000 faces; 131, 59, 27
    small_vae  its VAE: 23 minutes; 133, 58, 26
    smoke      drawn faces, no files, a minute on 2 cores, to see that everything runs: its pictures are colour noise yet, and
               faces with --config.steps=2000, under three minutes
"""

import ml_collections
from ml_collections.config_dict import placeholder

from experiments.configs.common import training

SMALL = {
    "network.channels": 16,
    "network.adversary_channels": 16,
    "network.units": 1,
    "network.adversary_widths": (256,),
    "batch_size": 32,
    "steps": 6000,
    "checkpoint_every": 1000,
    "log_every": 50,
    "latent_dim": 32,
    "ema_decay": 0.995,
    "optimizer.encoder_rate": 5e-4,
    "optimizer.decoder_rate": 1e-3,
    "optimizer.adversary_rate": 1e-3,
    "optimizer.b1": 0.9,
    # Squared error: a learned scale asks for hundreds of nats in z, which the aggregated posterior fills, and samples miss,
    # for longer than a CPU trains (0.5 showed no faces after 600 steps, 1.0 did).
    "likelihood_std": 1.0,
}
SMOKE = {
    **SMALL,
    "data.name": "drawn_faces",
    "data.size": 32,
    "latent_dim": 16,
    "steps": 60,
    "log_every": 10,
    "checkpoint_every": 60,
    "network.channels": 8,
    "network.adversary_channels": 8,
    "evaluation.images": 128,
}
VARIANTS = {
    "": {},
    "vae": {"method": "vae"},
    "small": SMALL,
    "small_vae": {**SMALL, "method": "vae"},
    "smoke": SMOKE,
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of a variant: '', 'vae', 'small', 'small_vae' or 'smoke'."""
    return training(
        network={
            "family": "resnet",
            "channels": 64,
            "kernel_size": 3,
            "units": 3,
            "activation": "leaky_relu",
            "batch_norm": True,
            "decoder_batch_norm": False,
            "adversary_channels": 64,
            "adversary_kernel_size": 5,
            "adversary_widths": (1024,),
            "head_scale": 0.01,
            "minus_log_prior": False,
        },
        evaluation={"draws": 1, "chunk": 50, "images": 2000, "features": ""},
        variants=VARIANTS,
        variant=variant,
        steps=100_000,
        latent_dim=64,
        likelihood="gaussian",
        likelihood_scale="global",
        ema_decay=0.999,
        check_images=16,
        checkpoint_every=5000,
        data={
            "name": "celeba",
            "size": 64,
            "crop": placeholder(int),
            "held_out": 0.05,
            "split_seed": 0,
            "flip": True,
            "cache": "",
        },
        # Location and scale of q are trained without T: with it, codes and prior came apart, and colours were off.
        contrast={"kind": "gaussian", "moment_gradients": True, "shape_rate": 0.1},
        optimizer={"encoder_rate": 1e-4, "decoder_rate": 3e-4, "adversary_rate": 3e-4},
    )
