"""AVB for a density that the user gives, or for the posterior of a NumPyro model, without a data set.

`fit` and `fit_numpyro` do all of it. `AutoAVB` and `AutoSIVI` are shaped like NumPyro's guides, `as_vi_algorithm` like
blackjax's algorithms, and `density_method` and `semi_implicit_method` are the methods for what else one may want to do.
"""

from avb_jax.inference.algorithm import as_vi_algorithm
from avb_jax.inference.checks import Diagnostics
from avb_jax.inference.density import Density, density_method, semi_implicit_method
from avb_jax.inference.fitted import Fit, load
from avb_jax.inference.fitting import EMA_DECAY, fit
from avb_jax.inference.guides import AutoAVB, AutoSIVI, fit_numpyro

__all__ = [
    "EMA_DECAY",
    "AutoAVB",
    "AutoSIVI",
    "Density",
    "Diagnostics",
    "Fit",
    "as_vi_algorithm",
    "density_method",
    "fit",
    "fit_numpyro",
    "load",
    "semi_implicit_method",
]
