"""Encoders that give their moments: these are the ones of their draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Posterior, UserError, networks


def test_the_gaussian_encoder_gives_its_moments():
    encoder = networks.GaussianEncoder(networks.MLP((8,), input_rank=2), 3)
    x = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), (1, 6, 6)), (20_000, 6, 6))
    noise = jax.random.normal(jax.random.key(1), (20_000, 3))
    posterior = encoder.apply(encoder.init(jax.random.key(2), x[:1], noise[:1]), x, noise)
    assert isinstance(posterior, Posterior)
    error = posterior.std[0] / np.sqrt(len(x))
    np.testing.assert_array_less(jnp.abs(posterior.z.mean(0) - posterior.mean[0]), 4 * error)
    np.testing.assert_allclose(posterior.z.std(0), posterior.std[0], rtol=4 / np.sqrt(2 * len(x)))


def test_a_semi_implicit_encoder_without_its_noise_is_the_gaussian_one_of_the_same_layers():
    trunk = networks.MLP((8,), input_rank=2)
    gaussian = networks.GaussianEncoder(trunk, 3, widths=(7, 5))
    semi_implicit = networks.SemiImplicitEncoder(trunk, 3, widths=(7, 5), noise_scale=0.01)
    x, noise = jax.random.uniform(jax.random.key(0), (4, 6, 6)), jax.random.normal(jax.random.key(1), (4, 3 + 200))
    params = {
        side.__class__: side.init(jax.random.key(2), x, noise[:, :n]) for side, n in ((gaussian, 3), (semi_implicit, 203))
    }
    mine, other = (params[side.__class__]["params"] for side in (gaussian, semi_implicit))
    of_u = other.pop("of_u")["kernel"]
    assert 0.8 * 0.01 < 200 * np.var(of_u) < 1.2 * 0.01  # as its scale has it
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    posterior = gaussian.apply({"params": mine}, x, noise[:, :3])
    without = semi_implicit.apply({"params": {**mine, "of_u": {"kernel": 0.0 * of_u}}}, x, noise)
    np.testing.assert_array_equal(posterior.z, without.z)
    np.testing.assert_array_equal((posterior.mean, posterior.std), without.conditional)
    assert posterior.gaussian
    assert not without.gaussian


def test_a_sampler_has_the_moments_that_it_gives():
    """Away from its start, its network's mean above all; over 512 fixed draws of noise they are known to one part in 20."""
    sampler = networks.Sampler(3, widths=(8,), gaussian_share=0.3)
    noise = jax.random.normal(jax.random.key(1), (100_000, 1, 2 * 3 + 4))
    x = jnp.zeros((1, 2))
    params = sampler.init(jax.random.key(2), x, noise[:2])["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), params)
    params["out"]["bias"] += 1.0
    posterior = sampler.apply({"params": params}, x, noise)
    z, mean, std = posterior.z[:, 0], posterior.mean[0], posterior.std[0]
    np.testing.assert_allclose((z.mean(axis=0) - mean) / std, 0, atol=4 / np.sqrt(512))
    np.testing.assert_allclose(z.std(axis=0) / std, 1, atol=4 / np.sqrt(2 * 512))
    assert not posterior.gaussian
    # A share of the variance is the first three numbers' own: without the others z is mean + sqrt(0.3) std n, shifted.
    silent = sampler.apply({"params": params}, x, noise.at[..., 3:].set(0.0)).z[:, 0]
    slope = np.std(silent, axis=0) / np.exp(10.0 * params["log_std"])
    np.testing.assert_allclose(slope, np.sqrt(0.3), rtol=4 / np.sqrt(2 * 100_000))


@pytest.mark.parametrize("noise_dim", [3 + 2 * 2, 3 + 2 * 3 + 1])
def test_noise_that_the_bases_cannot_share_is_named(noise_dim):
    encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, bases=2)
    with pytest.raises(UserError, match=f"noise_dim={noise_dim}: MomentEncoder needs .* set it to 9 plus a multiple of 2"):
        encoder.init(jax.random.key(1), jnp.zeros((4, 6, 6)), jnp.zeros((4, noise_dim)))


def moments_of(posterior):
    return posterior.z, posterior.mean, posterior.std


@pytest.fixture(scope="module")
def moment_encoder():
    encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, bases=2, widths=(8,), gaussian_share=0.3)
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6))
    params = encoder.init(jax.random.key(1), x, jnp.zeros((4, 3 + 2 * 5)))["params"]  # 3 and 2 numbers per basis
    # Away from the initial values, where all bases weigh the same and are nearly linear.
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return encoder, jax.tree.map(lambda p, k: p + 0.3 * jax.random.normal(k, p.shape), params, keys), x


@pytest.mark.slow
def test_the_moment_encoder_has_the_moments_that_it_gives(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (20_000, 4, 13))
    z, mean, std = moments_of(jax.jit(encoder.apply)({"params": params}, x, noise))
    # Its networks are standardised over 512 draws: their moments are known to one part in about 20.
    np.testing.assert_allclose((z.mean(axis=0) - mean) / std, 0, atol=4 / np.sqrt(512))
    np.testing.assert_allclose(z.std(axis=0) / std, 1, atol=4 / np.sqrt(2 * 512))


def test_the_moment_encoder_is_no_gaussian(moment_encoder):
    """Its latents are correlated given x, and a share of it is; with the whole share Gaussian it is the VAE's."""
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (20_000, 4, 13))
    z, mean, std = moments_of(jax.jit(encoder.apply)({"params": params}, x, noise))
    v = ((z - mean) / std)[:, 0]
    correlation = np.corrcoef(v.T) - np.eye(3)
    assert abs(correlation).max() > 0.1
    assert abs(correlation).max() < 0.7 + 0.05
    z, mean, std = moments_of(dataclasses.replace(encoder, gaussian_share=1.0).apply({"params": params}, x, noise))
    np.testing.assert_allclose(z, mean + std * noise[..., :3], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_moment_encoder_starts_as_the_gaussian_of_its_moments():
    """It is a linear image of its noise, uncorrelated over latents, but for some 1% of its variance."""
    x = jax.random.uniform(jax.random.key(0), (4, 6, 6))
    for more in (0, 5):
        encoder = networks.MomentEncoder(networks.MLP((8,), input_rank=2), 3, gaussian_share=0.0)
        noise = jax.random.normal(jax.random.key(3), (20_000, 4, 3 + 4 * (3 + more)))
        z, mean, std = moments_of(jax.jit(encoder.init_with_output)(jax.random.key(1), x, noise)[0])
        v = ((z - mean) / std)[:, 0]
        np.testing.assert_allclose(np.corrcoef(v.T), np.eye(3), atol=0.05)
        _, residual, *_ = np.linalg.lstsq(noise[:, 0], v - v.mean(axis=0))
        assert (residual < 0.02 * len(v)).all()


def test_what_weighs_the_bases_does_not_train_the_trunk(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (7, 4, 13))

    def shape(params):
        z, mean, std = moments_of(encoder.apply({"params": params}, x, noise))
        return jnp.sum(jnp.sin((z - mean) / std))

    gradient = jax.jit(jax.grad(shape))(params)
    reached = {name for name, part in gradient.items() if any(abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(part))}
    assert reached == set(networks.MomentEncoder.SHAPE)


def test_its_posterior_depends_on_its_own_example_alone(moment_encoder):
    encoder, params, x = moment_encoder
    noise = jax.random.normal(jax.random.key(3), (7, 4, 13))
    together = encoder.apply({"params": params}, x, noise)
    alone = encoder.apply({"params": params}, x[2:3], noise[:, 2:3])
    for whole, part in zip(moments_of(together), moments_of(alone), strict=True):
        np.testing.assert_allclose(whole[..., 2:3, :], part, rtol=1e-5, atol=1e-6)
