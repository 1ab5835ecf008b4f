"""What a fit gives back: draws, numbers, a file, an ArviZ object."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from avb_jax.inference.checks import Diagnostics, Weighed
from avb_jax.method import Method
from avb_jax.streams import stream
from avb_jax.training.workdir import read_json, write_json
from avb_jax.types import Array, PyTree, State, UserError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ABOUT, DRAW, CONSTRAIN = "fit.json", "sampler.stablehlo", "sites.stablehlo"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A sampler that was fitted to a density, and what is known of it.

    Attributes:
      dim: of z.
      noise_dim: of the noise that a draw is made of.
      draw: noise [count, noise_dim] from N(0, I) -> z [count, dim].
      constrain: z [count, dim] -> what `sample` gives: z itself, or {site: [count, ...]} of a NumPyro model.
      diagnostics: whether to believe it, in numbers and, printed, in words.
      bound: E_q[log p~ - log q], nats: on average a lower bound on the log of p~'s integral, without T; what T says where
        q has no density to bound (`gaussian_share=0`).
      bound_error: its standard error over draws.
      log_evidence: log of p~'s integral, nats, by importance sampling from q; None where q has no density to bound.
      log_evidence_error: its standard error, which holds where `diagnostics.pareto_k` is at most 0.7.
      runs: the fits of all seeds that were trained side by side, this one among them.
      method: what was trained; None of a fit that was loaded, as the rest.
      state: its State: of the latest checkpoint that is not surely worse than one before.
      adversary: z [N, dim] -> T's log q(z) - log r(z) [N]; None without a T.
      contrast: mean [dim] and standard deviation [dim] of r.
      weigh: (key, count) -> draws of q with their log densities (`checks.Weighed`); None without a Gaussian share.
    """

    dim: int
    noise_dim: int
    draw: Callable[[Array], Array]
    constrain: Callable[[Array], PyTree]
    diagnostics: Diagnostics
    runs: Sequence["Fit"] = ()
    method: Method | None = None
    state: State | None = None
    adversary: Callable[[Array], Array] | None = None
    contrast: tuple[Array, Array] | None = None
    weigh: Callable[[Array, int], Weighed] | None = None

    @property
    def bound(self) -> float:
        found = self.diagnostics
        return found.elbo_under_t if found.elbo_lower is None else found.elbo_lower

    @property
    def bound_error(self) -> float:
        found = self.diagnostics
        return found.elbo_under_t_error if found.elbo_lower is None else found.elbo_error

    @property
    def log_evidence(self) -> float | None:
        return self.diagnostics.log_evidence

    @property
    def log_evidence_error(self) -> float | None:
        return self.diagnostics.log_evidence_error

    def unconstrained(self, key: Array, count: int) -> Array:
        """Draws [count, dim] of the density's own z."""
        return self.draw(jax.random.normal(key, (count, self.noise_dim)))

    def sample(self, key: Array, count: int) -> PyTree:
        """Draws from q: [count, dim], or {site: [count, ...]}."""
        return self.constrain(self.unconstrained(key, count))

    def resample(self, key: Array, count: int, factor: int = 4) -> PyTree:
        """Draws as `sample`'s, nearer to the density than q: of `factor` times as many, some stay, by their importance weights.

        None stays twice, so that with a factor of 1 these are `sample`'s.

        Raises:
          UserError: there is no density to weigh them by.
        """
        if self.weigh is None:
            raise UserError(
                "resample: needs the density and q's own, which a fit from a file, or without gaussian_share, lacks"
            )
        weigh_key, pick_key = jax.random.split(key)
        found = self.weigh(weigh_key, count * factor)
        # The count largest of log weights + Gumbel noise: draws without replacement.
        scores = found.log_weight + jax.random.gumbel(pick_key, found.log_weight.shape)
        return self.constrain(jnp.asarray(found.z)[jnp.argsort(-scores)[:count]])

    def to_inference_data(self, key: Array | None = None, draws: int = 1000, chains: int = 4) -> Any:
        """Draws for ArviZ (extra `arviz`), as (chain, draw): all independent, in equal shares.

        `sample_stats` has, where they are known, of each draw `lp` = log p~(z), and `log_q`, an estimate of log q(z) that is on
        average not below it (`checks.Weighed.upper`).

        Raises:
          UserError: ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError:
            raise UserError("to_inference_data: needs ArviZ; pip install 'avb_jax[arviz]'") from None
        key, count, stats = stream(jax.random.key(0), "inference_data") if key is None else key, draws * chains, {}
        if self.weigh is not None:
            found = self.weigh(key, count)
            z, stats = found.z, {"lp": found.log_density, "log_q": found.upper}
        else:
            z = self.unconstrained(key, count)
        values = self.constrain(z)
        values = values if isinstance(values, dict) else {"z": values}

        def in_chains(values: dict) -> dict:
            return {name: np.asarray(value).reshape(chains, draws, *value.shape[1:]) for name, value in values.items()}

        groups = {"posterior": in_chains(values), **({"sample_stats": in_chains(stats)} if stats else {})}
        if int(arviz.__version__.split(".")[0]) < 1:
            return arviz.from_dict(**groups)
        return arviz.from_dict(groups)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a folder from which `load` draws, on any machine, without the density, the model or its data.

        It holds the sampler as StableHLO, with sites' transformations and deterministic sites, and the diagnostics.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, function, size in ((DRAW, self.draw, self.noise_dim), (CONSTRAIN, self.constrain, self.dim)):
            shape = jax.ShapeDtypeStruct((*export.symbolic_shape("count"), size), jnp.float32)
            exported = export.export(jax.jit(function), platforms=PLATFORMS)(shape)
            (folder / file).write_bytes(exported.serialize())
        numbers = self.diagnostics._asdict()
        absent = [name for name, value in numbers.items() if value is None]  # JSON has null for what is not finite, too
        about = {"dim": self.dim, "noise_dim": self.noise_dim, "diagnostics": numbers, "absent": absent}
        write_json(folder / ABOUT, about)


def load(folder: str | pathlib.Path) -> Fit:
    """A fit that `Fit.save` wrote, which has `sample` and its numbers, and knows neither the density nor its own.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = pathlib.Path(folder)
    if not (folder / ABOUT).exists():
        raise UserError(f"{folder}: no fit there; give a folder that Fit.save wrote")
    about = read_json(folder / ABOUT)

    def read(file: str) -> Callable:
        try:
            return jax.jit(export.deserialize(bytearray((folder / file).read_bytes())).call)
        except Exception:  # whatever a reader of a flat buffer does with what is none
            raise UserError(f"{folder / file}: is not what Fit.save wrote; save the fit again") from None

    numbers, absent = about["diagnostics"], about.get("absent", list(about["diagnostics"]))
    numbers = {name: math.nan if value is None and name not in absent else value for name, value in numbers.items()}
    return Fit(about["dim"], about["noise_dim"], read(DRAW), read(CONSTRAIN), Diagnostics(**numbers))
