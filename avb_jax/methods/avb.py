"""Adversarial Variational Bayes: Algorithm 1 of Mescheder, Nowozin & Geiger (2017).

The losses are pure functions of params, collections and one set of `Draws`, one per side of the game; the first argument is
what is differentiated, and opponents' params are explicit: differentiating with respect to the first argument alone is what
holds them fixed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from numpyro.distributions import Distribution

from avb_jax import contrast as contrasts
from avb_jax import divergences, players
from avb_jax.distributions import Likelihood
from avb_jax.importance import log_mean
from avb_jax.method import Method, identity
from avb_jax.methods import generator, one_backward
from avb_jax.methods.penalty import r1
from avb_jax.methods.update import Generative, adversarial_step, apply_gradients, mean_collections, warmup
from avb_jax.priors import Learned, at
from avb_jax.settings import at_least, check_settings
from avb_jax.types import AdversaryTerms, Array, Draws, Players, PyTree, State, Terms

PRIOR = contrasts.PriorContrast()
SATURATED = 5.0  # |T| from which the logistic loss has less than 1% of its gradient left


class Info(NamedTuple):
    """What a step is observed by, per example [B] and in nats unless said otherwise. Never fed back."""

    elbo: Array  # under T: an estimate, no bound
    reconstruction: Array  # -log p(x|z)
    kl: Array  # T's estimate of KL(q(z|x), p(z))
    kl_contrast: Array | None  # as in Terms: what is left of kl is T's share, by how much q is no Gaussian
    beta: Array  # [] weight of the KL term in this step
    adversary_loss: Array  # what T minimises; by eq. 3.3, 2 log 2 = 1.386 when its logit says nothing
    adversary_accuracy: Array  # as in AdversaryTerms
    adversary_saturation: Array  # as in AdversaryTerms


class FreshInfo(NamedTuple):
    """What a step of a fresh adversary is observed by, as in `Info`."""

    adversary_loss: Array
    adversary_accuracy: Array
    adversary_saturation: Array


def negative_elbo_adversarial(
    params: Players,
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    *,
    networks: Players,
    prior: Distribution,
    likelihood: Likelihood,
    contrast: contrasts.Contrast = PRIOR,
    adversary_floor: float | None = None,
    minus_log_prior: bool = False,
    importance_weighted: bool = False,
    beta: Array | float = 1.0,
    train: bool = True,
) -> tuple[Array, Generative]:
    """Eq. 3.9 (Mescheder et al. 2017), negated: E[beta T(x, z) - log p(x|z)] at z = enc(x, noise).

    T stands in for log q(z|x) - log p(z), and its own params are held fixed: by Proposition 2 the dependence of the
    optimal T on the encoder has no gradient on average. T is evaluated together with the prior's draws, as in the
    adversary's own loss, so that both see the same function where T normalises over the batch (and so that a
    compiler shares the forward pass).

    Under another contrast T stands in for log q(z|x) - log r(z|x), and the KL term is T plus log r(z|x) - log p(z), see
    `contrast`.

    With a floor c the KL term takes max(T, -c). Since E_q[exp(-T*)] = 1, T* < -t has a probability of at most e^-t under q, so
    that this raises the optimal T's KL by at most e^-c nats, while an encoder has nothing to gain any more from places where a
    T that is off goes to minus infinity.

    With weighted draws, all S are decoded, and the loss is the importance weighted bound (Burda et al. 2016) with T in it,

        E -log (1 / S) sum_{s=1..S} p(x|z_s) exp(-beta T(x, z_s)),

    at T* a bound on log p(x) that closes as S grows, whatever q. There the dependence of T* on the encoder has a
    gradient on average, which T cannot give; the encoder's is taken in a form that does without (`importance.weighed_twice`).

    Args:
      params: the encoder's and the decoder's; `params.adversary` is not read.
      adversary: T's params.
      collections: every player's.
      draws: x [B, ...], noise [S, B, N], z_prior [S, B, Z]; the KL term is averaged over S draws of z, the first is decoded,
        or all where they are weighted.
      networks: every player's.
      prior: p(z).
      likelihood: the decoder's output -> p(x|z).
      contrast: what T compares q(z|x) with.
      adversary_floor: c, or None.
      minus_log_prior: see `avb`.
      importance_weighted: whether the draws are weighted.
      beta: weight of the KL term.
      train: whether batch normalisation uses this batch (and updates the encoder's and decoder's statistics).

    Returns:
      The loss, and a `Generative` with `terms` a `Terms` [B], whose kl is an estimate that is only as good as T and may be
      negative, and `compared` the two sides of T's loss, a `contrast.Compared`.
    """
    prior = at(prior, networks, params, collections)
    drawn, encoder = contrasts.encode(
        contrast,
        prior,
        networks.encoder,
        params.encoder,
        collections.encoder,
        draws,
        train=train,
        weighted=beta if importance_weighted else None,
    )
    z = drawn.z if importance_weighted else drawn.z[:1]
    reconstruction, decoder = generator.reconstruction(
        networks.decoder, likelihood, params.decoder, collections.decoder, draws.x, z, train=train
    )
    t, _ = both_sides(
        adversary,
        collections,
        draws.x,
        drawn.compared,
        networks=networks,
        prior=prior,
        contrast=contrast,
        minus_log_prior=minus_log_prior,
        train=train,
    )
    t_q = t[0] if adversary_floor is None else jnp.maximum(t[0], -adversary_floor)
    kl = t_q + drawn.log_ratio
    terms = Terms(jnp.mean(reconstruction, axis=0), jnp.mean(kl, axis=0), drawn.kl)
    loss = terms.reconstruction + beta * terms.kl
    if importance_weighted:
        loss = -log_mean(drawn.zero - reconstruction - beta * kl, axis=0)
    return jnp.mean(loss), Generative(terms, drawn.compared, collections._replace(encoder=encoder, decoder=decoder))


def adversary_loss(
    adversary: PyTree,
    collections: Players,
    draws: Draws,
    compared: contrasts.Compared,
    *,
    networks: Players,
    prior: Distribution,
    contrast: contrasts.Contrast = PRIOR,
    divergence: Callable = divergences.jensen_shannon,
    minus_log_prior: bool = False,
    gradient_penalty: float = 0.0,
    train: bool = True,
) -> tuple[Array, tuple[AdversaryTerms, PyTree]]:
    """Eq. 3.3 as a minimisation over T: E[-log sigma(T(x, z)) - log(1 - sigma(T(x, z_prior)))].

    With another divergence, that one's loss (section 5.3), which has the same optimum. (Line 9 of Algorithm 1 as printed
    subtracts the gradient of eq. 3.3, which is maximised: an erratum.)

    Args:
      adversary: T's params.
      collections: every player's.
      draws: x [B, ...]; the rest is not read.
      compared: the encoder's draws and r's, or those of an s in its place; no gradient flows into them.
      networks: every player's.
      prior: p(z).
      contrast: as there.
      divergence: one of `divergences`.
      minus_log_prior: see `avb`.
      gradient_penalty: weight of `penalty.r1` in z, at both sides.
      train: whether batch normalisation uses this batch (and updates the adversary's statistics).

    Returns:
      The loss, and (what T says per example, the adversary's new collections).
    """
    t, after = both_sides(
        adversary,
        collections,
        draws.x,
        jax.lax.stop_gradient(compared),
        networks=networks,
        prior=prior,
        contrast=contrast,
        minus_log_prior=minus_log_prior,
        train=train,
    )
    loss, terms = adversary_terms(t, divergence, jax.lax.stop_gradient(compared.offset))
    if gradient_penalty:
        fixed = jax.lax.stop_gradient(compared.z).reshape(-1, *compared.z.shape[2:])
        of_network = networks.adversary, adversary, collections.adversary, draws.x
        loss += gradient_penalty * jnp.mean(r1(lambda z: players.evaluate_pairs(*of_network, z, train=train)[0], fixed))
    return loss, (terms, after)


def both_sides(
    adversary: PyTree,
    collections: Players,
    x: Array,
    compared: contrasts.Compared,
    *,
    networks: Players,
    prior: Distribution,
    contrast: contrasts.Contrast,
    minus_log_prior: bool,
    train: bool,
) -> tuple[Array, PyTree]:
    """T [2, S, B] at both sides, through one call, and the adversary's new collections."""
    t, after = evaluate_t(
        adversary,
        collections,
        x,
        compared.z.reshape(-1, *compared.z.shape[2:]),
        networks=networks,
        prior=prior,
        contrast=contrast,
        minus_log_prior=minus_log_prior,
        train=train,
    )
    return t.reshape(compared.z.shape[:3]), after


def evaluate_t(
    adversary: PyTree,
    collections: Players,
    x: Array,
    z: Array,
    *,
    networks: Players,
    prior: Distribution,
    contrast: contrasts.Contrast,
    minus_log_prior: bool,
    train: bool,
) -> tuple[Array, PyTree]:
    """T [S, B] at x [B, ...] and z [S, B, Z] as T sees it, and the adversary's new collections."""
    t, after = players.evaluate_pairs(networks.adversary, adversary, collections.adversary, x, z, train=train)
    if minus_log_prior:
        reference = contrast.reference(prior)
        t = t + reference.log_prob(reference.mean) - reference.log_prob(z)
    return t, after


def adversary_terms(t: Array, divergence: Callable, offset: Array | None = None) -> tuple[Array, AdversaryTerms]:
    """The adversary's loss [] from its T [2, S, B] on the two sides, and what it says per example.

    The logit that the loss takes is T, less the offset log s - log r [2, S, B] where the other side is an s in r's place.
    """
    logit = t if offset is None else t - offset
    loss = divergence(logit[0], logit[1])
    accuracy = 0.5 * (jnp.heaviside(logit[0], 0.5) + jnp.heaviside(-logit[1], 0.5))  # 0 is right half of the time
    saturation = jnp.mean(jnp.abs(logit) > SATURATED, axis=(0, 1))
    terms = AdversaryTerms(*(jnp.mean(a, axis=0) for a in (loss, accuracy)), saturation, jnp.mean(t[0], axis=0))
    return jnp.mean(loss), terms


def avb(
    encoder: Any,
    decoder: Any,
    adversary: Any,
    *,
    prior: Distribution,
    likelihood: Likelihood,
    optimizers: Players | optax.GradientTransformation,
    noise_dim: int,
    contrast: contrasts.Contrast = PRIOR,
    divergence: Callable = divergences.jensen_shannon,
    minus_log_prior: bool = False,
    adversary_floor: float | None = None,
    adversary_steps: int = 1,
    gradient_penalty: float = 0.0,
    noise_draws: int = 1,
    beta: float = 1.0,
    beta_warmup: int = 0,
    importance_weighted: bool = False,
) -> Method:
    """Adversarial Variational Bayes.

    Args:
      encoder: (x [B, ...], noise [B, N]) -> z [B, Z]: a sampler, as black a box as you like.
      decoder: z [B, Z] -> what `likelihood` takes.
      adversary: (x [B, ...], z [B, Z]) -> T [B].
      prior: p(z), a NumPyro distribution over vectors, or a `priors.Learned` one.
      likelihood: the decoder's output -> p(x|z), a NumPyro distribution with batch shape [B]; see `distributions`.
      optimizers: an optax optimiser per player, or one for all.
      noise_dim: N, how many N(0, 1) numbers the encoder gets per example.
      contrast: what T compares q(z|x) with: the prior, or a density r(z|x) of `avb_jax.contrast` that comes nearer to q.
      divergence: the adversary's objective, one of `divergences`.
      minus_log_prior: T is the network's output less log p(z), up to a constant: of T* = log q(z|x) - log p(z) the network then
        has log q alone to learn. Under a Gaussian contrast p is N(0, I), which r is once standardised.
      adversary_floor: c: the KL term takes max(T, -c), which costs at most e^-c nats of bound; None: no floor.
      adversary_steps: adversary updates per step (section 3.2: keep T near its optimum).
      gradient_penalty: weight of R1 in z, on the network's slope, see `penalty`; it costs T some of its optimum.
      noise_draws: S, draws of z per example in a step: all are for T, the first one is decoded.
      beta: weight of the KL term once warmed up; 1 is the ELBO.
      beta_warmup: steps over which the weight rises linearly from 0.
      importance_weighted: all S draws are decoded, and weighted by p(x|z) exp(-T): a bound on log p(x) in the ELBO's place,
        see `negative_elbo_adversarial`. q is then a proposal, wider than a posterior, which is easier for T to follow.

    Returns:
      A `Method`. Its `train_step` is Algorithm 1: eq. 3.9 for encoder and decoder, eq. 3.3 for T.

    Raises:
      UserError: a setting out of its range.

    Example:
      >>> import avb_jax
      >>> from avb_jax import networks
      >>> x_net = networks.MLP((8,), input_rank=2)
      >>> method = avb_jax.avb(
      ...     networks.BlackBoxEncoder(x_net, latent_dim=2),
      ...     networks.MLPDecoder(x_shape=(2, 2), widths=(8,)),
      ...     networks.InnerProductAdversary(x_net, networks.MLP((8,)), features=4),
      ...     prior=avb_jax.distributions.standard_normal(2),
      ...     likelihood=avb_jax.distributions.bernoulli,
      ...     optimizers=optax.adam(1e-3),
      ...     noise_dim=2,
      ... )
      >>> x = jnp.eye(4).reshape(4, 2, 2)
      >>> state = method.init(jax.random.key(0), x)
      >>> state, info = jax.jit(method.train_step)(jax.random.key(1), state, x)
      >>> int(state.step), info.elbo.shape, method.sample(jax.random.key(2), state, 3).shape
      (1, (4,), (3, 2, 2))
    """
    check_settings(
        likelihood=(likelihood, callable(likelihood), "a function of the decoder's output"),
        noise_dim=at_least(noise_dim, 1),
        contrast=(contrast, isinstance(contrast, contrasts.Contrast), "a contrast of avb_jax.contrast"),
        minus_log_prior=(
            minus_log_prior,
            not minus_log_prior or not isinstance(prior, Learned),
            "False with a learned prior",
        ),
        divergence=(divergence, callable(divergence), "a function of avb_jax.divergences"),
        adversary_floor=(adversary_floor, adversary_floor is None or adversary_floor >= 0, "None, or at least 0 nats"),
        adversary_steps=at_least(adversary_steps, 1),
        gradient_penalty=at_least(gradient_penalty, 0),
        noise_draws=at_least(noise_draws, 2 if importance_weighted else 1),
        beta=at_least(beta, 0),
        beta_warmup=at_least(beta_warmup, 0),
    )
    optimizers = generator.for_each(optimizers)
    networks = players.prepare(Players(encoder, decoder, adversary), optimizers, prior, Players._fields, learned=True)
    contrast.base(prior)  # which refuses what does not fit z
    beta_at = warmup(beta, beta_warmup)
    gradients = one_backward.chosen(networks, gradient_penalty)
    of_t = {"networks": networks, "prior": prior, "contrast": contrast, "minus_log_prior": minus_log_prior}
    of_loss = {"adversary_floor": adversary_floor, "importance_weighted": importance_weighted}
    loss = functools.partial(negative_elbo_adversarial, likelihood=likelihood, **of_loss, **of_t)
    loss_of_t = functools.partial(adversary_loss, divergence=divergence, gradient_penalty=gradient_penalty, **of_t)

    def prior_of(state: State) -> Distribution:
        return at(prior, networks, state.params, state.collections)

    def draw(key: Array, state: State, x: Array, draws: int = noise_draws) -> Draws:
        return players.draw(key, x, contrast.base(prior_of(state)), noise_dim, draws)

    def contrasted(state: State, draws: Draws) -> contrasts.Contrasted:
        of_encoder = state.params.encoder, state.collections.encoder
        return contrasts.encode(contrast, prior_of(state), networks.encoder, *of_encoder, draws, train=False)[0]

    def init(key: Array, x: Array) -> State:
        return players.init(key, x, networks, optimizers, prior, noise_dim, likelihood)

    def train_step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, Info]:
        beta = beta_at(state.step)
        state, terms, of_adversary = adversarial_step(
            key,
            state,
            draw=lambda key: draw(key, state, x),
            loss=functools.partial(loss, beta=beta),
            adversary_loss=loss_of_t,
            optimizers=optimizers,
            adversary_steps=adversary_steps,
            gradients=gradients,
            reduce=reduce,
        )
        return state, Info(
            terms.elbo,
            terms.reconstruction,
            terms.kl,
            terms.kl_contrast,
            beta,
            of_adversary.loss,
            of_adversary.accuracy,
            of_adversary.saturation,
        )

    def elbo(key: Array, state: State, x: Array) -> Terms:
        return loss(state.params, state.params.adversary, state.collections, draw(key, state, x), train=False)[1].terms

    def evaluate_adversary(key: Array, state: State, x: Array, draws: int = 1) -> AdversaryTerms:
        sampled = draw(key, state, x, draws)
        drawn = contrasted(state, sampled)
        _, (terms, _) = loss_of_t(state.params.adversary, state.collections, sampled, drawn.compared, train=False)
        return terms._replace(kl=terms.t + drawn.log_ratio.mean(axis=0))

    method = Method(
        "avb",
        init,
        train_step,
        **generator.capabilities(networks, prior, likelihood, noise_dim),
        elbo=elbo,
        adversary=evaluate_adversary,
    )

    def fresh_adversary(optimizer: optax.GradientTransformation, state: State) -> Method:
        """A method that trains a new T on the players of `state`, which stay as they are (encoder in evaluation mode)."""

        def restart(key: Array, x: Array) -> State:
            fresh = players.init(key, x, networks, Players(*[optimizer] * 3), prior, noise_dim)
            return State(
                fresh.step,
                state.params._replace(adversary=fresh.params.adversary),
                Players(adversary=fresh.opt_state.adversary),
                state.collections._replace(adversary=fresh.collections.adversary),
            )

        def step(key: Array, state: State, x: Array, reduce: Callable = identity) -> tuple[State, FreshInfo]:
            draws = draw(key, state, x)
            gradient, (terms, after) = jax.grad(loss_of_t, has_aux=True)(
                state.params.adversary, state.collections, draws, contrasted(state, draws).compared
            )
            after = state.collections._replace(adversary=mean_collections(reduce, after))
            state = apply_gradients(
                state._replace(collections=after), reduce(Players(adversary=gradient)), Players(adversary=optimizer)
            )
            return state._replace(step=state.step + 1), FreshInfo(terms.loss, terms.accuracy, terms.saturation)

        return method._replace(name="fresh_adversary", init=restart, train_step=step)

    return method._replace(fresh_adversary=fresh_adversary)
