"""AVB and SIVI for NumPyro models: `fit_numpyro`, and the same in the shape of NumPyro's guides."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_value

from avb_jax.inference.fitted import Fit
from avb_jax.inference.fitting import fit, game
from avb_jax.streams import stream
from avb_jax.training.callbacks import Callback
from avb_jax.types import Array, PyTree, UserError

QUANTILE_DRAWS = 20_000
DRAWN_BY = ("method", "widths", "gaussian_share", "noise_dim")  # the settings that the sampler depends on


class RunResult(NamedTuple):
    """What `AutoAVB.run` gives, as NumPyro's `SVI.run` does."""

    params: dict[str, PyTree]  # of the sampler, for `sample_posterior`, `median` and `quantiles`
    state: Fit  # with its diagnostics, `log_evidence`, `to_inference_data`, `save`
    losses: Array  # minus the ELBO as it was trained, under T with one, nats: means of blocks of steps


class _AutoImplicit(AutoContinuous):
    """A guide whose q is a sampler's, over a model's unconstrained space."""

    _method: str

    def __init__(self, model: Callable, *, prefix: str = "auto", init_loc_fn: Callable | None = None, **settings: Any):
        if given := {"seed", "steps"} & set(settings):
            raise UserError(f"{min(given)}: is for `run`, which takes rng_key and num_steps, or for `fit_numpyro`")
        self._settings, self._starts = {"method": self._method, **settings}, init_loc_fn is not None
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn or init_to_value(values={}))

    def run(
        self, rng_key: Array, num_steps: int, *args: Any, progress_bar: bool = True, workdir: str | None = None, **kwargs: Any
    ) -> RunResult:
        """Fits the guide to the model's posterior given these arguments.

        Args:
          rng_key: of everything random.
          num_steps: of training, at most.
          args: the model's.
          progress_bar: whether there is progress on the terminal.
          workdir: folder for checkpoints and metrics, from which an interrupted fit continues.
          kwargs: the model's.

        Raises:
          UserError: as `fit_numpyro`.
        """
        seed = int(jax.random.randint(rng_key, (), 0, 2**31 - 1))
        losses, given = _Losses(), self._settings
        options = {
            "callbacks": [*given.get("callbacks", ()), losses],
            "quiet": given.get("quiet", False) or not progress_bar,
            "workdir": workdir or given.get("workdir"),
        }
        found = self.fit(seed, args, kwargs, steps=num_steps, **options)
        return RunResult({self._name: found.state.ema.params.encoder}, found, jnp.asarray(losses.values))

    def fit(self, seed: int, args: Sequence, kwargs: dict, **options: Any) -> Fit:
        """`fit` for the model with these arguments, drawing sites in the place of z."""
        self._prepare(stream(jax.random.key(seed), "numpyro"), args, kwargs)

        def log_density(z: Array) -> Array:
            return -self._potential_fn(self._unpack_latent(z))

        options = {**self._settings, **options}
        if "start" not in options:
            origin = jnp.zeros(self.latent_dim)
            options["start"] = self._init_latent if self._starts or not np.isfinite(log_density(origin)) else origin
        found = fit(log_density, self.latent_dim, seed=seed, **options)
        constrain = copy.copy(self)._constrain  # of these arguments, whatever the guide is fitted to afterwards
        runs = tuple(dataclasses.replace(one, constrain=constrain) for one in found.runs)
        return dataclasses.replace(found, constrain=constrain, runs=runs)

    def sample_posterior(self, rng_key: Array, params: dict, *args: Any, sample_shape: tuple = (), **kwargs: Any) -> dict:
        """Draws {site: [*sample_shape, ...]}, deterministic sites included; after `run` without the model's arguments."""
        if self.prototype_trace is None:
            self._prepare(rng_key, args, kwargs)
        played = {name: value for name, value in self._settings.items() if name in DRAWN_BY}
        played = game(lambda z: jnp.sum(z), self.latent_dim, **played)
        noise = jax.random.normal(rng_key, (int(np.prod(sample_shape, dtype=int)), played.noise_dim))
        draws = self._constrain(played.draw(params[self._name], noise))
        return {name: value.reshape(*sample_shape, *value.shape[1:]) for name, value in draws.items()}

    def quantiles(self, params: dict, quantiles: Sequence[float]) -> dict:
        """Quantiles {site: [len(quantiles), ...]} of each number of a site, over 20,000 draws that are always the same."""
        draws = self.sample_posterior(stream(jax.random.key(0), "quantiles"), params, sample_shape=(QUANTILE_DRAWS,))
        return {name: jnp.quantile(value, jnp.asarray(quantiles), axis=0) for name, value in draws.items()}

    def median(self, params: dict) -> dict:
        """The median {site: [...]} of each number of a site, over the same draws."""
        return {name: value[0] for name, value in self.quantiles(params, [0.5]).items()}

    @property
    def _name(self) -> str:
        return f"{self.prefix}_sampler"

    def _prepare(self, key: Array, args: Sequence, kwargs: dict) -> None:
        check_model(self.model, key, args, kwargs)
        with handlers.seed(rng_seed=key):
            self._setup_prototype(*args, **kwargs)

    def _constrain(self, z: Array) -> dict:
        return jax.vmap(lambda one: self._unpack_and_constrain(one, {}))(z)

    def _get_posterior(self):
        name = type(self).__name__
        raise UserError(
            f"{name}: SVI cannot train it, since its draws have no density; call {name}(model).run(key, steps, ...)"
        )


class AutoAVB(_AutoImplicit):
    """A guide for NumPyro models whose q is any sampler's, trained by AVB with adaptive contrast.

    `run(rng_key, num_steps, *args)` is in the place of `SVI(...).run`. Settings are those of `inference.fit` but for `seed` and
    `steps`.

    Example:
      >>> import numpyro, numpyro.distributions as dist
      >>> model = lambda y: numpyro.sample("y", dist.Normal(numpyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0), obs=y)
      >>> guide = AutoAVB(model, widths=(8,), adversary_widths=(8,), batch_size=16)
      >>> result = guide.run(jax.random.key(0), 10, jnp.zeros(3), progress_bar=False)
      >>> guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(4, 5))["mean"].shape
      (4, 5)
    """

    _method = "avb"


class AutoSIVI(_AutoImplicit):
    """`AutoAVB`'s sampler, trained by semi-implicit variational inference: no T."""

    _method = "sivi"


def fit_numpyro(model: Callable, *args: Any, model_kwargs: dict | None = None, seed: int = 0, **options: Any) -> Fit:
    """Fits q to the posterior of a NumPyro model, over its own unconstrained space.

    Args:
      model: with all latent sites continuous.
      args: the model's, data among them.
      model_kwargs: the model's keyword arguments.
      seed: of everything random.
      options: of `fit`.

    Returns:
      A `Fit` whose `sample` gives {site: [count, ...]} in the constrained space, deterministic sites included.

    Raises:
      UserError: the model has discrete latent sites, a plate that is subsampled, params to be learned, or no latent sites.
    """
    return AutoAVB(model).fit(seed, args, model_kwargs or {}, **options)


def check_model(model: Callable, key: Array, args: Sequence, kwargs: dict) -> None:
    """Refuses a model whose posterior is over other than a fixed number of real numbers.

    Raises:
      UserError: with the site.
    """
    trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
    latent = {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    plates = {name: site for name, site in trace.items() if site["type"] == "plate"}
    found = [f"latent site {name!r} is discrete; sum it out" for name, site in latent.items() if site["fn"].support.is_discrete]
    found += [
        f"plate {name!r} is subsampled ({site['args'][1]} of {site['args'][0]}); give all of the data"
        for name, site in plates.items()
        if site["args"][1] is not None and site["args"][1] != site["args"][0]
    ]
    found += [
        f"site {name!r} is a param; make it a sample site with a prior, or fix it"
        for name, site in trace.items()
        if site["type"] == "param"
    ]
    found += [] if latent else ["the model has no latent sites"]
    if found:
        raise UserError(f"model: {found[0]}, since q is over a space of real numbers")


class _Losses(Callback):
    """Minus the ELBO of each block of steps."""

    def __init__(self):
        self.values = []

    def report(self, step: int, numbers: dict[str, np.ndarray], examples_per_second: float | None) -> None:
        self.values.append(-float(numbers["elbo"].mean()))
