"""The Wasserstein autoencoder with a kernel (Tolstikhin et al. 2018), as a method of one's own: python examples/own_method.py.

What a method cannot do is left out, and estimators that need it say so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import avb_jax
from avb_jax import Method, Players, distributions, evaluation, networks
from avb_jax.methods import generator
from avb_jax.methods.update import apply_gradients
from avb_jax.players import draw, encode, init, prepare


class Info(NamedTuple):
    """What a step is observed by."""

    reconstruction: jax.Array  # [B] -log p(x|z), nats
    discrepancy: jax.Array  # [] squared maximum mean discrepancy of codes and prior


def wae(encoder, decoder, *, prior, likelihood, optimizers, noise_dim: int, weight: float = 10.0) -> Method:
    """E[-log p(x|z)] + weight MMD^2(q(z), p(z)), with an inverse multiquadratic kernel."""
    optimizers = generator.for_each(optimizers)
    nets = prepare(Players(encoder, decoder), optimizers, prior)
    dim = prior.event_shape[0]

    def kernel(a, b):
        return jnp.mean(2 * dim / (2 * dim + jnp.sum((a[:, None] - b) ** 2, axis=-1)))

    def loss(params, collections, draws):
        q, of_encoder = encode(nets.encoder, params.encoder, collections.encoder, draws.x, draws.noise, dim, train=True)
        z, z_prior = q.z[0], draws.z_prior[0]
        p, of_decoder = generator.decode(nets.decoder, likelihood, params.decoder, collections.decoder, z, train=True)
        info = Info(-p.log_prob(draws.x), kernel(z, z) + kernel(z_prior, z_prior) - 2 * kernel(z, z_prior))
        after = collections._replace(encoder=of_encoder, decoder=of_decoder)
        return jnp.mean(info.reconstruction) + weight * info.discrepancy, (info, after)

    def train_step(key, state, x, reduce=lambda tree: tree):
        gradients, (info, after) = jax.grad(loss, has_aux=True)(state.params, state.collections, draw(key, x, prior, noise_dim))
        state = apply_gradients(state._replace(collections=reduce(after)), reduce(gradients), optimizers)
        return state._replace(step=state.step + 1), info

    start = lambda key, x: init(key, x, nets, optimizers, prior, noise_dim, likelihood)  # noqa: E731
    return Method("wae", start, train_step, **generator.capabilities(nets, prior, likelihood, noise_dim))


if __name__ == "__main__":
    digits = avb_jax.data.load("digits", binarize="dynamic")
    net = networks.MLP((128,), input_rank=2)
    encoder, decoder = networks.BlackBoxEncoder(net, 4), networks.MLPDecoder((8, 8), 1, (128,))
    game = {"prior": distributions.standard_normal(4), "likelihood": distributions.bernoulli, "noise_dim": 4}
    method = wae(encoder, decoder, optimizers=optax.adam(1e-3), **game)
    state = avb_jax.fit(method, digits, steps=2000, batch_size=128)
    print(avb_jax.evaluate(method, state, digits, [evaluation.ReconstructionError()]).to_markdown())
