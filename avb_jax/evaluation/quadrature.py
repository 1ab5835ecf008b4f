"""Integrals over latents of 1 to 3 dimensions, on grids that find the mass: log p(x), and the KL of a mixture of Gaussians."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, Normal

from avb_jax.distributions import log_likelihood
from avb_jax.evaluation import proposal
from avb_jax.evaluation.estimator import Estimator, Number, mean, so_far
from avb_jax.evaluation.examples import map_examples
from avb_jax.method import Method, prior_at
from avb_jax.settings import check_counts
from avb_jax.types import Array, State, UserError

POINTS = {1: 200, 2: 60, 3: 12}  # cells of the first grid between -CORE and CORE per dimension, by the number of dimensions
CORE = 6.0  # a standard normal leaves 2e-9 outside, in each dimension
REACH = 30.0  # how far out the first grid goes at least, in cells that get wider
SPLITS = {1: 32, 2: 64, 3: 256}  # cells split at once
ROUNDS = 100  # of splitting, at most
TOLERANCE = 1e-3  # nats: the estimated error at which splitting ends
LARGEST_SHARE, LARGEST_ERROR, LARGEST_BOUNDARY_SHARE = 0.3, 0.01, 0.001  # that leave no doubt; the error in nats
FINEST = 2**21  # points of the finest grid that `mixture_kl` tries


class QuadratureEstimate(NamedTuple):
    """Per example."""

    log_likelihood: Array  # [N] log p(x), nats
    error: Array  # [N] nats, estimated: by how much the last splits changed the integral, over all cells without regard to sign
    largest_share: Array  # [N] of one cell in p(x)
    boundary_share: Array  # [N] of the first grid's outermost cells in p(x), which may lack what is outside


def doubts(estimate: QuadratureEstimate) -> list[str]:
    """What speaks against the numbers, in a line each and with how many examples it concerns; nothing where all are sound."""
    resolved = (estimate.largest_share <= LARGEST_SHARE) & (estimate.error <= LARGEST_ERROR)
    coarse, outside = int(np.sum(~resolved)), int(np.sum(estimate.boundary_share > LARGEST_BOUNDARY_SHARE))  # a nan is coarse
    lines = [f"the posterior of {coarse} examples is too narrow or winding for the grid; give it more points"] if coarse else []
    return lines + [
        f"the posterior of {outside} examples is so far from 0 that part of it may lie beyond the grid's end at {REACH:g}; "
        "only estimators that sample can tell"
    ] * bool(outside)


class _Cells(NamedTuple):
    centre: Array  # [C, Z]
    width: Array  # [C, Z]
    mass: Array  # [C, ...] log of the integral over the cell
    error: Array  # [C, ...] log of the cell's share in the difference that the split made which it comes from


def first_grid(dim: int, points: int | None = None) -> tuple[Array, Array, float]:
    """Cells around 0 and where the outermost begin: equal ones up to CORE, from there each twice as wide as the one before.

    Args:
      dim: Z, of the latents.
      points: cells per dimension between -CORE and CORE.

    Returns:
      Centres [C, Z], widths [C, Z], and the distance from 0, in any dimension, beyond which a cell is an outermost one.

    Raises:
      UserError: more than 3 dimensions.
    """
    _check_dim(dim)
    width = 2.0 * CORE / (points or POINTS[dim])
    doublings = math.ceil(math.log2((REACH - CORE) / (2.0 * width) + 1.0))
    outer = width * 2.0 ** np.arange(1, doublings + 1)
    widths = np.concatenate([outer[::-1], np.full(points or POINTS[dim], width), outer])
    ends = np.cumsum(widths) - widths.sum() / 2.0

    def mesh(axis: np.ndarray) -> Array:
        return jnp.stack(jnp.meshgrid(*[jnp.asarray(axis, jnp.float32)] * dim, indexing="ij"), axis=-1).reshape(-1, dim)

    return mesh(ends - widths / 2.0), mesh(widths), float(ends[-2])


def log_integral(
    log_prob: Callable[[Array, Array], Array],
    x: Array,
    prior: Distribution,
    points: int | None = None,
    chunk: int = 20_000,
) -> QuadratureEstimate:
    """The log of the integral of p(z) p(x|z), by cubature that adapts to each example's posterior.

    All examples share the first grid and the split of each of its cells into 2^Z. Then, example by example, the cells whose
    split changed most are split further, until all these changes add up to less than TOLERANCE. A cell's integral is by the
    two-point Gauss rule in each dimension, whose error falls by 16 with every halving. Van Dooren & de Ridder (1976) and Genz &
    Malik (1980) refine cells in this way; the changes overestimate what is left where the cells are as small as the posterior
    is narrow. However narrow a posterior is, and wherever within REACH, the cells next to it have the largest part in what is
    known so far, so that the cells close in on it, and likewise on several modes. What can stay between the first cells' nodes
    is a mode some 30 times narrower than another one.

    Args:
      log_prob: (z [G, Z], x [N, *x]) -> log p(x|z) [G, N] of the examples at each z.
      x: [N, *x] the examples.
      prior: p(z).
      points: cells of the first grid between -CORE and CORE, per dimension.
      chunk: grid points held at once.

    Raises:
      UserError: more than 3 latents.
    """
    centre, width, edge = first_grid(prior.event_shape[0], points)
    parts, split = 2 ** prior.event_shape[0], SPLITS[prior.event_shape[0]]

    def log_joint(x: Array) -> Callable[[Array], Array]:
        return lambda z: prior.log_prob(z)[:, None] + log_prob(z, x)

    first = _split(log_joint(x), centre, width, _masses(log_joint(x), centre, width, chunk), chunk)

    def of_example(example: tuple[Array, Array, Array]) -> QuadratureEstimate:
        x, mass, error = example
        density = log_joint(x[None])
        room = ROUNDS * split * parts

        def padded(array: Array, value: float) -> Array:
            return jnp.concatenate([array, jnp.full((room, *array.shape[1:]), value, array.dtype)])

        cells = _Cells(padded(first.centre, 0.0), padded(first.width, 0.0), padded(mass, -jnp.inf), padded(error, -jnp.inf))

        def unresolved(carry: tuple[Array, _Cells]) -> Array:
            total, error, _ = _summary(carry[1])
            rounding = 8.0 * jnp.finfo(total.dtype).eps * jnp.abs(total)
            return (carry[0] < ROUNDS) & (error > jnp.minimum(TOLERANCE + rounding, 0.05))

        def refined(carry: tuple[Array, _Cells]) -> tuple[Array, _Cells]:
            done, cells = carry
            worst = jax.lax.top_k(cells.error, split)[1]
            new = _split(density, cells.centre[worst], cells.width[worst], cells.mass[worst, None], chunk)
            new = new._replace(mass=new.mass[:, 0], error=new.error[:, 0])
            gone = {"mass": cells.mass.at[worst].set(-jnp.inf), "error": cells.error.at[worst].set(-jnp.inf)}
            start = len(first.centre) + done * split * parts
            return done + 1, jax.tree.map(
                lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, start, 0), cells._replace(**gone), new
            )

        _, cells = jax.lax.while_loop(unresolved, refined, (jnp.zeros((), jnp.int32), cells))
        total, error, largest = _summary(cells)
        outermost = jnp.any(jnp.abs(cells.centre) > edge, axis=-1)
        boundary = jax.nn.logsumexp(jnp.where(outermost, cells.mass, -jnp.inf))
        return QuadratureEstimate(total, error, largest, jnp.exp(boundary - total))

    return jax.lax.map(of_example, (x, first.mass.T, first.error.T))


@dataclasses.dataclass(frozen=True)
class Quadrature(Estimator):
    """Log p(x) of each example, for a model of 1 to 3 latents; see `log_integral`.

    Attributes:
      points: cells of the first grid between -CORE and CORE, per dimension; by the number of dimensions where it is None.
      chunk: grid points decoded at once.

    Raises:
      UserError: a setting out of range.
    """

    points: int | None = None
    chunk: int = 2000

    name: ClassVar[str] = "quadrature"
    requires: ClassVar[tuple[str, ...]] = ("log_joint", "decode", "prior")

    def __post_init__(self):
        check_counts(points=self.points, chunk=self.chunk, images=self.images)

    def lacks(self, method: Method) -> str:
        """As `Estimator`'s; few latents, and a prior over all vectors, as the grid is."""
        return (
            super().lacks(method) or _lacks_few_latents(method.prior.event_shape[0]) or proposal.lacks_all_vectors(method.prior)
        )

    def __call__(self, method: Method, key: Array, state: State, x: Array) -> QuadratureEstimate:
        """The estimate for one example."""
        del key
        return jax.tree.map(lambda a: a[0], self._of(method, state, x[None]))

    def over(
        self, method: Method, key: Array, state: State, images: Array, numbers: Array, binarize: str
    ) -> QuadratureEstimate:
        """The estimates for several stored examples, which share the first grid."""
        x = map_examples(self.name, lambda key, x: x, key, images, numbers, binarize, self.chunk)
        return self._of(method, state, x)

    def _of(self, method: Method, state: State, x: Array) -> QuadratureEstimate:
        def log_prob(z: Array, x: Array) -> Array:
            of_x = method.decode(state, z)
            return jax.lax.map(lambda x: log_likelihood(of_x, jnp.broadcast_to(x, (len(z), *x.shape))), x).T

        return log_integral(log_prob, x, prior_at(method, state), self.points, self.chunk)

    def numbers(self, subject, found: QuadratureEstimate) -> dict[tuple[str, str], Number]:
        for doubt in doubts(found):
            subject.note(f"quadrature: {doubt}")
        return {("log_likelihood", self.name): mean(found.log_likelihood)}

    def describe(self, found: QuadratureEstimate) -> str:
        return so_far("log-likelihood", found.log_likelihood)


def mixture_kl(mean: Array, std: Array, prior: Distribution, chunk: int = 1_000_000) -> float:
    """KL(q(z), p(z)) in nats for q(z) the equal mixture of N(mean[n], diag std[n]^2), from [N, Z].

    The aggregated posterior of a VAE on N data points is of this form. With q_k the first k of the components, the widest
    first, and each of weight 1/N, the integral of q log q is the sum over k of that of q_k log q_k - q_(k-1) log q_(k-1). These
    differences are as wide as component k, and nothing in them is narrower: each is integrated on a regular grid in the
    component's own standardised coordinates. So no component can be missed, however far out, narrow, or inside another one. The
    grids get finer until two of them, the second between the points of the first, agree to 1e-4 nats.

    Args:
      mean: [N, Z].
      std: [N, Z].
      prior: p(z).
      chunk: pairs of a grid point and a component held at once.

    Raises:
      UserError: more than 3 latents; moments that are not finite, or a std that is not positive; or components so much wider
        than others in one latent, and narrower in another, that no grid does.
    """
    _check_dim(prior.event_shape[0])
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    if not (jnp.isfinite(mean).all() and jnp.isfinite(std).all() and (std > 0).all()):
        raise UserError("mean, std: of the mixture's components must be finite, and std positive; check the encoder")
    order = jnp.argsort(-jnp.sum(jnp.log(std), axis=1))
    mean, std, points = mean[order], std[order], 24
    while points ** prior.event_shape[0] <= FINEST:
        one, two = (float(kl) for kl in _mixture_kls(mean, std, prior, points, chunk))
        if abs(one - two) < 1e-4 * max(1.0, abs(one)):
            return 0.5 * (one + two)
        points *= 2
    raise UserError(
        f"mean, std: two grids of {points // 2} points per latent differ by {abs(one - two):.2g} nats, because some components "
        "are far wider than others in one latent and far narrower in another; estimate this KL from draws (evaluation/knn.py)"
    )


@functools.partial(jax.jit, static_argnames=("points", "chunk"))
def _mixture_kls(mean: Array, std: Array, prior: Distribution, points: int, chunk: int) -> Array:
    """`mixture_kl` [2] of components with the widest first, on two grids of which one lies between the other's points."""
    spacing = 2.0 * CORE / points
    axis = jnp.arange(points) * spacing - CORE
    count, log_volume = len(mean), jnp.sum(jnp.log(std), axis=1) + math.log(len(mean))

    def of_component(k: Array, shift: float) -> Array:
        offset, scale = (mean[k] - mean) / std, std[k] / std

        def of_point(number: Array) -> Array:
            u = axis[jnp.stack(jnp.unravel_index(number, (points,) * prior.event_shape[0]))] + shift
            # Summed latent by latent: a reduction over so short an axis is ten times slower.
            each = (
                sum(Normal(0.0, 1.0).log_prob(offset[:, i] + scale[:, i] * u[i]) for i in range(prior.event_shape[0]))
                - log_volume
            )
            own = jnp.sum(Normal(0.0, 1.0).log_prob(u)) - log_volume[k]
            wider = jax.nn.logsumexp(jnp.where(jnp.arange(count) < k, each, -jnp.inf))
            # With a = q_(k-1) and b = q_k - a, (q_k log q_k - a log a) / b = log(a + b) + (a / b) log(1 + b / a).
            ratio = jnp.clip(wider - own, -80.0, 30.0)  # log(a / b): outside, that term is 0 or 1 to every digit
            integrand = jnp.logaddexp(wider, own) + jnp.exp(ratio) * jax.nn.softplus(-ratio)
            weight = jnp.exp(jnp.sum(Normal(0.0, 1.0).log_prob(u))) * spacing ** prior.event_shape[0]
            return weight * (integrand - prior.log_prob(mean[k] + std[k] * u))

        return jnp.sum(jax.lax.map(of_point, jnp.arange(points ** prior.event_shape[0]), batch_size=max(1, chunk // count)))

    def kl(shift: float) -> Array:
        return jnp.mean(jax.lax.map(lambda k: of_component(k, shift), jnp.arange(count)))

    return jnp.stack([kl(0.0), kl(spacing / 2.0)])


def _check_dim(dim: int) -> None:
    if lacks := _lacks_few_latents(dim):
        raise UserError(f"latent_dim={dim}: {lacks}")


def _lacks_few_latents(dim: int) -> str:
    return "" if dim in POINTS else "quadrature serves 1 to 3 latents; use an estimator that samples"


def _corners(dim: int) -> Array:
    """[2^Z, Z] of a cube of side 2 around 0."""
    return jnp.array(list(itertools.product((-1.0, 1.0), repeat=dim)))


def _masses(log_density: Callable[[Array], Array], centre: Array, width: Array, chunk: int) -> Array:
    """Log integrals [C, N] over cells [C, Z] of log_density: z [G, Z] -> [G, N], by two Gauss points in each dimension."""
    corners = _corners(centre.shape[1])

    def of_cell(cell: tuple[Array, Array]) -> Array:
        centre, width = cell
        nodes = centre + corners * width / (2.0 * math.sqrt(3.0))
        return jax.nn.logsumexp(log_density(nodes), axis=0) + jnp.sum(jnp.log(width / 2.0))

    return jax.lax.map(of_cell, (centre, width), batch_size=max(1, chunk // len(corners)))


def _split(log_density: Callable, centre: Array, width: Array, mass: Array, chunk: int) -> _Cells:
    """The 2^Z halves in every dimension of each of C cells, whose log integrals are mass [C, N]."""
    corners = _corners(centre.shape[1])
    halves = (centre[:, None] + corners * width[:, None] / 4.0).reshape(-1, centre.shape[1])
    width = jnp.repeat(width / 2.0, len(corners), axis=0)
    new = _masses(log_density, halves, width, chunk)
    total = jax.nn.logsumexp(new.reshape(-1, len(corners), mass.shape[1]), axis=1)
    low, high = jnp.minimum(total, mass), jnp.maximum(total, mass)
    change = jnp.where(high == -jnp.inf, -jnp.inf, high + jnp.log1p(-jnp.exp(low - high)))
    return _Cells(halves, width, new, jnp.repeat(change - math.log(len(corners)), len(corners), axis=0))


def _summary(cells: _Cells) -> tuple[Array, Array, Array]:
    """The log of the whole integral; relative to it the cells' errors, summed, and the largest cell."""
    total = jax.nn.logsumexp(cells.mass)
    return total, jnp.exp(jax.nn.logsumexp(cells.error) - total), jnp.exp(jnp.max(cells.mass) - total)
