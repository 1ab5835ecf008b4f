"""Eight schools (Rubin 1981; here as published with AVB): a posterior with two modes, by AVB, NUTS and Gaussian VI.

    python -m experiments.eight_schools --config=experiments/configs/eight_schools.py --workdir=DIR

theta_j = mu + tau eta_j, y_j ~ N(theta_j, sigma_j), and mu, tau, eta_j ~ N(0, 1): with tau's sign left open, the posterior is
symmetric under (tau, eta) -> (-tau, -eta), and both modes count.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from avb_jax import UserError, inference, plotting, workdir
from avb_jax.evaluation import knn
from avb_jax.evaluation.image_quality import sliced_wasserstein
from experiments import launch

Y = jnp.array([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
SIGMA = jnp.array([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4])
SITES = ("mu", "tau", "eta")
SHOWN = (r"$\mu$", r"$\tau$", r"$\eta_1$", r"$\eta_2$")  # in the figure, the first columns
LABELS = {"avb": "AVB, adaptive contrast", "mean_field": "Gaussian, mean field", "full_rank": "Gaussian, full rank"}


def main(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Samples the posterior by each method and compares with NUTS."""
    try:
        import numpyro
    except ImportError:
        raise UserError("eight schools needs NumPyro: pip install 'avb_jax[numpyro]'") from None
    dist = numpyro.distributions

    def schools(y: jax.Array, sigma: jax.Array) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        tau = numpyro.sample("tau", dist.Normal(0, 1))
        eta = numpyro.sample("eta", dist.Normal(0, 1).expand([8]))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    launch.claim(config, folder)
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
        results[name] |= {
            "sliced_wasserstein": sliced_wasserstein(z, other), "kl_knn": knn.kl_divergence(z, other),
            "share_tau_positive": float((z[:, 1] > 0).mean()), "seconds": seconds[name],
        }  # fmt: skip
    workdir.write_results(folder, {n: {q: workdir.summary([v]) for q, v in r.items()} for n, r in results.items()})
    shown = {"NUTS": _thin(reference, config.samples), **{LABELS[name]: _thin(z, config.samples) for name, z in draws.items()}}
    shown = {label: z[:, : len(SHOWN)] for label, z in shown.items()}
    plotting.save_pairs(folder / "figures" / "eight_schools.png", shown, SHOWN)
    print(table(results))
    print(f"\nNumbers in {folder / 'results.json'}, picture in {folder / 'figures' / 'eight_schools.png'}")


def table(results: dict[str, dict[str, float]]) -> str:
    """The numbers as text, a row per method."""
    lines = [f"{'':26}{'sliced W.':>10}{'KL, k-NN':>10}{'tau > 0':>9}{'bound':>9}{'seconds':>9}"]
    for name, r in results.items():
        label = {"nuts": "NUTS, against itself", **LABELS}[name]
        bound = f"{r['bound']:>9.2f}" if "bound" in r else f"{'-':>9}"
        lines.append(
            f"{label:26}{r['sliced_wasserstein']:>10.3f}{r['kl_knn']:>10.3f}{r['share_tau_positive']:>9.1%}{bound}"
            f"{r['seconds']:>9.0f}"
        )
    return "\n".join([*lines, "KL(q, NUTS) and bound in nats; AVB's bound takes T's word for the KL."])


def _nuts(name, model, config, folder):
    from numpyro.infer import MCMC, NUTS

    del name, folder
    options = config.nuts
    chains = MCMC(
        NUTS(model), num_warmup=options.warmup, num_samples=options.samples, num_chains=options.chains,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    chains.run(jax.random.key(config.seed), Y, SIGMA)
    return _columns(chains.get_samples()), {}


def _gaussian(name, model, config, folder):
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    del folder
    options = config.gaussian
    guide = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}[name](model)
    adam = optax.adam(optax.cosine_decay_schedule(options.rate, options.steps))
    svi = SVI(model, guide, adam, Trace_ELBO(options.particles))
    result = svi.run(jax.random.key(config.seed), options.steps, Y, SIGMA, progress_bar=False)
    key = jax.random.key(config.seed + 1)
    bound = -svi.evaluate(result.state, Y, SIGMA)
    draws = guide.sample_posterior(key, result.params, sample_shape=(config.samples,))
    return _columns(draws), {"bound": float(bound)}


def _avb(name, model, config, folder):
    del name
    options = {**config.avb, "widths": tuple(config.avb.widths), "adversary_widths": tuple(config.avb.adversary_widths)}
    fit = inference.fit_numpyro(model, Y, SIGMA, seed=config.seed, workdir=folder, **options)
    return _columns(fit.sample(jax.random.key(config.seed + 1), config.samples)), {"bound": fit.bound}


def _columns(draws: dict) -> np.ndarray:
    """Draws [N, 10] of (mu, tau, eta_1 .. eta_8)."""
    return np.concatenate([np.asarray(draws[site]).reshape(len(draws["mu"]), -1) for site in SITES], axis=1)


def _thin(z: np.ndarray, count: int) -> np.ndarray:
    return z[:: max(1, len(z) // count)][:count]


if __name__ == "__main__":
    launch.run("eight_schools", main)
