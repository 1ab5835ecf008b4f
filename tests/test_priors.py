"""Priors that are learned: densities, what trains them, and evaluation with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avb_jax
from avb_jax import Posterior, UserError, contrast, distributions, networks, priors
from avb_jax.evaluation import Quadrature
from avb_jax.method import prior_at
from avb_jax.methods import avb
from avb_jax.network import as_network
from avb_jax.types import Players
from tests.conftest import small_method, small_modules

FLOW = networks.FlowPrior(2, 3, (8,))


def encode(x):
    """q(z|x) of the first two numbers of x."""
    flat = x.reshape(len(x), -1)
    return Posterior(flat[:, :2], 2 * flat[:, :2], 0.3 + flat[:, 2:4], gaussian=True)


@pytest.mark.parametrize("network", [FLOW, networks.VampPrior(2, (2, 2), 5)])
@pytest.mark.slow
def test_a_density_and_draws_of_it(network):
    """It integrates to one over the plane, and its draws have its moments."""
    variables = network.init(jax.random.key(0), jnp.zeros((1, 2)), None, method="log_prob")
    leaves, structure = jax.tree.flatten(variables)
    variables = jax.tree.unflatten(
        structure, [a + 0.4 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)]
    )
    edges = np.linspace(-12, 12, 601)
    grid = jnp.stack(jnp.meshgrid(edges, edges, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(network.apply(variables, grid, encode, method="log_prob")) * (edges[1] - edges[0]) ** 2
    np.testing.assert_allclose(density.sum(), 1.0, atol=2e-3)
    drawn = np.asarray(network.apply(variables, jax.random.key(1), 100_000, encode, method="draw"))
    mean = (density[:, None] * grid).sum(axis=0)
    variance = (density[:, None] * (grid - mean) ** 2).sum(axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.04)


def learned(name, prior, **options):
    """A method with 6x6 images and three latents, and that prior."""
    modules = small_modules(name)
    given = {"likelihood": distributions.bernoulli, "optimizers": optax.adam(1e-2), "noise_dim": 3, "prior": prior, **options}
    of_t = (modules.adversary,) if name == "avb" else ()
    return getattr(avb_jax, name)(modules.encoder, modules.decoder, *of_t, **given)


def test_a_flow_starts_as_the_fixed_prior(images):
    """The losses and the draws of the step are then those of N(0, I)."""
    for name in ("vae", "avb"):
        method, fixed = learned(name, priors.Learned(networks.FlowPrior(3, 2, (4,)))), small_method(name)
        state = method.init(jax.random.key(0), images)
        assert state.params.decoder.keys() == {"decoder", "prior"}
        plain = fixed.init(jax.random.key(0), images)
        jax.tree.map(np.testing.assert_array_equal, state.params.decoder["decoder"], plain.params.decoder)
        one, other = (m.elbo(jax.random.key(1), s, images) for m, s in ((method, state), (fixed, plain)))
        np.testing.assert_allclose(one.reconstruction, other.reconstruction, rtol=1e-5)
        if name == "avb":  # of the VAE's it is drawn, not in closed form
            np.testing.assert_allclose(one.kl, other.kl, rtol=1e-4, atol=1e-5)
        z = jnp.ones((8, 3))
        np.testing.assert_allclose(method.log_joint(state, images, z), fixed.log_joint(plain, images, z), rtol=1e-5)


@pytest.mark.parametrize("of", [contrast.PriorContrast(), contrast.GaussianContrast()])
@pytest.mark.slow
def test_what_t_does_not_say_trains_the_prior(images, of):
    """Under any contrast and any T, the prior's gradient is that of -E log p(z), and no other player's changes by it."""
    prior = priors.Learned(networks.FlowPrior(3, 2, (4,)))
    method = learned("avb", prior, contrast=of, noise_draws=2)
    state = jax.jit(method.init)(jax.random.key(0), images)
    scatter = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), tree
    )
    decoder = {**state.params.decoder, "prior": scatter(state.params.decoder["prior"])}
    params = state.params._replace(decoder=decoder)
    modules = small_modules("avb")
    nets = Players(*map(as_network, modules))
    nets = nets._replace(decoder=priors.with_prior(nets.decoder, prior))
    draws = avb_jax.players.draw(jax.random.key(1), images, distributions.standard_normal(3), 3, 2)

    def loss(params):
        return avb.negative_elbo_adversarial(
            params,
            params.adversary,
            state.collections,
            draws,
            networks=nets,
            prior=prior,
            likelihood=distributions.bernoulli,
            contrast=of,
        )

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    z = jnp.stack([modules.encoder.apply({"params": params.encoder}, images, noise) for noise in draws.noise])

    def of_prior(variables):
        flow = networks.FlowPrior(3, 2, (4,))
        return -jnp.mean(flow.apply({"params": variables}, z, None, method="log_prob"))

    expected = jax.grad(of_prior)(params.decoder["prior"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, gradient.decoder["prior"], expected)
    assert any(leaf.any() for leaf in jax.tree.leaves(expected))
    if isinstance(of, contrast.PriorContrast):  # T alone moves the encoder, next to the reconstruction
        plain, _ = jax.grad(
            lambda encoder: avb.negative_elbo_adversarial(
                params._replace(encoder=encoder, decoder=params.decoder["decoder"]),
                params.adversary,
                state.collections,
                draws,
                networks=Players(*map(as_network, modules)),
                prior=distributions.standard_normal(3),
                likelihood=distributions.bernoulli,
            ),
            has_aux=True,
        )(params.encoder)
        jax.tree.map(close, gradient.encoder, plain)
    if isinstance(of, contrast.PriorContrast):  # the value of the KL term is T's alone
        t = jnp.stack([nets.adversary.apply({"params": params.adversary}, images, one, train=False)[0] for one in z])
        np.testing.assert_allclose(found.terms.kl, t.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_prior_comes_to_where_the_codes_are():
    """An encoder far from N(0, I) that does not move: the flow's moments become those of its codes."""

    class Fixed(networks.GaussianEncoder):
        """N(x's own two numbers + 2, 0.5^2), whatever its params."""

        def __call__(self, x, noise, *, train=False):
            mean = jax.lax.stop_gradient(x[..., 0, :] + 2.0) + 0.0 * super().__call__(x, noise, train=train).mean
            std = jnp.full_like(mean, 0.5)
            return Posterior(mean + std * noise, mean, std, gaussian=True)

    trunk = networks.MLP((4,), input_rank=2)
    x = np.random.default_rng(0).random((64, 1, 2)).astype(np.float32)
    method = avb_jax.vae(
        Fixed(trunk, 2),
        networks.MLPDecoder((1, 2), 1, (8,)),
        prior=priors.Learned(FLOW),
        likelihood=distributions.gaussian(0.5),
        optimizers=optax.adam(1e-2),
        noise_dim=2,
    )
    state = avb_jax.fit(method, x, steps=800, batch_size=64, quiet=True, parallel="jit")
    drawn = prior_at(method, state).sample(jax.random.key(0), (5000,))
    np.testing.assert_allclose(drawn.mean(axis=0), 2.0 + x[:, 0].mean(axis=0), atol=0.15)
    np.testing.assert_allclose(drawn.std(axis=0), np.sqrt(0.25 + x[:, 0].var(axis=0)), rtol=0.2)
    # Evaluation asks for the prior as it is: quadrature's log p(x) is above every importance bound and the ELBO.
    report = avb_jax.evaluate(
        method, state, x[:8], [Quadrature(), avb_jax.evaluation.ImportanceSampling(), avb_jax.evaluation.ELBO()], quiet=True
    )
    annealed = avb_jax.evaluation.AIS(chains=2, temperatures=3, leapfrog_steps=2, initial="prior")  # which has no variance
    assert np.isfinite(avb_jax.evaluate(method, state, x[:2], [annealed], quiet=True)["log_likelihood", "ais"].mean)
    exact = report["log_likelihood", "quadrature"].mean
    assert report["elbo", "density"].mean < exact + 0.01
    assert report["log_likelihood", "importance"].mean == pytest.approx(exact, abs=0.05)


def test_slips_are_named(images):
    prior = priors.Learned(networks.FlowPrior(3))
    small = small_modules("bigan")
    with pytest.raises(UserError, match=r"prior: is learned, which avb, vae, .* can train; give this method a fixed one"):
        avb_jax.bigan(*small, prior=prior, optimizers=optax.adam(1e-3), noise_dim=3)
    with pytest.raises(UserError, match=r"minus_log_prior=True: must be False with a learned prior"):
        learned("avb", prior, minus_log_prior=True)
    with pytest.raises(UserError, match="latent_dim=1: a flow prior couples two halves"):
        networks.FlowPrior(1).init(jax.random.key(0), jnp.zeros((1, 1)), None, method="log_prob")
    method = learned("avb", priors.Learned(networks.VampPrior(3, (6, 6), 4)))
    state = method.init(jax.random.key(0), images)
    with pytest.raises(UserError, match="a Vamp prior needs an encoder that gives q's moments"):
        method.train_step(jax.random.key(1), state, images)
    vamp, trunk = priors.Learned(networks.VampPrior(3, (6, 6), 4)), networks.MLP((4,), input_rank=2)
    options = {"likelihood": distributions.bernoulli, "optimizers": optax.adam(1e-3), "noise_dim": 3, "prior": vamp}
    method = avb_jax.vae(networks.FullCovarianceEncoder(trunk, 3), small.decoder, **options)
    with pytest.raises(UserError, match=r"and is Gaussian, such as networks\.GaussianEncoder"):
        method.train_step(jax.random.key(1), method.init(jax.random.key(0), images), images)
