"""Bias and spread of the k-nearest-neighbour estimates of KL(q, N(0, I)), where it is known.

    python -m benchmarks.knn

`two samples` is `knn.kl_divergence`, which the paper uses for q(z); `about g` is `knn.kl_to_standard_normal`, which evaluation
uses for q(z|x) and q(z). Both with k = 10; the former with as many draws of p as of q. About three minutes on one core.
"""

import jax.numpy as jnp
import numpy as np

from avb_jax.distributions import standard_normal
from avb_jax.evaluation import knn, quadrature

REPETITIONS = 10


def gaussian(mean: float, std: float):
    """N(mean, std^2) in every dimension: draws, and KL(q, N(0, I))."""

    def draw(rng, count, dim):
        return mean + std * rng.standard_normal((count, dim))

    return draw, lambda dim: dim * 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * np.log(std))


def two_modes(at: float, std: float):
    """Half N(at, std^2), half N(-at, std^2) in the first dimension, N(0, std^2) in the others."""

    def draw(rng, count, dim):
        z = std * rng.standard_normal((count, dim))
        z[:, 0] += at * rng.choice([-1.0, 1.0], count)
        return z

    def exact(dim):
        modes = quadrature.mixture_kl(jnp.array([[at], [-at]]), jnp.full((2, 1), std), standard_normal(1))
        return float(modes) + gaussian(0.0, std)[1](dim - 1)

    return draw, exact


CASES = {"near": gaussian(0.2, 0.9), "far": gaussian(0.5, 0.3), "two modes": two_modes(1.0, 0.3)}


def main() -> None:
    header = f"{'nats':<16}{'samples':>9}{'exact':>9}"
    print(f"{header} {'two samples: bias':>19}{'spread':>8} {'about g: bias':>15}{'spread':>8}")
    for dim in (2, 8, 32):
        for name, (draw, exact) in CASES.items():
            for count in (1_000, 10_000):
                two, about = [], []
                for repetition in range(REPETITIONS):
                    rng = np.random.default_rng([dim, count, repetition])
                    a = draw(rng, count, dim)
                    two.append(knn.kl_divergence(a, rng.standard_normal((count, dim))) - exact(dim))
                    about.append(knn.kl_to_standard_normal(a, seed=repetition) - exact(dim))
                line = f"{dim:>2} D {name:>11}{count:>9,}{exact(dim):>9.3f}"
                line += f" {np.mean(two):>19.3f}{np.std(two, ddof=1):>8.3f}"
                print(f"{line} {np.mean(about):>15.3f}{np.std(about, ddof=1):>8.3f}", flush=True)


if __name__ == "__main__":
    main()
