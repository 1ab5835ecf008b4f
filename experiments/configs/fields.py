"""The fields of a training's config: the default in most experiments, and a sentence, which `--help` and the docs print.

Fields of the networks are those of the family that an experiment chooses; a field that may be None is off where it is.
"""

from typing import Any, NamedTuple

from ml_collections.config_dict import placeholder


class Field(NamedTuple):
    """One field."""

    default: Any
    text: str
    kind: type | None = None  # of a value, where the default is None


TRAINING = {
    "method": Field(
        "avb",
        "what is trained, several by commas: avb, vae, iwae, sivi, uivi, iwhvi, aae, bigan, gan, vaegan, pixelcnn, row_lstm, "
        "realnvp",
    ),
    "steps": Field(1000, "steps of training in all"),
    "batch_size": Field(128, "examples of a step, over all devices"),
    "seed": Field(0, "of everything random"),
    "num_seeds": Field(1, "runs trained side by side, from a seed each"),
    "parallel": Field("auto", "how devices are used: auto, jit (one), sharded or pmap"),
    "precision": Field("float32", "of what the networks compute: float32 or bfloat16; params and losses stay in float32"),
    "rematerialize": Field(False, "networks compute again in the backward pass what they would have kept: memory for time"),
    "profile": Field(False, "a trace of the second and third block of steps, in profile/"),
    "latent_dim": Field(8, "numbers of a code z"),
    "noise_dim": Field(16, "numbers of noise that an encoder gets; a semi-implicit one, or a basis, beyond latent_dim"),
    "likelihood": Field("bernoulli", "p(x|z): bernoulli, gaussian or logistic (discretised to 256 levels)"),
    "likelihood_std": Field(None, "of a Gaussian; None: it is learned", float),
    "likelihood_scale": Field("pixel", "a learned scale for each pixel (pixel), or one for all (global)"),
    "beta": Field(1.0, "weight of the KL term; 1 is the ELBO"),
    "beta_warmup": Field(0, "steps over which beta rises from 0"),
    "adversary_steps": Field(1, "updates of T per step"),
    "gradient_penalty": Field(0.0, "weight of R1, half the square of T's slope: at the data, and of AVB in z"),
    "adversary_floor": Field(None, "c: the KL term takes max(T, -c), which costs at most e^-c nats; None: off", float),
    "divergence": Field("jensen_shannon", "T's objective: jensen_shannon, kl, reverse_kl, pearson or hellinger"),
    "generator_divergence": Field(
        "non_saturating",
        "what gan, bigan and vaegan minimise by T: non_saturating, jensen_shannon, kl, reverse_kl, pearson or hellinger",
    ),
    "noise_draws": Field(1, "draws of z per example: all for T, the first one to decode"),
    "importance_weighted": Field(False, "AVB's draws are all decoded and weighted: a bound on log p(x) in the ELBO's place"),
    "inner_draws": Field(15, "K of SIVI and IWHVI: draws of u that score each z next to its own"),
    "hmc.burn_in": Field(5, "of UIVI's chains on the noise: steps left out"),
    "hmc.chain_steps": Field(5, "steps averaged over"),
    "hmc.leapfrog_steps": Field(5, "of each"),
    "hmc.step_size": Field(0.1, "of these"),
    "feature_weight": Field(1.0, "gamma of a VAE/GAN"),
    "ema_decay": Field(None, "of moving averages, which are then what is evaluated; None: off", float),
    "log_every": Field(100, "steps per report"),
    "checkpoint_every": Field(1000, "steps per checkpoint"),
    "restore_from": Field("", "RUN[:STEP]: a new run begins with another's State, its latest by default; best is a step, too"),
    "rollbacks": Field(0, "how often a run that diverged goes back to its latest checkpoint, with other noise"),
    "check_images": Field(
        32, "held-out examples looked at with each checkpoint, by bounds without T; best/ keeps the best State"
    ),
    "patience": Field(
        None, "checkpoints without a better bound on log p(x) of those, after which training ends; None: all", int
    ),
    "data.name": Field("", "four_points, digits, mnist, celeba, images, drawn_faces, or tfds:NAME"),
    "data.dir": Field("", "folder of the data's files"),
    "data.binarize": Field("none", "none, dynamic (pixels drawn anew each time) or threshold"),
    "encoder.kind": Field("black_box", "AVB's: black_box, or semi_implicit, whose ELBO has bounds that need no T"),
    "encoder.widths": Field((256, 256), "of a semi-implicit encoder's layers that join x's features and noise"),
    "encoder.smallest_std": Field(0.0, "of z given that noise"),
    "contrast.kind": Field(
        "prior",
        "what T compares q(z|x) with: prior; gaussian, with q's moments (adaptive contrast); or full_covariance",
    ),
    "contrast.bases": Field(4, "of gaussian: noise networks of an encoder that knows its moments; 0: a black box"),
    "contrast.widths": Field((64, 64), "of these networks"),
    "contrast.gaussian_share": Field(0.5, "of that encoder's noise"),
    "contrast.moment_draws": Field(8, "of any other encoder, for its moments; more than latent_dim for full_covariance"),
    "contrast.moment_gradients": Field(False, "whether the moments are trained without T, which then shapes q alone"),
    "contrast.shape_rate": Field(1.0, "rate of what makes that shape, over the encoder's"),
    "contrast.inflation": Field(1.0, "of the standard deviation of the Gaussian whose draws T is shown, over q's"),
    "contrast.prior_share": Field(0.0, "of draws from p(z) among them, by which T sees far from q, too"),
    "posterior.kind": Field("diagonal", "a VAE's: diagonal, full, planar, iaf, realnvp or auxiliary"),
    "posterior.flows": Field(4, "layers of a flow"),
    "posterior.widths": Field((64, 64), "of each layer's network"),
    "prior.kind": Field("standard_normal", "p(z): standard_normal; or learned with the decoder: flow or vamp"),
    "prior.flows": Field(4, "layers of a flow"),
    "prior.widths": Field((64, 64), "of each layer's network"),
    "prior.components": Field(100, "of vamp, a mixture of q(z|u) at learned inputs u"),
    "pixels.kind": Field("independent", "of p(x|z): independent, or each by a network of those before it: pixelcnn, row_lstm"),
    "pixels.features": Field(8, "of z for each pixel"),
    "pixels.channels": Field(32, "of that network, also as a method of its own"),
    "pixels.layers": Field(5, "likewise"),
    "pixels.kernel_size": Field(7, "of its first layer"),
    "realnvp.channels": Field(32, "of the method realnvp"),
    "realnvp.layers": Field(2, "of each coupling's network"),
    "realnvp.scales": Field(2, "of its architecture"),
    "realnvp.levels": Field(256, "values that a pixel has"),
    "network.activation": Field("relu", "relu, leaky_relu, silu, tanh or another of flax.linen's"),
    "network.head_scale": Field(1.0, "variance of the first kernels behind q's mean and scale; near 0, q starts near p"),
    "network.minus_log_prior": Field(True, "T is the network less log p(z), which it then has not to learn"),
    "optimizer.encoder_rate": Field(1e-3, "Adam's"),
    "optimizer.decoder_rate": Field(1e-3, "Adam's"),
    "optimizer.adversary_rate": Field(1e-3, "Adam's"),
    "optimizer.b1": Field(0.5, "Adam's"),
    "optimizer.b2": Field(0.999, "Adam's"),
    "optimizer.schedule": Field("cosine", "of the rates: cosine (to 0) or constant"),
    "optimizer.clip": Field(None, "largest norm of each player's gradient; None: any", float),
    "optimizer.accumulate": Field(1, "steps whose gradients are averaged into one update: batches that do not fit"),
}
# Of one family of networks or one experiment alone, which give the values.
OTHERS = {
    "network.family": "mlp or conv; resnet is the faces'",
    "network.widths": "of the hidden layers of fully connected networks",
    "network.encoder_widths": "of further layers of the encoder",
    "network.channels": "of the first layer, of ResNets of all",
    "network.kernel_size": "of convolutions",
    "network.units": "ResNet units for every hidden layer of the paper's",
    "network.batch_norm": "in encoder and adversary, as in the paper",
    "network.decoder_batch_norm": "in the decoder",
    "network.z_widths": "of T's network of z",
    "network.adversary": "how T joins x and z: inner_product (section 4), joint (by layers of its own) or mixture",
    "network.adversary_components": "of a mixture of Gaussians in a joint T, or that is T",
    "network.adversary_features": "numbers that T's networks of x and z come down to",
    "network.adversary_channels": "of T's convolutions",
    "network.adversary_kernel_size": "of these",
    "network.adversary_widths": "of its fully connected layers",
    "data.size": "pixels a side: 32, 64 or 128; any from 4 on will do",
    "data.crop": "central pixels kept before resizing; 0: the largest square; None: 140 of CelebA's 178x218, else 0",
    "data.held_out": "share of 'images' that is for testing; celeba has its own partition",
    "data.split_seed": "of that share",
    "data.flip": "whether training images are mirrored, half of the times",
    "data.cache": "where decoded images are kept; ~/.cache/avb_jax by default",
    "evaluation.samples": "draws for the ELBO and for the nearest-neighbour estimates",
    "evaluation.draws": "of z per held-out example",
    "evaluation.chunk": "held-out examples at once",
    "evaluation.importance_images": "held-out examples for importance sampling",
    "evaluation.importance_samples": "of it, per example",
    "evaluation.images": "samples, and test images, that image quality is measured on",
    "evaluation.features": "MODULE:FUNCTION of image features, for a Frechet distance",
}


def nested(fields: dict[str, Field]) -> dict:
    """The defaults of fields with dots in their names, group by group."""
    groups = {}
    for name, field in fields.items():
        *path, last = name.split(".")
        inner = groups
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = field.default if field.kind is None else placeholder(field.kind)  # one of its own for each config
    return groups


def texts(own: dict[str, Field] | None = None) -> dict[str, str]:
    """The sentence of each field of a training's config, or of a config that has fields of its `own`."""
    return {name: field.text for name, field in own.items()} if own else OTHERS | texts(TRAINING)
