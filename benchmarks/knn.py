"""Bias and spread of the k-nearest-neighbour estimates of KL(q, N(0, I)), for Gaussians q where it is known.

    python -m benchmarks.knn

One core's work, about a minute. `two samples` is `knn.kl_divergence`, which the paper uses for q(z); `via g` is
`knn.kl_to_standard_normal`, which evaluation uses for q(z|x) and q(z). Both with k = 10 and as many draws of p as of q.
"""

import numpy as np

from avb_jax.evaluation import knn

REPETITIONS = 10
CASES = {  # q = N(mean, std^2) in every dimension
    "near (0.2, 0.9)": (0.2, 0.9),
    "far (0.5, 0.3)": (0.5, 0.3),
}


def main() -> None:
    header = f"{'nats':<23}{'samples':>9}{'exact':>9}"
    print(f"{header} {'two samples: bias':>19}{'spread':>8} {'via g: bias':>14}{'spread':>8}")
    for dim in (2, 8, 32):
        for name, (mean, std) in CASES.items():
            exact = dim * 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * np.log(std))
            for count in (1_000, 10_000):
                two, via = [], []
                for repetition in range(REPETITIONS):
                    rng = np.random.default_rng([dim, count, repetition])
                    a = mean + std * rng.standard_normal((count, dim))
                    two.append(knn.kl_divergence(a, rng.standard_normal((count, dim))) - exact)
                    via.append(knn.kl_to_standard_normal(a, seed=repetition) - exact)
                numbers = f"{np.mean(two):>19.3f}{np.std(two, ddof=1):>8.3f} {np.mean(via):>14.3f}{np.std(via, ddof=1):>8.3f}"
                print(f"{dim:>2} D {name:>18}{count:>9,}{exact:>9.3f} {numbers}", flush=True)


if __name__ == "__main__":
    main()
