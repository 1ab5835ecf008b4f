"""Methods for a density p~ that the user gives, without a data set: AVB, and semi-implicit variational inference.

A sampler z = enc(eps) maximises E_q[log p~(z) - log q(z)], a lower bound on the log of the integral of p~. Under AVB
(Mescheder, Nowozin & Geiger 2017, the later version: eight schools) T stands in for log q(z) - log r(z) of adaptive contrast;
under SIVI (Yin & Zhou 2018) the mixture over a step's own draws of noise for q. Each is a `Method` whose `log_joint` is
log p~(z): p~ is in the place of the prior, and an example x has no numbers, so that there is nothing to decode.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro import distributions as dist

from avb_jax import contrast as contrasts
from avb_jax import players
from avb_jax.method import Method, identity
from avb_jax.methods import avb, generator, one_backward
from avb_jax.methods.bound import check_semi_implicit
from avb_jax.methods.uivi import chains_of_noise, log_density_of_chains
from avb_jax.methods.update import Generative, adversarial_step, apply_gradients, mean_collections
from avb_jax.settings import at_least, check_settings
from avb_jax.streams import stream
from avb_jax.types import AdversaryTerms, Array, Draws, Players, Posterior, PyTree, State, Terms, UserError

ADAPTIVE = contrasts.GaussianContrast()
LEAST = -1e30  # nats: a mean of such over draws is still a number
STEEPEST = 1e4  # nats per unit of z: the longest gradient of one draw


class Density(dist.Distribution):
    """The user's density p~ over R^dim, up to a factor, as a distribution that cannot be sampled."""

    support = dist.constraints.real_vector
    pytree_aux_fields = ("log_density",)

    def __init__(self, log_density: Callable[[Array], Array], dim: int):
        """Takes log p~ of one z [dim]."""
        self.log_density = _guarded(log_density)
        super().__init__(event_shape=(dim,), validate_args=False)

    def log_prob(self, value: Array) -> Array:
        """Log p~(z) [...] of z [..., Z]: nats, up to a constant; see `_guarded`."""
        return jnp.vectorize(self.log_density, signature="(z)->()")(value)


def _guarded(log_density: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The log density as training takes it, for models that underflow, or are steep beyond measure, far from where q will be.

    -inf, NaN, and what is below `LEAST`, is `LEAST`; a gradient that is not finite is left out, and one longer than `STEEPEST`
    shortened. (Single draws of a wide q come by where float32 has no number; q as a whole is checked by `checks` and `watch`.)
    """

    def least(value: Array) -> Array:
        return jnp.where(value > LEAST, value, LEAST)  # NaN is not

    @jax.custom_vjp
    def guarded(z: Array) -> Array:
        return least(log_density(z))

    def forward(z: Array) -> tuple[Array, Array]:
        value, slope = jax.value_and_grad(log_density)(z)
        slope = jnp.where(jnp.isfinite(slope).all() & ~jnp.isnan(value), slope, 0.0)
        largest = jnp.maximum(jnp.max(jnp.abs(slope)), 1.0)  # whose square may be beyond float32
        length = largest * jnp.linalg.norm(slope / largest)
        return least(value), slope * jnp.minimum(1.0, STEEPEST / (length + 1e-6))

    def backward(slope: Array, of_value: Array) -> tuple[Array]:
        return (of_value * slope,)

    guarded.defvjp(forward, backward)
    return guarded


class Info(NamedTuple):
    """What a step is observed by, per draw [B] and in nats."""

    elbo: Array  # log p~(z) - T(z) - log r(z): an estimate of a bound on the log of p~'s integral, as good as T
    adversary_loss: Array  # eq. 3.3
    adversary_accuracy: Array  # as in AdversaryTerms
    adversary_saturation: Array  # as in AdversaryTerms


class BoundInfo(NamedTuple):
    """What a step without a T is observed by, per draw [B] and in nats."""

    elbo: Array  # log p~(z) less the log density of the mixture: on average at most the log of p~'s integral


def negative_bound(
    params: Players,
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    density: Density,
    contrast: contrasts.GaussianContrast,
    train: bool = True,
) -> tuple[Array, Generative]:
    """E_q[T(z) + log r(z) - log p~(z)] at z = enc(noise): KL(q, p~), as far as T is log q(z) - log r(z).

    Args:
      params: of which the encoder's are read.
      adversary: T's params.
      collections: every player's.
      draws: x [B, 0], noise [S, B, N], z_prior [S, B, Z] from N(0, I).
      networks: encoder and adversary.
      density: p~.
      contrast: how r's moments are found.
      train: whether batch normalisation uses this batch.

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B] without reconstructions, and `compared` its draws and r's, a
      `contrast.Compared`.
    """
    drawn, encoder = contrasts.encode(
        contrast, density, networks.encoder, params.encoder, collections.encoder, draws, train=train
    )
    t, _ = avb.both_sides(
        adversary,
        collections,
        draws.x,
        drawn.compared,
        networks=networks,
        prior=density,
        contrast=contrast,
        minus_log_prior=True,
        train=train,
    )
    kl = jnp.mean(t[0] + drawn.log_ratio, axis=0)
    terms = Terms(jnp.zeros_like(kl), kl)
    return jnp.mean(kl), Generative(terms, drawn.compared, collections._replace(encoder=encoder))


def density_method(
    log_density: Callable[[Array], Array],
    dim: int,
    sampler: Any,
    adversary: Any,
    *,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    contrast: contrasts.GaussianContrast = ADAPTIVE,
    adversary_steps: int = 1,
) -> Method:
    """AVB with adaptive contrast for a density.

    T is the adversary's output plus |z|^2 / 2 at z as r standardises it: T + log r, which the sampler is trained on, is that
    output up to a constant. Where q has few draws nothing teaches the network, and it continues about linearly. Were T itself
    the network, the sampler would there be rewarded by -log r, which rises as a square: the arms of the tests' banana grew too
    long.

    Args:
      log_density: z [dim] -> log p~(z) [], nats, up to a constant, differentiable, over all of R^dim.
      dim: of z.
      sampler: (x [B, 0], noise [B, N]) -> z [B, Z], or a `Posterior` with r's moments; `networks.Sampler`, for one.
      adversary: (x [B, 0], z [B, Z]) -> log q(z) [B] up to a constant, at z as r standardises it.
      optimizers: an optax optimiser per player, or one for both.
      noise_dim: N, how many N(0, 1) numbers the sampler gets per draw.
      contrast: how r's moments are found where the sampler does not give them, and how much wider than r the draws lie that T
        is told q's from.
      adversary_steps: adversary updates per step, which keep T near its optimum (section 3.2).

    Returns:
      A `Method` for x [B, 0], whose `sample` draws z [count, Z] from q, whose `log_joint` is log p~(z), and whose `elbo` is the
      bound under T. It has no decoder.

    Raises:
      UserError: a setting out of its range, or a density that does not return one number.
    """
    fits = isinstance(contrast, contrasts.GaussianContrast) and not contrast.prior_share
    check_settings(
        dim=at_least(dim, 1),
        noise_dim=at_least(noise_dim, 1),
        adversary_steps=at_least(adversary_steps, 1),
        contrast=(contrast, fits, "a GaussianContrast without a prior_share, since nothing draws from the density"),
    )
    check_density(log_density, dim)
    density, optimizers = Density(log_density, dim), generator.for_each(optimizers)
    networks = players.prepare(Players(sampler, None, adversary), optimizers, density, ("adversary",))
    base = contrast.base(density)
    loss = functools.partial(negative_bound, networks=networks, density=density, contrast=contrast)
    loss_of_t = functools.partial(avb.adversary_loss, networks=networks, prior=density, contrast=contrast, minus_log_prior=True)
    encode = generator.posterior_of(networks.encoder, noise_dim, dim)
    gradients = one_backward.chosen(networks)

    def draw(key: Array, x: Array, draws: int = 1) -> Draws:
        return players.draw(key, x, base, noise_dim, draws)

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, density, noise_dim)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        state, terms, of_t = adversarial_step(
            key,
            state,
            draw=lambda key: draw(key, x),
            loss=loss,
            adversary_loss=loss_of_t,
            gradients=gradients,
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            reduce=reduce,
        )
        return state, Info(terms.elbo, of_t.loss, of_t.accuracy, of_t.saturation)

    def sample(key: Array, state: State, count: int) -> Array:
        return encode(key, state, jnp.zeros((count, 0))).z

    def log_joint(state: State, x: Array, z: Array) -> Array:
        del state, x
        return density.log_prob(z)

    def elbo(key: Array, state: State, x: Array) -> Terms:
        return loss(state.params, state.params.adversary, state.collections, draw(key, x), train=False)[1].terms

    def evaluate_adversary(key: Array, state: State, x: Array, draws: int = 1) -> AdversaryTerms:
        drawn = draw(key, x, draws)
        _, generative = loss(state.params, state.params.adversary, state.collections, drawn, train=False)
        _, (terms, _) = loss_of_t(state.params.adversary, state.collections, drawn, generative.compared, train=False)
        return terms._replace(kl=generative.terms.kl)

    return Method("avb", init, train_step, sample, encode=encode, log_joint=log_joint, elbo=elbo, adversary=evaluate_adversary)


def semi_implicit_method(
    log_density: Callable[[Array], Array],
    dim: int,
    sampler: Any,
    *,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    unbiased: bool = False,
    burn_in: int = 5,
    chain_steps: int = 5,
    leapfrog_steps: int = 5,
    step_size: float = 0.1,
) -> Method:
    """Semi-implicit variational inference (Yin & Zhou 2018) for a density, or its `unbiased` form (Titsias & Ruiz 2019): no T.

    Each of a step's B draws is scored by the mixture of all B conditionals, its own among them: on average at least log q, by
    I(z; u) - log B or more where the conditionals lie further apart than B draws of u can fill. Unbiased, Hamiltonian Monte
    Carlo on the noise gives the gradient of log q itself, as in `avb_jax.uivi`.

    Args:
      log_density: as in `density_method`.
      dim: of z.
      sampler: (x [B, 0], noise [B, N]) -> a `Posterior` with conditional moments; `networks.Sampler`, for one.
      optimizers: an optax optimiser, or one per player, of which the encoder's is used.
      noise_dim: N, how many N(0, 1) numbers the sampler gets per draw.
      unbiased: whether it is UIVI.
      burn_in: of UIVI's chains on the noise: steps that forget the noise that z was made of.
      chain_steps: over whose states the gradient is averaged.
      leapfrog_steps: of each.
      step_size: of these.

    Returns:
      A `Method` as `density_method`'s, without an adversary.

    Raises:
      UserError: a setting out of its range, a density that does not return one number, or a sampler that is not semi-implicit.
    """
    check_settings(
        dim=at_least(dim, 1),
        noise_dim=at_least(noise_dim, 1),
        burn_in=at_least(burn_in, 0),
        chain_steps=at_least(chain_steps, 1),
        leapfrog_steps=at_least(leapfrog_steps, 1),
        step_size=(step_size, step_size > 0, "positive"),
    )
    check_density(log_density, dim)
    density, optimizers = Density(log_density, dim), generator.for_each(optimizers)
    networks = players.prepare(Players(sampler), optimizers, density, ("encoder",))
    encode = generator.posterior_of(networks.encoder, noise_dim, dim)
    steps = {"burn_in": burn_in, "chain_steps": chain_steps, "leapfrog_steps": leapfrog_steps, "step_size": step_size}

    def posterior_of(params: PyTree, collections: dict, noise: Array, train: bool) -> tuple[Posterior, dict]:
        """Noise [B, 1, N]: B draws for one example without numbers."""
        found = players.encode(networks.encoder, params, collections, jnp.zeros((1, 0)), noise, dim, train=train)
        check_semi_implicit(found[0], networks)
        return found

    def mixture(params: Players, collections: Players, key: Array, count: int, *, train: bool = True):
        noise = players.draw(key, jnp.zeros((1, 0)), None, noise_dim, count).noise
        posterior, encoder = posterior_of(params.encoder, collections.encoder, noise, train)
        log_q = log_mixture(posterior.z[:, 0], *(moment[:, 0] for moment in posterior.conditional))
        kl = log_q - density.log_prob(posterior.z[:, 0])
        return jnp.mean(kl), (-kl, collections._replace(encoder=encoder))

    def by_chains(params: Players, collections: Players, key: Array, count: int):
        noise = players.draw(key, jnp.zeros((1, 0)), None, noise_dim, count).noise

        def given(noise: Array) -> tuple[Array, Array]:
            fixed = jax.lax.stop_gradient(params.encoder)
            return posterior_of(fixed, collections.encoder, noise[:, None], False)[0].conditional  # [N, 1, Z] each

        posterior, encoder = posterior_of(params.encoder, collections.encoder, noise, True)
        z, noise = posterior.z[:, 0], noise[:, 0]
        one = lambda x, noise: tuple(moment[0, 0] for moment in given(noise[None]))  # noqa: E731
        others = chains_of_noise(stream(key, "chains"), one, noise, jax.lax.stop_gradient(z), noise, **steps)  # [M, B, N]
        moments = (moment.reshape(-1, count, dim) for moment in given(others.reshape(-1, noise_dim)))
        log_q, harmonic = log_density_of_chains(z, tuple(moments))
        log_p = density.log_prob(z)
        return jnp.mean(log_q - log_p), (log_p - harmonic, collections._replace(encoder=encoder))

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, density, noise_dim)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, BoundInfo]:
        loss = jax.grad(by_chains if unbiased else mixture, has_aux=True)
        gradients, (elbo, after) = loss(state.params, state.collections, key, len(x))
        state = state._replace(collections=mean_collections(reduce, after))
        state = apply_gradients(state, reduce(gradients), optimizers)
        return state._replace(step=state.step + 1), BoundInfo(elbo)

    def sample(key: Array, state: State, count: int) -> Array:
        return encode(key, state, jnp.zeros((count, 0))).z

    def log_joint(state: State, x: Array, z: Array) -> Array:
        del state, x
        return density.log_prob(z)

    def elbo(key: Array, state: State, x: Array) -> Terms:
        bound = mixture(state.params, state.collections, key, len(x), train=False)[1][0]
        return Terms(jnp.zeros_like(bound), -bound)

    name = "uivi" if unbiased else "sivi"
    flags = {"semi_implicit": True, "bounds_kl": True}
    return Method(name, init, train_step, sample, encode=encode, log_joint=log_joint, elbo=elbo, **flags)


def log_mixture(z: Array, mean: Array, std: Array) -> Array:
    """Log density [B] of z [B, Z] under the mixture of K Gaussians whose moments are [K, Z]; nats.

    By products of matrices, about the means' own mean: several times as fast as differences of all pairs, and as exact while
    the means lie within a few thousand standard deviations of each other. (In full float32: what accelerators multiply with by
    default, of 8 or 11 bits, is nats off.)
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    center = jax.lax.stop_gradient(mean.mean(axis=0))
    z, mean, precision = z - center, mean - center, 1.0 / jnp.square(std)
    square = product(jnp.square(z), precision.T) - 2.0 * product(z, (mean * precision).T)
    square = square + jnp.sum(jnp.square(mean) * precision, axis=1)
    log_scale = jnp.sum(jnp.log(std), axis=1) + 0.5 * z.shape[1] * math.log(2.0 * math.pi)
    return jax.nn.logsumexp(-0.5 * square - log_scale, axis=1) - math.log(len(mean))


def check_density(log_density: Callable[[Array], Array], dim: int) -> None:
    """Refuses what does not return one number for one z.

    Raises:
      UserError: it does not.
    """
    found = jax.eval_shape(log_density, jnp.zeros(dim))
    if getattr(found, "shape", None) != ():
        raise UserError(f"log_density: returned {found} at z [{dim}]; it must return one number for one z")
