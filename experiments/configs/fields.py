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
    "seed": Field(0, "seed of everything random"),
    "num_seeds": Field(1, "runs trained side by side, from a seed each"),
    "parallel": Field("auto", "how devices are used: auto, jit (one), sharded or pmap"),
    "precision": Field(
        "float32",
        "of what the networks compute: float32; or bfloat16, with params and losses in float32, where they compute no density",
    ),
    "rematerialize": Field(False, "networks compute again in the backward pass what they would have kept: memory for time"),
    "profile": Field(False, "a trace of the second and third block of steps, in profile/"),
    "latent_dim": Field(8, "numbers of a code z"),
    "noise_dim": Field(16, "numbers of noise that an encoder gets; a semi-implicit one, or a basis, beyond latent_dim"),
    "likelihood": Field("bernoulli", "p(x|z): bernoulli, gaussian or logistic (discretised to 256 levels)"),
    "likelihood_std": Field(None, "standard deviation of a gaussian p(x|z); None: it is learned", float),
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
    "noise_draws": Field(
        1,
        "draws of z per example: all for T, the first one to decode; iwae and importance_weighted decode and weight all",
    ),
    "importance_weighted": Field(False, "AVB's draws are all decoded and weighted: a bound on log p(x) in the ELBO's place"),
    "inner_draws": Field(15, "K of SIVI and IWHVI: draws of u that score each z next to its own"),
    "hmc.burn_in": Field(5, "steps of UIVI's chains on the noise that are left out"),
    "hmc.chain_steps": Field(5, "steps of UIVI's chains on the noise that are averaged over"),
    "hmc.leapfrog_steps": Field(5, "leapfrog steps in each step of UIVI's chains"),
    "hmc.step_size": Field(0.1, "size of a leapfrog step"),
    "feature_weight": Field(1.0, "gamma of a VAE/GAN"),
    "ema_decay": Field(None, "decay of moving averages of params, which are then what is evaluated; None: off", float),
    "log_every": Field(100, "steps per report"),
    "checkpoint_every": Field(1000, "steps per checkpoint"),
    "restore_from": Field("", "RUN[:STEP]: a new run begins with another's State, its latest by default; best is a step, too"),
    "start_from": Field("", "RUN[:STEP]: the players begin with those of another run, of any method, that they can hold"),
    "rollbacks": Field(0, "how often a run that diverged goes back to its latest checkpoint, with other noise"),
    "check_images": Field(
        32, "held-out examples looked at with each checkpoint, by bounds without T; best/ keeps the best State"
    ),
    "patience": Field(
        None, "checkpoints in a row without a better held-out bound on log p(x), after which training ends; None: never", int
    ),
    "data.name": Field(
        "",
        "four_points, digits, mnist, celeba, images, drawn_faces, tfds:mnist (binarized_mnist, fashion_mnist, celeb_a)",
    ),
    "data.dir": Field("", "folder of the data's files"),
    "data.binarize": Field("none", "none, dynamic (pixels drawn anew each time) or threshold"),
    "encoder.kind": Field(
        "black_box",
        "AVB's: black_box; or semi_implicit, whose ELBO has bounds without T (a diagonal VAE or IWAE then has its layers)",
    ),
    "encoder.widths": Field(
        (256, 256), "widths of a semi-implicit encoder's layers behind the features of x, which also read its noise"
    ),
    "encoder.smallest_std": Field(0.0, "smallest standard deviation of z given a semi-implicit encoder's noise"),
    "encoder.noise_scale": Field(
        1.0, "variance of a semi-implicit encoder's first kernels that read its noise; near 0, q starts Gaussian"
    ),
    "contrast.kind": Field(
        "prior",
        "what T compares q(z|x) with: prior; gaussian, with q's moments (adaptive contrast); or full_covariance",
    ),
    "contrast.bases": Field(4, "of gaussian: noise networks of an encoder that knows its moments; 0: a black box"),
    "contrast.widths": Field((64, 64), "of the noise networks of contrast.bases"),
    "contrast.gaussian_share": Field(0.5, "share of the noise of an encoder with contrast.bases that stays Gaussian"),
    "contrast.moment_draws": Field(
        8, "draws of z for the moments, where the encoder gives none; more than latent_dim for full_covariance"
    ),
    "contrast.moment_gradients": Field(False, "whether the moments are trained without T, which then shapes q alone"),
    "contrast.shape_rate": Field(1.0, "rate of what shapes q beyond its moments, over the encoder's"),
    "contrast.inflation": Field(1.0, "how many times as wide as q the Gaussian is that T compares q with"),
    "contrast.prior_share": Field(0.0, "share of p(z) in what T compares q with, so that T also sees points far from q"),
    "posterior.kind": Field("diagonal", "a VAE's: diagonal, full, planar, iaf, realnvp or auxiliary"),
    "posterior.flows": Field(4, "layers of the posterior's flow"),
    "posterior.widths": Field((64, 64), "widths of the network in each layer of the posterior's flow"),
    "prior.kind": Field("standard_normal", "p(z): standard_normal; or learned with the decoder: flow or vamp"),
    "prior.flows": Field(4, "layers of the prior's flow"),
    "prior.widths": Field((64, 64), "widths of the network in each layer of the prior's flow"),
    "prior.components": Field(100, "learned inputs u of vamp, the mixture of q(z|u)"),
    "pixels.kind": Field(
        "independent",
        "pixels in p(x|z): independent, or each by a network of those before it: pixelcnn, row_lstm",
    ),
    "pixels.features": Field(8, "numbers that z becomes for each pixel, where pixels.kind is a network"),
    "pixels.channels": Field(32, "channels of the pixel network of pixels.kind; also of the methods pixelcnn and row_lstm"),
    "pixels.layers": Field(5, "layers of the pixel network of pixels.kind"),
    "pixels.kernel_size": Field(7, "kernel size of the first layer of the pixel network of pixels.kind"),
    "realnvp.channels": Field(32, "channels of the method realnvp's networks"),
    "realnvp.layers": Field(2, "layers of each coupling's network in the method realnvp"),
    "realnvp.scales": Field(2, "scales of the method realnvp"),
    "realnvp.levels": Field(256, "values that a pixel has, for the method realnvp"),
    "network.activation": Field("relu", "relu, leaky_relu, elu, silu or tanh"),
    "network.head_scale": Field(1.0, "variance of the first kernels behind q's mean and scale; near 0, q starts near p"),
    "network.minus_log_prior": Field(True, "T is the network less log p(z), which it then has not to learn"),
    "optimizer.encoder_rate": Field(1e-3, "Adam's learning rate for the encoder"),
    "optimizer.decoder_rate": Field(1e-3, "Adam's learning rate for the decoder"),
    "optimizer.adversary_rate": Field(1e-3, "Adam's learning rate for T"),
    "optimizer.b1": Field(0.5, "Adam's decay of the first moment"),
    "optimizer.b2": Field(0.999, "Adam's decay of the second moment"),
    "optimizer.schedule": Field("cosine", "how the learning rates change: cosine (to 0) or constant"),
    "optimizer.clip": Field(None, "largest norm of each player's gradient; None: any", float),
    "optimizer.accumulate": Field(1, "steps whose gradients are averaged into one update: batches that do not fit"),
}
# Of one family of networks or one experiment alone, which give the values.
OTHERS = {
    "network.family": "mlp or conv; resnet is the faces'",
    "network.widths": "widths of the hidden layers of fully connected networks",
    "network.encoder_widths": "widths of further layers of the encoder",
    "network.channels": "channels of the first convolution; of a ResNet, of all",
    "network.kernel_size": "kernel size of the convolutions",
    "network.units": "ResNet units for every hidden layer of the paper's",
    "network.batch_norm": "batch normalisation in encoder and adversary, as in the paper",
    "network.decoder_batch_norm": "batch normalisation in the decoder",
    "network.z_widths": "widths of T's network of z",
    "network.adversary": "how T joins x and z: inner_product (section 4), joint (by layers of its own) or mixture",
    "network.adversary_components": "Gaussians of the mixture in a joint T, or of the mixture that is T; 0: none",
    "network.adversary_features": "numbers that T's networks of x and z come down to",
    "network.adversary_channels": "channels of T's convolutions",
    "network.adversary_kernel_size": "kernel size of T's convolutions",
    "network.adversary_widths": "widths of T's fully connected layers",
    "data.size": "pixels a side: 32, 64 or 128; any from 4 on will do",
    "data.crop": "central pixels kept before resizing; 0: the largest square; None: 140 of CelebA's 178x218, else 0",
    "data.held_out": "share of 'images' that is for testing; celeba has its own partition",
    "data.split_seed": "of the random split that data.held_out asks for",
    "data.flip": "whether training images are mirrored, half of the times",
    "data.cache": "where decoded images are kept; ~/.cache/avb_jax by default",
    "evaluation.samples": "draws for the ELBO and for the nearest-neighbour estimates",
    "evaluation.draws": "draws of z per held-out example",
    "evaluation.chunk": "held-out examples at once",
    "evaluation.importance_images": "held-out examples for importance sampling",
    "evaluation.importance_samples": "samples per example for importance sampling",
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
