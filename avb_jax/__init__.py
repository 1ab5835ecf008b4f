"""Adversarial Variational Bayes in JAX and Flax (Mescheder, Nowozin & Geiger 2017)."""

from avb_jax import releases

releases.warn()

from avb_jax import (  # noqa: E402
    conditional,
    contrast,
    data,
    distributions,
    divergences,
    evaluation,
    models,
    networks,
    priors,
    training,
    transforms,
)
from avb_jax.evaluation import Report, evaluate  # noqa: E402
from avb_jax.fitting import default_callbacks, fit, load, start_from  # noqa: E402
from avb_jax.method import Method  # noqa: E402
from avb_jax.methods.aae import aae  # noqa: E402
from avb_jax.methods.avb import avb  # noqa: E402
from avb_jax.methods.bigan import bigan  # noqa: E402
from avb_jax.methods.explicit import explicit  # noqa: E402
from avb_jax.methods.gan import gan  # noqa: E402
from avb_jax.methods.iwae import iwae  # noqa: E402
from avb_jax.methods.iwhvi import iwhvi  # noqa: E402
from avb_jax.methods.sivi import sivi  # noqa: E402
from avb_jax.methods.uivi import uivi  # noqa: E402
from avb_jax.methods.vae import vae  # noqa: E402
from avb_jax.methods.vaegan import vaegan  # noqa: E402
from avb_jax.network import Network  # noqa: E402
from avb_jax.training.callbacks import Callback  # noqa: E402
from avb_jax.training.loop import Interrupted  # noqa: E402
from avb_jax.types import (  # noqa: E402
    AdversaryOutput,
    Diverged,
    Draws,
    Players,
    Posterior,
    State,
    Terms,
    UserError,
)
from avb_jax.version import __version__  # noqa: E402

__all__ = [
    "AdversaryOutput",
    "Callback",
    "Diverged",
    "Draws",
    "Interrupted",
    "Method",
    "Network",
    "Players",
    "Posterior",
    "Report",
    "State",
    "Terms",
    "UserError",
    "__version__",
    "aae",
    "avb",
    "bigan",
    "conditional",
    "contrast",
    "data",
    "default_callbacks",
    "distributions",
    "divergences",
    "evaluate",
    "evaluation",
    "explicit",
    "fit",
    "gan",
    "iwae",
    "iwhvi",
    "load",
    "models",
    "networks",
    "priors",
    "sivi",
    "start_from",
    "training",
    "transforms",
    "uivi",
    "vae",
    "vaegan",
]
