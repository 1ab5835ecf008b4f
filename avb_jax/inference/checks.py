"""What can be said of a fitted q(z) without T: its ELBO between two bounds, the evidence, and how far to believe either.

A semi-implicit q(z) = E_u N(z; mean(u), diag std(u)^2) with u ~ N(0, I) is bounded from both sides by importance sampling over
u, from any proposal tau(u|z) (Sobolev & Vetrov 2019): with z drawn at u_0, u_1 .. u_K from tau(.|z), and the weights
w_k = N(z; mean(u_k), diag std(u_k)^2) N(u_k; 0, I) / tau(u_k|z),

    E log (1 / (K + 1)) sum_{k=0..K} w_k  >=  E log q(z)  >=  E log (1 / K) sum_{k=1..K} w_k.

p~(z) over the first mean is an unbiased estimate of p~'s integral, whatever K is (as in their bound): the same draws are
importance samples of z. Tau is half N(0, I), half Laplace approximations of q(u|z), which the Gauss-Newton method finds from
those of a bank of u that make z the most likely.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avb_jax.evaluation.examples import PRECISION, pareto_k, sum_up
from avb_jax.types import Array, PyTree, UserError

FEW = 0.05  # of the points where q starts: so many may have no density
BLOCK = 250  # draws of z at once
DRAWS, WATCHED = 5_000, 1_000  # of z, behind `Fit`'s numbers and at each checkpoint
INNER, CLOSER = 256, 1024  # K; and at the end of a fit where the bounds lie further apart than `APART`
STARTS = 2  # of the Gauss-Newton method, of
BANK = 4096  # draws of u that are always the same
ITERATIONS = 6  # of the Gauss-Newton method
SHORTENED = (1.0, 0.5, 0.25, 0.06, 0.0)  # its steps, of which the best is taken
ROUNDED = 10.0  # of z's rounding errors: the least standard deviation of z given u at which log q(z) is a number
TAIL = 0.7  # Pareto k above which a mean of weights is not to be believed (Vehtari et al. 2024)
APART = 0.1  # nats between q's bounds, and between T and them, that are worth a word
COVERED = 0.1  # effective share from which the weights alone show that q covers p, however far its bounds lie apart


class Weighed(NamedTuple):
    """Draws of q, weighed; nats."""

    z: np.ndarray  # [N, Z]
    log_density: np.ndarray  # [N] log p~(z), as the user's function has it
    upper: np.ndarray  # [N] on average above log q(z); p~(z) / exp(upper) is an unbiased estimate of p~'s integral
    lower: np.ndarray  # [N] on average below log q(z); both inf where float32 does not resolve z given u: draws then coincide

    @property
    def log_weight(self) -> np.ndarray:
        """Log of the importance weights [N]; a draw whose density is not a number has none."""
        return np.where(np.isnan(self.log_density), -np.inf, self.log_density) - self.upper


class Diagnostics(NamedTuple):
    """What is known of a fit; nats. As text it says whether to believe it.

    None of it can see a mode of the density in which q has no draw at all: compare several seeds.
    """

    elbo_lower: float | None = None  # q's own ELBO, E_q[log p~ - log q], on average from below; None without a density of q
    elbo_upper: float | None = None  # and from above
    elbo_error: float | None = None  # standard error of both, over draws
    log_evidence: float | None = None  # log of p~'s integral, by importance sampling from q
    log_evidence_error: float | None = None  # its standard error, which holds where `pareto_k` is at most 0.7
    effective_share: float | None = None  # effective sample size over the number of draws
    pareto_k: float | None = None  # of the weights' tail
    elbo_under_t: float | None = None  # E_q[log p~ - T - log r], as good as T; None without a T
    elbo_under_t_error: float | None = None
    adversary_loss: float | None = None  # eq. 3.3; 2 log 2 = 1.386 where its logit says nothing, near 0 where it saturates
    adversary_accuracy: float | None = None  # in [0, 1]
    kl_contrast: float | None = None  # KL(q(z), r(z)) under T: how far q is from the Gaussian of its moments; below 0, T is off
    outside: float | None = None  # share of draws where p~ or q has no finite density; the bounds leave them out

    @property
    def doubts(self) -> list[str]:
        """What speaks against believing it, each with its remedy; empty where nothing does."""
        if self.elbo_lower is None:
            return ["q has no density to check T by: give it a Gaussian share (gaussian_share above 0)"]
        found, width = [], self.elbo_upper - self.elbo_lower
        if not np.isfinite([self.elbo_lower, self.log_evidence]).all():
            return [
                f"at {self.outside or 1.0:.2g} of q's draws the density is not finite, or q narrower than float32 resolves: "
                "lower sampler_rate, or give start"
            ]
        if width > APART and not self._covered:
            found.append(f"the {self._apart}")
        if not self.pareto_k <= TAIL:
            found.append(
                f"Pareto k is {self.pareto_k:.2f}, over {TAIL}: q's tails are too light somewhere, and neither "
                "log_evidence nor resample is to be believed; raise steps or gaussian_share, or give scale='nearest'"
            )
        if self.elbo_under_t is not None:
            excess, error = self.elbo_under_t - self.elbo_upper, np.hypot(self.elbo_error, self.elbo_under_t_error)
            if excess > max(APART, 3.0 * error):
                found.append(f"T puts the ELBO {excess:.2g} nats above what q's can be, behind the sampler: lower sampler_rate")
        return found

    @property
    def _apart(self) -> str:
        return (
            f"bounds on q's own ELBO lie {self.elbo_upper - self.elbo_lower:.2g} nats apart: q is sharper than they resolve; "
            "raise gaussian_share"
        )

    @property
    def _covered(self) -> bool:
        """Whether the weights are bounded enough, and even enough, to show that q is wherever p is."""
        return self.pareto_k <= TAIL and self.effective_share >= COVERED

    def __str__(self) -> str:
        if self.elbo_lower is None:
            of_t = f"ELBO under T {self.elbo_under_t:.3f} +- {self.elbo_under_t_error:.3f}"
            return f"{of_t}, which nothing vouches for: {self.doubts[0]}."
        nearest, furthest = (max(0.0, self.log_evidence - end) for end in (self.elbo_upper, self.elbo_lower))
        lines = [
            f"q's ELBO is {self.elbo_lower:.3f} to {self.elbo_upper:.3f}, +- {self.elbo_error:.2g}; log evidence "
            f"{self.log_evidence:.3f} +- {self.log_evidence_error:.2g} (Pareto k {self.pareto_k:.2f}, effective share "
            f"{self.effective_share:.0%}): KL(q, p) is {nearest:.2g} to {furthest:.2g} nats."
        ]
        if self.outside:
            lines.append(
                f"At {self.outside:.2g} of q's draws the density is 0 or not a number, or q too narrow for float32: they weigh "
                "nothing, and the ELBO is that of q without them."
            )
        if self.elbo_under_t is not None:
            lines.append(f"T says an ELBO of {self.elbo_under_t:.3f} and a loss of {self.adversary_loss:.3f}.")
        if self._covered and furthest - nearest > APART:  # Renyi's divergence of order 2, which is above KL's
            lines.append(f"By the weights KL(p, q) is at most {-math.log(self.effective_share):.2g} nats. The {self._apart}.")
        lines += [f"Do not believe it: {doubt}." for doubt in self.doubts] or [
            "Nothing speaks against it. (A mode that q has nowhere would not show: compare seeds.)"
        ]
        return "\n".join(lines)


NUMBERS = (*Diagnostics._fields[:7], "outside")  # that need no T


class Weigher:
    """Draws of a semi-implicit q with bounds on log q at each, by programs that are compiled once for all of q's params.

    Args:
      conditional: (params, u [B, U]) -> mean and std [B, Z] of z given u.
      log_density: z [Z] -> log p~(z) [].
      dim: Z.
      noise_dim: U.
      inner: K.
    """

    def __init__(self, conditional: Callable, log_density: Callable, dim: int, noise_dim: int, inner: int = INNER):
        def block(params: PyTree, keys: Array) -> tuple[Array, Array, Array]:
            given = functools.partial(conditional, params)
            bank = jax.random.normal(jax.random.key(0), (BANK, noise_dim))
            return jax.vmap(one, (None, None, 0))(given, (bank, *given(bank)), keys)

        def one(given: Callable, bank: tuple[Array, Array, Array], key: Array) -> tuple[Array, Array, Array]:
            u_key, z_key, tau_key = jax.random.split(key, 3)
            own = jax.random.normal(u_key, (noise_dim,))
            mean, std = _at(given, own)
            z = mean + std * jax.random.normal(z_key, (dim,))
            log_weight = _log_weights(tau_key, given, bank, z, own, inner)
            total = jax.nn.logsumexp(log_weight[1:])
            upper = jnp.logaddexp(total, log_weight[0]) - jnp.log(inner + 1.0)
            resolved = jnp.all(std > ROUNDED * jnp.finfo(z.dtype).eps * jnp.abs(z))
            upper, lower = (jnp.where(resolved, bound, jnp.inf) for bound in (upper, total - jnp.log(1.0 * inner)))
            return z, upper, lower

        # Apart from the density's, q's program is the same for all fits of a size, so that JAX's cache has it but once.
        self._block, self._density = jax.jit(block), jax.jit(jax.vmap(log_density))
        self.log_density = log_density

    def __call__(self, params: PyTree, key: Array, draws: int) -> Weighed:
        """So many draws: NumPy arrays."""
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # NumPyro's users have such keys
        keys = jax.random.split(key, -(-draws // BLOCK) * BLOCK).reshape(-1, BLOCK)
        with jax.default_matmul_precision(PRECISION):
            blocks = [self._block(params, block) for block in keys]
            found = [jax.device_get(Weighed(z, self._density(z), upper, lower)) for z, upper, lower in blocks]
        return Weighed(*(np.concatenate(parts)[:draws] for parts in zip(*found, strict=True)))


def summarise(weighed: Weighed) -> dict[str, float]:
    """The numbers of `Diagnostics` that need no T; not numbers where p~ or q has no finite density at over `FEW` of the draws.

    Fewer such draws have a weight of 0, and the bounds are those of q without them, q(z) / q(A) on the set A of the others:
    E[log p~(z) - log q(z)] over these, and log q(A).
    """
    log_density = np.float64(weighed.log_density)
    inside = np.isfinite(log_density) & np.isfinite(weighed.upper)
    outside = 1.0 - inside.mean()
    below, above = ((log_density - of_q)[inside] for of_q in (weighed.upper, weighed.lower))
    finite = outside <= FEW and np.isfinite([below, above]).all() and not np.isposinf(log_density).any()
    if not finite:
        return dict.fromkeys(NUMBERS, math.nan) | {"outside": float(outside)}
    evidence, k = _of_weights(weighed.log_weight)
    numbers = (
        below.mean() + math.log1p(-outside),
        above.mean() + math.log1p(-outside),
        below.std(ddof=1) / math.sqrt(len(below)),
        evidence.log_mean,
        evidence.standard_error,
        evidence.effective_sample_size / len(log_density),
        k,
        outside,
    )
    return {name: float(number) for name, number in zip(NUMBERS, numbers, strict=True)}


_of_weights = jax.jit(lambda log_weight: (sum_up(log_weight), pareto_k(log_weight)))


def check_finite(log_density: Callable[[Array], Array], z: Array, where: str, without: float = FEW) -> None:
    """Refuses a density that is not a finite number, or has no finite gradient, at some z [N, Z].

    At a share `without` of the points, but not at the first, it may be 0, log p~ = -inf, or so steep that its slope overflows.

    Raises:
      UserError: with the point.
    """
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_density)))(z)
    bad = ~(np.isfinite(values) & np.isfinite(slopes).all(axis=-1))
    wrong = np.isnan(values) | np.isposinf(values)
    bad = np.flatnonzero(bad if bad[0] or bad.mean() > without else wrong)
    if len(bad):
        at = ", ".join(f"{number:.4g}" for number in np.asarray(z[bad[0]])[:8]) + (", ..." if z.shape[-1] > 8 else "")
        value = float(values[bad[0]])
        what = f"its gradient is not finite (and it is {value:.4g})" if np.isfinite(value) else f"it is {value:.4g}"
        raise UserError(
            f"log_density: at z = [{at}], {where}, {what} ({len(bad)} of {len(z)} points); q is over all of R^dim: give a "
            "density that is finite there, transform z, or give start"
        )


def _at(conditional: Callable, u: Array) -> tuple[Array, Array]:
    mean, std = conditional(u[None])
    return mean[0], std[0]


def _log_weights(
    key: Array, conditional: Callable, bank: tuple[Array, Array, Array], z: Array, own: Array, inner: int
) -> Array:
    """Log w [1 + K] of z's own u [U], and of K draws from tau(u|z); the bank is of u [N, U] and what it makes of them."""
    size, starts, (others, *moments) = len(own), STARTS, bank
    likely = jax.lax.top_k(jnp.sum(jax.scipy.stats.norm.logpdf(z, *moments), axis=-1), starts)[1]
    modes, jacobians = jax.vmap(lambda u: _laplace(conditional, z, u))(others[likely])
    precisions = jnp.eye(len(z)) + jacobians @ jnp.swapaxes(jacobians, 1, 2)
    normal_key, which_key = jax.random.split(key)
    prior, noise = jnp.split(jax.random.normal(normal_key, (inner, size + len(z))), [size], axis=1)
    which = jax.random.bits(which_key, (inner,)) % (2 * starts)  # from N(0, I) where it is no mode's number

    def draws_near(mode: Array, jacobian: Array, precision: Array) -> Array:
        """K draws [K, U] of N(mode, (I + J^T J)^-1), by Matheron's rule: what J u + noise says moves u of the prior."""
        seen = prior @ jacobian.T + noise
        return mode + prior - jnp.linalg.solve(precision, seen.T).T @ jacobian

    near = jax.vmap(draws_near)(modes, jacobians, precisions)  # of every mode, so that a matrix is decomposed once
    u = jnp.where(which[:, None] < starts, near[which % starts, jnp.arange(inner)], prior)
    u = jnp.concatenate([own[None], u])

    constant = -0.5 * size * jnp.log(2.0 * jnp.pi)
    log_prior = constant - 0.5 * jnp.sum(jnp.square(u), axis=-1)

    def log_near(mode: Array, jacobian: Array, precision: Array) -> Array:
        away = u - mode
        moved = jnp.matmul(away, jacobian.T, precision=jax.lax.Precision.HIGHEST)
        square = jnp.sum(jnp.square(away), axis=-1) + jnp.sum(jnp.square(moved), axis=-1)
        return constant - 0.5 * square + 0.5 * jnp.linalg.slogdet(precision)[1]

    modes_of = jax.nn.logsumexp(jax.vmap(log_near)(modes, jacobians, precisions), axis=0) - jnp.log(1.0 * starts)
    log_tau = jnp.logaddexp(log_prior, modes_of) - jnp.log(2.0)
    mean, std = conditional(u)
    log_conditional = jnp.sum(jax.scipy.stats.norm.logpdf(z, mean, std), axis=-1)
    return log_conditional + log_prior - log_tau


def _laplace(conditional: Callable, z: Array, start: Array) -> tuple[Array, Array]:
    """The mode [U] of q(u|z) next to a start [U], and J [Z, U], z's Jacobian there over std; u has precision I + J^T J."""

    def log_posterior(u: Array) -> Array:
        mean, std = _at(conditional, u)
        return jnp.sum(jax.scipy.stats.norm.logpdf(z, mean, std)) - 0.5 * jnp.sum(jnp.square(u))

    def linear(u: Array) -> tuple[Array, Array]:
        jacobian, (mean, std) = jax.jacrev(lambda u: (_at(conditional, u)[0], _at(conditional, u)), has_aux=True)(u)
        return jacobian / std[:, None], (z - mean) / std

    def step(u: Array, _: None) -> tuple[Array, None]:
        jacobian, residual = linear(u)
        precision = jnp.eye(len(z)) + jacobian @ jacobian.T
        target = jacobian.T @ jnp.linalg.solve(precision, residual + jacobian @ u)
        candidates = u + jnp.asarray(SHORTENED)[:, None] * (target - u)
        values = jax.vmap(log_posterior)(candidates)
        return candidates[jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))], None

    mode = jax.lax.scan(step, start, length=ITERATIONS)[0]
    return mode, linear(mode)[0]
