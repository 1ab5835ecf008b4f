"""What `python -m experiments.compare` compares: per suite a data set, a budget, and methods that share one decoder.

A method of one's own is a function that gives a `Method`, a line in METHODS of `avb_jax/build.py`, and a line in METHODS here.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections

from experiments import celeba, mnist, synthetic
from experiments.configs import celeba as celeba_config
from experiments.configs import mnist as mnist_config
from experiments.configs import synthetic as synthetic_config


class Entry(NamedTuple):
    """A method as a suite runs it."""

    fields: Mapping = {}  # of the config, next to the suite's
    variant: str = ""  # of the config
    published: float | None = None  # log p(x), where there is one
    reference: str = ""  # the entry that its likelihoods are paired with, in the place of the suite's


class Suite(NamedTuple):
    """What is compared."""

    about: str  # what is compared on what, and minutes of training on 2 cores
    main: Callable[[ml_collections.ConfigDict, pathlib.Path], dict]  # the experiment; gives its results
    get_config: Callable[[str], ml_collections.ConfigDict]
    entries: dict[str, Entry]
    methods: tuple[str, ...]  # the entries that run by default
    columns: dict[str, str]  # quantities of results.json, by title
    fields: Mapping = {}  # of the config, for all entries
    estimators: tuple[str, ...] = ()  # of experiments.evaluate, for the methods that have what it takes
    evaluation: Mapping = {}  # fields of experiments/configs/evaluate.py
    reference: str = "vae"  # the entry that likelihoods are paired with
    paired: tuple[str, str] = ("log_likelihood", "ais")  # by which estimator these are


ADAPTIVE = {
    "method": "avb",
    "contrast.kind": "gaussian",
    "adversary_floor": 3.0,
    "network.minus_log_prior": False,
    "noise_draws": 8,
}
METHODS = {
    "avb": {"method": "avb"},
    "avb_ac": ADAPTIVE,
    "vae": {"method": "vae"},
    "full": {"method": "vae", "posterior.kind": "full"},
    "planar": {"method": "vae", "posterior.kind": "planar"},
    "iaf": {"method": "vae", "posterior.kind": "iaf"},
    "iwae": {"method": "iwae", "noise_draws": 16},
    "realnvp": {"method": "vae", "posterior.kind": "realnvp"},
    "auxiliary": {"method": "vae", "posterior.kind": "auxiliary"},
    "sivi": {"method": "sivi"},
    "uivi": {"method": "uivi"},
    "iwhvi": {"method": "iwhvi"},
    "aae": {"method": "aae"},
    # R1: without it they leave out one or two of the four points.
    "bigan": {"method": "bigan", "network.minus_log_prior": False, "gradient_penalty": 2.0},
    "gan": {"method": "gan", "gradient_penalty": 1.0},
    "vaegan": {"method": "vaegan", "gradient_penalty": 0.1},
}
WEIGHTED = {"avb_iw": {"method": "avb", "importance_weighted": True, "noise_draws": 8}}
# What the paper's introduction sets out from, as models of their own and as parts of VAE and AVB; of binary images.
PIXELS = {"pixels.channels": 16, "pixels.layers": 3, "pixels.kernel_size": 5}
MODELS = {
    "pixelcnn": {"method": "pixelcnn", **PIXELS},
    "row_lstm": {"method": "row_lstm", **PIXELS, "pixels.layers": 2},
    "realnvp_model": {"method": "realnvp", "realnvp.levels": 2},
    "vae_pixelcnn": {"method": "vae", "pixels.kind": "pixelcnn", **PIXELS},
    "avb_pixelcnn": {"method": "avb", "pixels.kind": "pixelcnn", **PIXELS},
    # One layer, which sees a pixel above and one to the left: what lies further away is left to z.
    "vae_pixelcnn_near": {"method": "vae", "pixels.kind": "pixelcnn", **PIXELS, "pixels.layers": 1, "pixels.kernel_size": 3},
    "avb_pixelcnn_near": {"method": "avb", "pixels.kind": "pixelcnn", **PIXELS, "pixels.layers": 1, "pixels.kernel_size": 3},
    "vae_flow_prior": {"method": "vae", "prior.kind": "flow"},
    "avb_flow_prior": {"method": "avb", "prior.kind": "flow", "network.minus_log_prior": False},
    "vae_vamp_prior": {"method": "vae", "prior.kind": "vamp"},
}
# On photographs T wins within a hundred steps by AVB's rates, with momentum, batch statistics and a penalty of 1.
GENERATORS = {
    name: {
        **METHODS[name],
        "gradient_penalty": 20.0,
        "network.batch_norm": False,
        "optimizer.b1": 0.0,
        **{f"optimizer.{player}_rate": 2e-4 for player in ("encoder", "decoder", "adversary")},
    }
    for name in ("gan", "vaegan", "bigan")
}
DIVERGENCES = {f"avb_{name}": {"method": "avb", "divergence": name} for name in ("kl", "reverse_kl", "pearson", "hellinger")}
ENTRIES = {name: Entry(fields) for name, fields in METHODS.items()}

LIKELIHOODS = {
    "log_likelihood_exact": "log p(x), exact (of real NVP a bound)",
    "log_likelihood_ais": "log p(x), AIS",
    "width_bdmc": "BDMC width",
    "log_likelihood_importance": "importance bound",
    "elbo": "ELBO",
    "kl": "KL(q(z\\|x), p(z))",
    "active_units_moments": "active units",
    "reconstruction_rmse_pixels": "pixel error (RMS)",
    "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
    "sliced_wasserstein_pixels": "samples: SWD x 1,000",
}
# Published: Mescheder, Nowozin & Geiger (2017), the later version, log-likelihoods by AIS after 2.5 million steps.
MNIST = {
    "avb_ac": Entry(variant="avb32_ac", published=-80.2),
    "vae": Entry(variant="vae32", published=-81.9),
    "avb8_ac": Entry(variant="avb8_ac", published=-89.6, reference="vae8"),
    "avb8": Entry(variant="avb8", published=-91.2, reference="vae8"),
    "vae8": Entry(variant="vae8", published=-90.9, reference="vae8"),
}
MNIST_OTHERS = {
    # With 32 latents a learned prior and a decoder that reads pixels need the contrast that 32 latents need.
    **{name: Entry(fields, "vae32") for name, fields in {**METHODS, **MODELS}.items() if name not in MNIST},
    **{name: Entry(MODELS[name], "avb32_ac") for name in ("avb_pixelcnn", "avb_pixelcnn_near", "avb_flow_prior")},
}

# Two latents, the same decoder, and posteriors of growing freedom; encoders of four hidden layers, of which the semi-implicit
# ones have two behind their noise.
DEEP = {"method": "vae", "network.encoder_widths": (256, 256)}
MNIST2 = {
    "vae": {"method": "vae"},
    "iwae": {"method": "iwae", "noise_draws": 16},
    "iaf": {**DEEP, "posterior.kind": "iaf"},
    "sivi": {"method": "sivi"},
    "uivi": {"method": "uivi"},
    "iwhvi": {"method": "iwhvi"},
    "avb": {"method": "avb"},
    **WEIGHTED,
}
# The same networks with 32 latents and, by names that end in 8, with 8; adaptive contrast, as `avb32_ac` has it.
FULLY_CONNECTED = {
    "vae": {**DEEP, "encoder.kind": "black_box", "noise_draws": 1},
    "iwae": {**DEEP, "encoder.kind": "black_box", "method": "iwae", "noise_draws": 8},
    "avb_ac": {
        **{field: value for field, value in mnist_config.ADAPTIVE.items() if field not in mnist_config.PAPER},
        "network.encoder_widths": (256, 256),
        "network.adversary_components": 0,
        "encoder.kind": "black_box",
        "contrast.inflation": 1.0,
        "contrast.prior_share": 0.0,
    },
}
FULLY_CONNECTED["avb_iw"] = {**FULLY_CONNECTED["avb_ac"], "importance_weighted": True}
# Two layers of 300 units and 32 latents, in which semi-implicit posteriors have been compared (Sobolev & Vetrov 2019).
FULLY_CONNECTED_300 = {
    **FULLY_CONNECTED,
    "iaf": {**FULLY_CONNECTED["vae"], "posterior.kind": "iaf"},
    **{name: {"method": name, "noise_dim": 32, "noise_draws": 1} for name in ("sivi", "uivi", "iwhvi")},
}
# Of both suites of fully connected networks.
IN_TEN_THOUSAND_STEPS = {
    "columns": {
        "log_likelihood_ais": "log p(x), AIS",
        "log_likelihood_importance": "importance bound",
        "elbo": "ELBO",
        "kl": "KL(q(z\\|x), p(z))",
        "active_units_moments": "active units",
    },
    "fields": {"steps": 10_000, "checkpoint_every": 2500},
    "estimators": ("moments", "ais"),
    "evaluation": {"ais.images": 200, "ais.chains": 8, "ais.temperatures": 250},
}
# AVB by what T compares q with.
BY_CONTRAST = {f"avb_{kind}": {"method": "avb", "contrast.kind": kind} for kind in ("prior", "full_covariance")}

SUITES = {
    "synthetic": Suite(
        "the paper's four points, 4 seeds; half a minute each",
        synthetic.main,
        synthetic_config.get_config,
        {
            **ENTRIES,
            **{name: Entry(fields) for name, fields in DIVERGENCES.items()},
            # Half of the noise Gaussian, the config's default, cannot fill a quarter of the plane.
            "avb_ac": Entry({**ADAPTIVE, "contrast.gaussian_share": 0.0}),
        },
        tuple(METHODS),
        {
            "log_likelihood": "log p(x), quadrature",
            "elbo": "ELBO",
            "elbo_knn": "ELBO, KL by k-NN",
            "reconstruction_rmse_pixels": "pixel error (RMS)",
            "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
            "sliced_wasserstein_pixels": "samples: SWD x 1,000",
            "points_generated": "points sampled, of 4",
        },
    ),
    "digits": Suite(
        "scikit-learn's 8x8 digits, 8 latents, 3 seeds, no files; 1 to 3 minutes each, 14 for avb_iw",
        mnist.main,
        mnist_config.get_config,
        {name: Entry(fields, "digits") for name, fields in {**METHODS, **MODELS, **WEIGHTED}.items()},
        tuple(METHODS),
        LIKELIHOODS,
        {
            "network.family": "mlp",
            "network.activation": "relu",
            "network.widths": (128, 128),
            "steps": 4000,
            "network.adversary_features": 128,
            "num_seeds": 3,
            "log_every": 200,
            "checkpoint_every": 2000,
            "check_images": 0,
        },
        ("exact", "importance", "ais", "bdmc", "elbo", "moments"),
        {"ais.chains": 8, "ais.temperatures": 250, "ais.chunk": 20},
    ),
    "mnist": Suite(
        "MNIST by the later version of the paper, convolutional, 32 and 8 latents; VAE 5 minutes, AVB 20 to 30",
        mnist.main,
        mnist_config.get_config,
        {**MNIST, **MNIST_OTHERS},
        tuple(MNIST),
        LIKELIHOODS,
        {},
        ("exact", "elbo", "importance", "bdmc", "ais"),
        {"ais.images": 200, "ais.chains": 8, "ais.temperatures": 250, "ais.chunk": 20, "elbo.images": 2000},
    ),
    "mnist2": Suite(
        "MNIST, fully connected, 2 latents, log p(x) exact, 20,000 steps; 3 to 20 minutes each, 40 for avb_iw",
        mnist.main,
        mnist_config.get_config,
        {name: Entry(fields, "latent2") for name, fields in {**MNIST2, **BY_CONTRAST}.items()},
        tuple(MNIST2),
        {
            "log_likelihood_quadrature": "log p(x), exact",
            "elbo_lower_semi_implicit": "ELBO, from below",
            "elbo_upper_semi_implicit": "from above",
            "elbo": "ELBO",
            "kl": "KL(q(z\\|x), p(z))",
            "kl_aggregated_posterior": "KL(q(z), p(z)), k-NN",
        },
        {},
        ("quadrature", "semi_implicit"),
        {"quadrature.images": 500, "semi_implicit.images": 300, "semi_implicit.inner": 2000},
        paired=("log_likelihood", "quadrature"),
    ),
    "mnist_fc": Suite(
        "MNIST, fully connected, 32 and 8 latents, weighted draws; VAE 2 minutes, IWAE 5, AVB 20 to 25",
        mnist.main,
        mnist_config.get_config,
        {
            f"{name}{suffix}": Entry({**fields, "latent_dim": latents}, "latent2", reference=f"vae{suffix}")
            for latents, suffix in ((32, ""), (8, "8"))
            for name, fields in FULLY_CONNECTED.items()
        },
        ("vae", "iwae", "avb_iw"),
        **IN_TEN_THOUSAND_STEPS,
    ),
    "mnist_300": Suite(
        "MNIST, fully connected 300-300, 32 latents, next to semi-implicit rivals; 2 to 25 minutes each",
        mnist.main,
        mnist_config.get_config,
        {
            name: Entry({**fields, "latent_dim": 32, "network.widths": (300, 300), "network.encoder_widths": ()}, "latent2")
            for name, fields in FULLY_CONNECTED_300.items()
        },
        ("vae", "iaf", "sivi", "iwhvi", "avb_ac", "iwae", "avb_iw"),
        **IN_TEN_THOUSAND_STEPS,
    ),
    "faces": Suite(
        "photographs of faces, 64x64, CPU-sized networks; half an hour each",
        celeba.main,
        celeba_config.get_config,
        {name: Entry(fields, "small") for name, fields in {**METHODS, **GENERATORS}.items()},
        ("avb_ac", "vae", "aae", "bigan", "gan", "vaegan"),
        {
            "elbo": "ELBO",
            "kl": "KL(q(z\\|x), p(z))",
            "reconstruction_rmse_pixels": "pixel error (RMS)",
            "ms_ssim_samples": "MS-SSIM",
            "sliced_wasserstein_64": "SWD x 1,000, 64 pixels",
            "sliced_wasserstein_32": "32",
            "sliced_wasserstein_16": "16",
        },
        {"data.name": "images"},
    ),
}
