"""The three players as pure functions of their params, whatever networks they are.

encoder    (x [B, ...], noise [B, N]) -> z [B, Z], or a `Posterior` with moments [B, Z] or log q(z|x) [B] as well
decoder    z [B, Z] -> what the likelihood makes a distribution of x of
adversary  (x [B, ...], z [B, Z]) -> T [B], or an `AdversaryOutput` with the features [B, F] behind it as well

A network that does not share x (`network.Network`) is called on the S * B pairs where several draws come with each x.
"""

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution

from avb_jax.network import Network, as_network, call
from avb_jax.priors import Learned, with_prior
from avb_jax.types import AdversaryOutput, Array, Draws, Players, Posterior, PyTree, State, UserError


def encode(
    network: Network, params: PyTree, collections: dict, x: Array, noise: Array, latent_dim: int, *, train: bool
) -> tuple[Posterior, dict]:
    """Draws z ~ q(z|x) for x [B, ...] and noise [B, N], or S times as many for noise [S, B, N].

    Returns:
      The `Posterior`, with z [B, Z] or [S, B, Z] and moments [B, Z], and the encoder's new collections.

    Raises:
      UserError: the encoder's output does not have these shapes, has no gradient, or is called Gaussian and has no moments.
    """
    shape = (*noise.shape[:-1], latent_dim)
    separate = noise.ndim == 3 and not network.shares_x
    if separate:
        x = _paired(x, noise.shape[:2])
        noise = noise.reshape(-1, noise.shape[-1])
    out, collections = call(network, params, collections, x, noise, train=train)
    posterior = out if isinstance(out, Posterior) else Posterior(out)
    _check_shape("encoder", posterior.z, (*noise.shape[:-1], latent_dim))
    if not jnp.issubdtype(posterior.z.dtype, jnp.floating):
        raise UserError(
            f"encoder: z of type {posterior.z.dtype}, through which no gradient comes back; give floating-point numbers"
        )
    for moment in (posterior.mean, posterior.std):
        if moment is not None:
            _check_shape("encoder's moments", moment, (x.shape[0], latent_dim))
    if posterior.gaussian and (posterior.mean is None or posterior.std is None):
        raise UserError("encoder: Posterior(gaussian=True) without mean and std; give both, of N(mean, diag std^2)")
    for moment in posterior.conditional or ():
        _check_shape("encoder's conditional moments", moment, (*noise.shape[:-1], latent_dim))
    if posterior.log_q is not None:
        _check_shape("encoder's log_q", posterior.log_q, noise.shape[:-1])
    if separate:  # an example's moments are the same at each of its draws
        mean, std = (None if a is None else a.reshape(shape)[0] for a in (posterior.mean, posterior.std))
        log_q = None if posterior.log_q is None else posterior.log_q.reshape(shape[:-1])
        conditional = None if posterior.conditional is None else tuple(a.reshape(shape) for a in posterior.conditional)
        posterior = posterior.replace(z=posterior.z.reshape(shape), mean=mean, std=std, log_q=log_q, conditional=conditional)
    return posterior, collections


def evaluate_pairs(
    network: Network, params: PyTree, collections: dict, x: Array, z: Array, *, train: bool
) -> tuple[Array, dict]:
    """T(x, z) [S, B] at x [B, ...] and z [S, B, Z], and the adversary's new collections.

    All S * B pairs go through one call, so that a batch normalisation sees them together: T stays one function of
    (x, z), the same one in the encoder's loss and in the adversary's.

    Raises:
      UserError: the adversary's output is not one number per pair.
    """
    pairs = z.shape[:-1]
    if network.shares_x:
        out, collections = call(network, params, collections, x, z, train=train)
        t = out.t if isinstance(out, AdversaryOutput) else out
        _check_shape("adversary", t, pairs)
        return t, collections
    output, collections = evaluate_adversary(
        network, params, collections, _paired(x, pairs), z.reshape(-1, z.shape[-1]), train=train
    )
    return output.t.reshape(pairs), collections


def evaluate_adversary(
    network: Network, params: PyTree, collections: dict, x: Array, z: Array, *, train: bool
) -> tuple[AdversaryOutput, dict]:
    """T and its features at pairs x [B, ...] and z [B, Z], and the adversary's new collections.

    Raises:
      UserError: the adversary's output is not one number per pair.
    """
    out, collections = call(network, params, collections, x, z, train=train)
    output = out if isinstance(out, AdversaryOutput) else AdversaryOutput(out)
    _check_shape("adversary", output.t, x.shape[:1])
    return output, collections


def draw(key: Array, x: Array, prior: Distribution | None, noise_dim: int, noise_draws: int = 1) -> Draws:
    """Samples lines 4 and 5 of Algorithm 1 for the examples x [B, ...], `noise_draws` times for each; no z without a prior."""
    noise_key, prior_key = jax.random.split(key)
    pairs = (noise_draws, x.shape[0])
    return Draws(
        x, jax.random.normal(noise_key, (*pairs, noise_dim)), None if prior is None else prior.sample(prior_key, pairs)
    )


def prepare(
    networks: Players,
    optimizers: Players,
    prior: Distribution,
    needed: tuple[str, ...] = (),
    learned: bool = False,
) -> Players:
    """The players' networks as `Network`s; the prior may be `learned` where the method can train it.

    Raises:
      UserError: something that is no network, one of those `needed` that is None, one without an optimiser, or a prior over
        other than vectors.
    """
    networks = Players(*map(as_network, networks))
    for name in needed:
        if getattr(networks, name) is None:
            raise UserError(f"{name}=None: this method has this player; give it a network")
    for name, network in networks._asdict().items():
        if network is not None and getattr(optimizers, name) is None:
            raise UserError(f"optimizers.{name}=None: this player has a network; give it an optax optimiser")
    if not isinstance(prior, Distribution) or len(prior.event_shape) != 1 or prior.batch_shape != ():
        known = isinstance(prior, Distribution)
        shapes = f" of batch shape {prior.batch_shape} and event shape {prior.event_shape}" if known else ""
        raise UserError(
            f"prior={type(prior).__name__}{shapes}: give one NumPyro distribution over vectors z [Z], such as "
            "numpyro.distributions.Normal(jnp.zeros(2), 1).to_event(1)"
        )
    if isinstance(prior, Learned) and not learned:
        raise UserError(
            "prior: is learned, which avb, vae, iwae, sivi, uivi, iwhvi and aae can train; give this method a fixed one"
        )
    return networks._replace(decoder=with_prior(networks.decoder, prior)) if isinstance(prior, Learned) else networks


def init(
    key: Array, x: Array, networks: Players, optimizers: Players, prior: Distribution, noise_dim: int, likelihood=None
) -> State:
    """A fresh State, its params shaped by the batch x [B, ...]; players that have no network stay None.

    Raises:
      UserError: what the likelihood makes of the decoder's output is no distribution of x.
    """
    keys = Players(*jax.random.split(key, 3))
    noise, z = jnp.zeros((x.shape[0], noise_dim)), jnp.zeros((x.shape[0], *prior.event_shape))
    inputs = Players(encoder=(x, noise), decoder=(z,), adversary=(x, z))
    params, collections, opt_state = {}, {}, {}
    for name, network in networks._asdict().items():
        if network is None:
            params[name], collections[name], opt_state[name] = None, {}, None
            continue
        variables = dict(network.init(getattr(keys, name), *getattr(inputs, name)))
        params[name] = variables.pop("params", {})
        collections[name] = variables
        opt_state[name] = getattr(optimizers, name).init(params[name])
    params, collections = Players(**params), Players(**collections)
    if likelihood is not None:
        check_likelihood(likelihood, networks.decoder, params.decoder, collections.decoder, z, x)
    return State(jnp.zeros((), jnp.int32), params, Players(**opt_state), collections)


def check_likelihood(likelihood, decoder: Network, params: PyTree, collections: dict, z: Array, x: Array) -> None:
    """Refuses a decoder and a likelihood that make no distribution of x [B, *x] from z [B, Z].

    Raises:
      UserError: it has other shapes.
    """
    output = jax.eval_shape(lambda z: call(decoder, params, collections, z, train=False)[0], z)
    try:
        of_x = jax.eval_shape(lambda z: likelihood(call(decoder, params, collections, z, train=False)[0]), z)
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"likelihood: cannot take the decoder's output {getattr(output, 'shape', output)} ({error})") from error
    if (of_x.batch_shape, of_x.event_shape) != (x.shape[:1], x.shape[1:]):
        raise UserError(
            f"likelihood: makes of the decoder's output {getattr(output, 'shape', output)} a distribution of batch shape "
            f"{of_x.batch_shape} and event shape {of_x.event_shape}; x [B, ...] needs {x.shape[:1]} and {x.shape[1:]}: fix the "
            "decoder's output, or the likelihood's `.to_event(n)`"
        )


def _paired(x: Array, pairs: tuple[int, int]) -> Array:
    """The examples x [B, ...] S times over, [S * B, ...], for `pairs` (S, B); they may have no numbers at all, [B, 0]."""
    return jnp.broadcast_to(x, (*pairs, *x.shape[1:])).reshape(pairs[0] * pairs[1], *x.shape[1:])


def _check_shape(player: str, got: Array, expected: tuple) -> None:
    if tuple(got.shape) != tuple(expected):
        raise UserError(f"{player}: returned shape {tuple(got.shape)}, expected {tuple(expected)}; fix the network's output")
