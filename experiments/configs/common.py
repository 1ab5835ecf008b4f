"""The fields of a training: what each means, and the values of most configs. An experiment's config says what it changes.

Fields of the networks are those of the family that an experiment chooses; None turns off what it is the value of.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from avb_jax.types import UserError


def training(network: dict, evaluation: dict, variants: dict[str, dict], variant: str, **changes) -> ml_collections.ConfigDict:
    """A locked config: the defaults here, an experiment's `changes` to them, and those of one of its variants.

    Args:
      network: values of the network's family, of the fields explained here.
      evaluation: fields that the experiment's own evaluation reads.
      variants: by name, the fields that each changes.
      variant: one of them.
      changes: the experiment's own values, groups as dictionaries.

    Raises:
      UserError: no such variant.
    """
    config = ml_collections.ConfigDict(
        {
            "method": "avb",  # several by commas; vae, sivi, uivi, iwhvi, aae, bigan, gan, vaegan, pixelcnn, row_lstm, realnvp
            "steps": 1000,
            "batch_size": 128,  # of a step, over all devices
            "seed": 0,  # of everything random
            "num_seeds": 1,  # runs trained side by side, from a seed each
            "parallel": "auto",  # how devices are used: jit, sharded, pmap
            "precision": "float32",  # or bfloat16, of what the networks compute; params, losses and optimisers stay in float32
            "rematerialize": False,  # networks compute again in the backward pass what they would have kept: memory for time
            "profile": False,  # a trace of the second and third block of steps, in profile/
            "latent_dim": 8,
            "noise_dim": 16,  # numbers of noise that a black-box encoder gets; semi-implicit, or a basis, beyond latent_dim
            "likelihood": "bernoulli",  # or gaussian, or logistic (discretised to 256 levels)
            "likelihood_std": placeholder(float),  # of a Gaussian; None: learned
            "likelihood_scale": "pixel",  # a learned scale for each pixel, or one for all ("global")
            "beta": 1.0,  # weight of the KL term; 1 is the ELBO
            "beta_warmup": 0,  # steps over which it rises from 0
            "adversary_steps": 1,  # updates of T per step
            "gradient_penalty": 0.0,  # weight of R1, half the square of T's slope: at the data, and of AVB in z
            "adversary_floor": placeholder(float),  # c: the KL term takes max(T, -c), which costs at most e^-c nats
            "divergence": "jensen_shannon",  # the adversary's objective; or kl, reverse_kl, pearson, hellinger
            # Of a generator without a likelihood (bigan, gan, vaegan): non_saturating, or a divergence between data and model:
            # jensen_shannon, kl, reverse_kl, pearson, hellinger.
            "generator_divergence": "non_saturating",
            "noise_draws": 1,  # of z per example: all for T, the first one to decode
            "inner_draws": 15,  # K of SIVI and IWHVI: draws of u that score each z next to its own
            "hmc": {"burn_in": 5, "chain_steps": 5, "leapfrog_steps": 5, "step_size": 0.1},  # on UIVI's noise
            "feature_weight": 1.0,  # gamma of a VAE/GAN
            "ema_decay": placeholder(float),  # of the averages that are evaluated
            "log_every": 100,  # steps per report
            "checkpoint_every": 1000,
            "restore_from": "",  # RUN[:step]: a new run begins with another's State, its latest by default; best is a step, too
            "rollbacks": 0,  # how often a run that has diverged goes back to its latest checkpoint, with other noise
            "check_images": 32,  # held-out, at each checkpoint: the ELBO next to bounds without T; best/ keeps the best State
            "data": {"name": "", "dir": "", "binarize": "none"},  # binarize: none, dynamic (anew each time) or threshold
            # Of AVB: black_box, or semi_implicit, whose ELBO has bounds that need no T; SIVI, UIVI and IWHVI have no other.
            "encoder": {
                "kind": "black_box",
                "widths": (256, 256),  # of the layers that join x's features and noise
                "smallest_std": 0.0,  # of z given that noise
            },
            # What T compares q(z|x) with: the prior; gaussian, with q's moments (adaptive contrast), or full_covariance; or
            # semi_implicit: a mixture of such an encoder's own conditionals, and of a wide Gaussian.
            "contrast": {
                "kind": "prior",
                "bases": 4,  # of gaussian: noise networks of an encoder that knows its moments; 0: a black box
                "widths": (64, 64),  # of these networks
                "gaussian_share": 0.5,  # of that encoder's noise
                "moment_draws": 8,  # of any other encoder, for its moments; more than latent_dim for full_covariance
                "moment_gradients": False,  # whether the moments are trained without T, which then shapes q alone
                "shape_rate": 1.0,  # rate of what makes that shape, over the encoder's
                "components": 16,  # of a mixture
                "broad": 0.5,  # the wide Gaussian's share of it
                "inflation": 1.2,  # its standard deviation, over q's
            },
            # Of a VAE: diagonal, full, planar, iaf, realnvp or auxiliary (whose auxiliary variable has noise_dim dimensions).
            "posterior": {"kind": "diagonal", "flows": 4, "widths": (64, 64)},
            # p(z): standard_normal; or learned with the decoder: flow, or vamp, a mixture of q(z|u) at learned inputs u.
            "prior": {"kind": "standard_normal", "flows": 4, "widths": (64, 64), "components": 100},
            # Pixels of p(x|z): independent, or each by a network of those before it: pixelcnn, row_lstm. As methods of these
            # names the same networks are models of x without latents; so is realnvp.
            "pixels": {"kind": "independent", "features": 8, "channels": 32, "layers": 5, "kernel_size": 7},
            "realnvp": {"channels": 32, "layers": 2, "scales": 2, "levels": 256},  # levels: values that a pixel has
            "network": {
                "activation": "relu",
                "head_scale": 1.0,  # variance of the initial kernels behind q's mean and scale; near 0, q starts near p
                "minus_log_prior": True,  # T is the network less log p(z), of which it then has not to learn
            },
            # Adam's.
            "optimizer": {
                "encoder_rate": 1e-3,
                "decoder_rate": 1e-3,
                "adversary_rate": 1e-3,
                "b1": 0.5,
                "b2": 0.999,
                "schedule": "cosine",  # or constant
                "clip": placeholder(float),  # of each player's gradient norm
                "accumulate": 1,  # steps whose gradients are averaged into one update: batches that do not fit
            },
            "evaluation": evaluation,
        }
    )
    config.network.update(network)
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name].update(value)
        else:
            config[name] = value
    config.update_from_flattened_dict(changes_of(variants, variant))
    return config.lock()


def changes_of(variants: dict[str, dict], variant: str) -> dict:
    """The fields that a config's variant changes.

    Raises:
      UserError: no such variant.
    """
    if variant not in variants:
        raise UserError(f"--config=...:{variant}: no such variant; there are {', '.join(v for v in variants if v)}")
    return variants[variant]
