"""Estimators, one per file: frozen dataclasses of their settings, for `avb_jax.evaluate`. Numbers are in nats."""

from avb_jax.evaluation.ais import AIS
from avb_jax.evaluation.bdmc import BDMC
from avb_jax.evaluation.elbo import ELBO
from avb_jax.evaluation.encoding import codes
from avb_jax.evaluation.estimator import Estimator, Number
from avb_jax.evaluation.exact import Exact
from avb_jax.evaluation.importance import ImportanceSampling
from avb_jax.evaluation.knn import KNN
from avb_jax.evaluation.moments import Moments
from avb_jax.evaluation.optimality import Optimality
from avb_jax.evaluation.probe import LinearProbe
from avb_jax.evaluation.quadrature import Quadrature
from avb_jax.evaluation.report import Report
from avb_jax.evaluation.run import evaluate
from avb_jax.evaluation.samples import ImageQuality, ReconstructionError, SampleDistance
from avb_jax.evaluation.semi_implicit import SemiImplicit

__all__ = [
    "AIS",
    "BDMC",
    "ELBO",
    "KNN",
    "Estimator",
    "Exact",
    "ImageQuality",
    "ImportanceSampling",
    "LinearProbe",
    "Moments",
    "Number",
    "Optimality",
    "Quadrature",
    "ReconstructionError",
    "Report",
    "SampleDistance",
    "SemiImplicit",
    "codes",
    "evaluate",
]
