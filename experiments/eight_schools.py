"""Eight schools (Rubin 1981; here as published with AVB): a posterior with two modes, by AVB, NUTS and Gaussian VI.

    python -m experiments.eight_schools --config=experiments/configs/eight_schools.py --workdir=DIR

theta_j = mu + tau eta_j, y_j ~ N(theta_j, sigma_j), and mu, tau, eta_j ~ N(0, 1): with tau's sign left open, the posterior is
symmetric under (tau, eta) -> (-tau, -eta), and both modes count. Log p(y), which no bound exceeds, is known by quadrature.
"""

import math
import pathlib
import sys
import time

import jax
import ml_collections
import numpy as np
import numpyro
import optax
from numpyro.distributions import Normal
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from scipy import stats

from avb_jax import inference
from avb_jax.evaluation import Number, knn
from avb_jax.evaluation.image_quality import sliced_wasserstein
from avb_jax.evaluation.report import combine
from avb_jax.figures import plots, save
from avb_jax.streams import stream
from avb_jax.training import workdir
from experiments import launch

Y = np.array([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SIGMA = np.array([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])
SITES = ("mu", "tau", "eta")
SHOWN = (r"$\mu$", r"$\tau$", r"$\eta_1$", r"$\eta_2$")  # in the figure, the first columns
LABELS = {"avb": "AVB, adaptive contrast", "mean_field": "Gaussian, mean field", "full_rank": "Gaussian, full rank"}


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Samples the posterior by each method and compares with NUTS."""
    workdir.claim(folder, config.to_dict())
    draws, seconds, results = {}, {}, {}
    for name, method in {"nuts": _nuts, "mean_field": _gaussian, "full_rank": _gaussian, "avb": _avb}.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        begun = time.monotonic()
        draws[name], extra = method(name, schools, config, folder)
        seconds[name] = time.monotonic() - begun
        results[name] = extra
    reference = draws.pop("nuts")
    # Half of the chains against the other half is what the estimators say of equal distributions.
    compared = {"nuts": (reference[::2], reference[1::2]), **{name: (z, reference[1::2]) for name, z in draws.items()}}
    for name, (z, other) in compared.items():
        z, other = _thin(z, config.samples), _thin(other, config.samples)
        numbers = {
            "sliced_wasserstein": sliced_wasserstein(z, other),
            "kl_knn": knn.kl_divergence(z, other),
            "share_tau_positive": float((z[:, 1] > 0).mean()),
            "seconds": seconds[name],
        }
        results[name] |= {quantity: number(value) for quantity, value in numbers.items()}
    results["exact"] = {"log_evidence": number(log_evidence())}
    workdir.write_results(folder, results)
    shown = {"NUTS": _thin(reference, config.samples), **{LABELS[name]: _thin(z, config.samples) for name, z in draws.items()}}
    shown = {label: z[:, : len(SHOWN)] for label, z in shown.items()}
    save(folder / "figures" / "eight_schools.png", plots.pairs(shown, SHOWN), folder.name)
    print(table(results))
    print(f"\nNumbers in {folder / 'results.json'}, picture in {folder / 'figures' / 'eight_schools.png'}")


def schools(y: jax.Array, sigma: jax.Array) -> None:
    """The model, for NumPyro."""
    mu = numpyro.sample("mu", Normal(0, 1))
    tau = numpyro.sample("tau", Normal(0, 1))
    eta = numpyro.sample("eta", Normal(0, 1).expand([8]))
    numpyro.sample("y", Normal(mu + tau * eta, sigma), obs=y)


def log_evidence(points: int = 2001, half_width: float = 10.0) -> float:
    """Log p(y) [] in nats, with both modes: given tau, y ~ N(0, diag(sigma^2 + tau^2) + 1 1'); over tau on a regular grid."""
    y, sigma = np.asarray(Y, np.float64), np.asarray(SIGMA, np.float64)
    tau, spacing = np.linspace(-half_width, half_width, points, retstep=True)
    covariance = np.eye(len(y)) * (sigma**2 + tau[:, None] ** 2)[:, None] + 1.0  # [points, 8, 8]
    square = np.einsum("i,pi->p", y, np.linalg.solve(covariance, np.broadcast_to(y[:, None], (points, len(y), 1)))[..., 0])
    log_y = -0.5 * (square + np.linalg.slogdet(covariance)[1] + len(y) * math.log(2.0 * math.pi))
    return float(np.logaddexp.reduce(stats.norm.logpdf(tau) + log_y) + math.log(spacing))


def table(results: dict[str, dict[str, dict]]) -> str:
    """The numbers of `results.json` as text, a row per method and one for what their bounds are bounds on."""
    lines = [f"{'':26}{'sliced W.':>10}{'KL, k-NN':>10}{'tau > 0':>9}{'bound':>18}{'seconds':>9}"]
    for name in ("nuts", *LABELS):
        mean = {quantity: number["mean"] for quantity, number in results[name].items()}
        label, bound = {"nuts": "NUTS, against itself", **LABELS}[name], "-"
        if "bound" in mean:
            bound = f"{mean['bound']:.3f} +- {results[name]['bound']['estimator_standard_error']:.3f}"
        lines.append(
            f"{label:26}{mean['sliced_wasserstein']:>10.3f}{mean['kl_knn']:>10.3f}{mean['share_tau_positive']:>9.1%}"
            f"{bound:>18}{mean['seconds']:>9.0f}"
        )
    exact = results["exact"]["log_evidence"]["mean"]
    lines.append(f"{'log p(y), quadrature':26}{f'{exact:.3f}':>47}")
    lines.append("KL(q, NUTS) and bound in nats, with the bound's standard error over draws; none takes anything from T.")
    lines.append(f"A q with one of the two modes alone stays below log p(y) - log 2 = {exact - math.log(2.0):.3f}.")
    return "\n".join(lines)


def _nuts(name, model, config, folder):
    del name, folder
    options = config.nuts
    chains = MCMC(
        NUTS(model),
        num_warmup=options.warmup,
        num_samples=options.samples,
        num_chains=options.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    chains.run(stream(jax.random.key(config.seed), "nuts"), Y, SIGMA)
    return _columns(chains.get_samples()), {}


def _gaussian(name, model, config, folder):
    del folder
    options = config.gaussian
    guide = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}[name](model)
    adam = optax.adam(optax.cosine_decay_schedule(options.rate, options.steps))
    svi = SVI(model, guide, adam, Trace_ELBO(options.particles))
    key = stream(jax.random.key(config.seed), name)
    result = svi.run(stream(key, "training"), options.steps, Y, SIGMA, progress_bar=False)
    draws = guide.sample_posterior(stream(key, "draws"), result.params, sample_shape=(config.samples,))
    of_one = jax.vmap(lambda key: -Trace_ELBO().loss(key, result.params, model, guide, Y, SIGMA))
    bounds = np.asarray(jax.jit(of_one)(jax.random.split(stream(key, "bound"), options.bound_draws)), np.float64)
    return _columns(draws), {"bound": number(bounds.mean(), bounds.std(ddof=1) / math.sqrt(len(bounds)))}


def _avb(name, model, config, folder):
    options = {**config.avb, "widths": tuple(config.avb.widths), "adversary_widths": tuple(config.avb.adversary_widths)}
    fit = inference.fit_numpyro(model, Y, SIGMA, seed=config.seed, workdir=folder, **options)
    draws = fit.sample(stream(jax.random.key(config.seed), name), config.samples)
    print(fit.diagnostics, file=sys.stderr)
    return _columns(draws), {
        "bound": number(fit.bound, fit.bound_error),
        "log_evidence": number(fit.log_evidence, fit.log_evidence_error),
    }


def number(mean: float, error: float | None = None) -> dict:
    """As `results.json` has it; a bound's error is its standard error over draws."""
    return combine([Number(float(mean), estimator_error=None if error is None else float(error))]).to_json()


def _columns(draws: dict) -> np.ndarray:
    """Draws [N, 10] of (mu, tau, eta_1 .. eta_8)."""
    return np.concatenate([np.asarray(draws[site]).reshape(len(draws["mu"]), -1) for site in SITES], axis=1)


def _thin(z: np.ndarray, count: int) -> np.ndarray:
    return z[:: max(1, len(z) // count)][:count]


if __name__ == "__main__":
    launch.run("eight_schools", main)
