"""The VAE: which densities it takes, and what its KL term then is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from numpyro import distributions as dist

import avb_jax
from avb_jax import Posterior, UserError, distributions, networks
from tests import gaussian
from tests.conftest import GAUSSIAN, small_method
from tests.gaussian import POINTS, PRIOR, SIGMA, LinearDecoder, LinearEncoder, analytic_negative_elbo, log_normal


def mean_and_error(values):
    """Mean and standard error over axis 0."""
    return values.mean(axis=0), values.std(axis=0) / np.sqrt(len(values))


class Moments(nn.Module):
    """An encoder of a user's: its moments, with or without saying that it is Gaussian."""

    gaussian: bool = True
    with_moments: bool = True

    @nn.compact
    def __call__(self, x, noise):
        moments = (jnp.zeros((len(x), 3)), jnp.ones((len(x), 3))) if self.with_moments else ()
        return Posterior(noise, *moments, gaussian=self.gaussian)


def observed(images, name, encoder, noise_dim=3):
    """What a step of the method with that encoder observes."""
    method = small_method(name, encoder=lambda trunk, latents: encoder, noise_dim=noise_dim)
    step = jax.jit(lambda key, x: method.train_step(key, method.init(key, x), x)[1])
    return step(jax.random.key(0), images)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_moments_alone_are_no_density(images, name):
    """A VAE takes the closed form of a Gaussian that is called one; a VAE/GAN needs one, too."""
    needs = {"vae": "a VAE needs a density of q", "vaegan": "a VAE/GAN needs an encoder that returns"}[name]
    moments = networks.MomentEncoder(networks.MLP((4,), input_rank=2), 3, bases=1)
    np.testing.assert_allclose(observed(images, name, Moments()).kl, 0, atol=1e-6)
    for encoder, noise_dim in ((Moments(False), 3), (moments, 6)):
        with pytest.raises(UserError, match=f"encoder={type(encoder).__name__}: {needs}"):
            observed(images, name, encoder, noise_dim)
    with pytest.raises(UserError, match=r"Posterior\(gaussian=True\) without mean and std"):
        observed(images, name, Moments(with_moments=False))


def test_a_wrong_log_q_is_named(images):
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            return Posterior(noise, log_q=jnp.zeros((3, 3)))

    with pytest.raises(UserError, match=r"encoder's log_q: returned shape \(3, 3\), expected \(8,\)"):
        observed(images, "vae", Wrong())


class KnownDensity(nn.Module):
    """The Gaussian encoder of the known game, with its density in the place of its moments, too high by `extra` nats."""

    extra: float = 0.0

    @nn.compact
    def __call__(self, x, noise):
        z = LinearEncoder(name="q")(x, noise)
        log_q = log_normal(noise).sum(-1) - 2 * self.variables["params"]["q"]["log_s"].mean()
        return Posterior(z, log_q=log_q + self.extra)


def test_a_vae_takes_any_density():
    """Its KL term is log q - log p at the draws, for a Gaussian the closed form on average; what is too high costs."""
    x, elbos = jnp.tile(POINTS, (25_000, 1)), []
    for extra in (0.0, 0.5):
        common = {"likelihood": distributions.gaussian(SIGMA), "optimizers": optax.sgd(1.0), "noise_dim": 2}
        method = avb_jax.vae(KnownDensity(extra), LinearDecoder(), prior=PRIOR, **common)
        state = method.init(jax.random.key(0), x[:4])
        elbos.append(method.elbo(jax.random.key(1), state, x).elbo)
    exact = -analytic_negative_elbo(state.params.encoder["q"], state.params.decoder, POINTS)
    mean, error = mean_and_error(elbos[0])
    assert abs(mean - exact) < 4 * error
    np.testing.assert_allclose(elbos[0] - elbos[1], 0.5, atol=1e-4)


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.slow
def test_the_kl_of_a_gaussian_is_its_own_whatever_the_prior(images, closed_form):
    """Exact for each example where NumPyro knows it; elsewhere an estimate from the draws, right on average."""
    normal = dist.Normal(jnp.array([0.0, 0.5, -1.0]), jnp.array([1.0, 2.0, 0.7])).to_event(1)
    heavy = dist.StudentT(4.0, jnp.array([0.0, 0.5, -1.0]), 1.5).to_event(1)
    prior = normal if closed_form else heavy
    modules = networks.GaussianEncoder(networks.MLP((8,), input_rank=2), 3), networks.MLPDecoder((6, 6), 1, (8,))
    method = avb_jax.vae(*modules, prior=prior, likelihood=distributions.bernoulli, optimizers=optax.sgd(1.0), noise_dim=3)
    state = method.init(jax.random.key(0), images)
    many = jnp.repeat(images[:1], 100_000, axis=0)
    kl = method.elbo(jax.random.key(1), state, many).kl
    posterior = method.encode(jax.random.key(2), state, many)
    log_q = log_normal(posterior.z, posterior.mean, jnp.log(posterior.std)).sum(-1)
    expected, error = mean_and_error(log_q - prior.log_prob(posterior.z))
    if closed_form:
        np.testing.assert_array_equal(kl, kl[0])
        assert abs(kl[0] - expected) < 4 * error
    else:
        found, own_error = mean_and_error(kl)
        assert own_error > 0
        assert abs(found - expected) < 4 * np.hypot(error, own_error)


def test_log_joint_and_decode_are_the_distributions_own(images):
    """Log p(x|z) + log p(z), by hand."""
    method = small_method("vae", likelihood=distributions.bernoulli)
    state, z = method.init(jax.random.key(0), images), jax.random.normal(jax.random.key(1), (8, 3))
    p = np.asarray(method.decode(state, z).mean, np.float64)
    log_p_x = np.sum(images * np.log(p) + (1 - images) * np.log1p(-p), axis=(1, 2))
    np.testing.assert_allclose(method.log_joint(state, images, z), log_p_x + gaussian.log_normal(z).sum(-1), rtol=1e-4)
    logits = networks.MLPDecoder((6, 6), 1, (8,)).apply({"params": state.params.decoder}, z)[..., 0]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    # A sample is a mean image at a code from the prior.
    code = method.prior.sample(jax.random.key(2), (5,))
    np.testing.assert_array_equal(method.sample(jax.random.key(2), state, 5), method.decode(state, code).mean)
