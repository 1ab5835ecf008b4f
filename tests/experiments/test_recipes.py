"""What the experiments report of a trained model, on one whose numbers are all known.

The decoder makes the same pixels whatever z, and q(z|x) = N(1, 0.5^2) whatever x: log p(x), the ELBO, both KLs and every error
of a pixel are closed forms.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import avb_jax
from avb_jax import Method, Posterior, State, build, data, distributions
from experiments import celeba, launch, mnist, synthetic
from experiments.configs import celeba as celeba_config
from experiments.configs import mnist as mnist_config
from experiments.configs import synthetic as synthetic_config

LOGITS = np.random.default_rng(0).choice([-2.0, 2.0], (16, 16)).astype(np.float32)
X = np.random.default_rng(1).integers(0, 2, (400, 16, 16)).astype(np.float32)
P = 1 / (1 + np.exp(-np.float64(LOGITS)))
KL = 0.5 * (1 + 0.25 - 1 - 2 * np.log(0.5))


class Aside(nn.Module):
    """Q(z|x) = N(1, 0.5^2)."""

    def __call__(self, x, noise):
        mean = jnp.ones((len(x), 1))
        return Posterior(mean + 0.5 * noise, mean, 0.5 * mean, gaussian=True)


class Constant(nn.Module):
    """The same pixels whatever z."""

    def __call__(self, z):
        return jnp.broadcast_to(jnp.asarray(LOGITS), (len(z), 16, 16))[..., None]


METHOD = avb_jax.vae(
    Aside(),
    Constant(),
    prior=distributions.standard_normal(1),
    likelihood=distributions.bernoulli,
    optimizers=avb_jax.Players(*[avb_jax.build.optax.identity()] * 3),
    noise_dim=1,
)


def log_p(images):
    return np.mean(np.sum(images * np.log(P) + (1 - images) * np.log(1 - P), axis=(1, 2)))


def rmse(images):
    return np.sqrt(np.mean((P - images) ** 2))


@pytest.fixture
def reported(monkeypatch, tmp_path):
    """What a recipe's `main` writes, with this model in the place of the trained one."""

    def run(recipe, config, dataset):
        state = METHOD.init(jax.random.key(0), dataset.train[:2])

        def trained(*_, built):
            assert built
            return jax.tree.map(lambda a: a[None], state)

        monkeypatch.setattr(build, "dataset", lambda config: dataset)
        monkeypatch.setattr(build, "methods", lambda config, x_shape: {"vae": METHOD})
        monkeypatch.setattr(launch, "train", trained)
        config.num_seeds = 1
        recipe.main(config, tmp_path)
        numbers = json.loads((tmp_path / "results.json").read_text())["vae"]
        assert not any("reason" in number for number in numbers.values())
        return {quantity: number["mean"] for quantity, number in numbers.items()}

    return run


def test_the_synthetic_recipe(reported):
    config = synthetic_config.get_config()
    config.latent_dim, config.evaluation.samples = 1, 8000
    images, found = X[:4], reported(synthetic, config, data.from_arrays(X[:4]))
    assert found["log_likelihood"] == pytest.approx(log_p(images), abs=1e-3)
    assert found["elbo"] == pytest.approx(log_p(images) - KL, abs=1e-3)
    assert found["elbo_knn"] == pytest.approx(log_p(images) - KL, abs=0.1)
    assert found["reconstruction_error"] == pytest.approx(-log_p(images), abs=1e-3)
    assert found["reconstruction_error_per_pixel"] == pytest.approx(-log_p(images) / 256, abs=1e-5)
    assert found["kl_aggregated_posterior"] == pytest.approx(KL, abs=0.1)
    assert found["kl_aggregated_posterior_quadrature"] == pytest.approx(KL, abs=1e-3)
    assert found["reconstruction_rmse_pixels"] == pytest.approx(rmse(images), rel=1e-4)


def test_the_mnist_recipe(reported):
    config = mnist_config.get_config()
    config.evaluation.update({"draws": 2, "chunk": 100, "importance_images": 400, "importance_samples": 32})
    found = reported(mnist, config, data.from_arrays(X[:10], X))
    assert found["elbo"] == pytest.approx(log_p(X) - KL, abs=1e-3)
    assert found["reconstruction_error"] == pytest.approx(-log_p(X), abs=1e-3)
    assert found["reconstruction_rmse_pixels"] == pytest.approx(rmse(X), rel=1e-4)
    assert log_p(X) - 0.5 < found["log_likelihood"] < log_p(X) + 0.05  # 32 draws from a proposal that is not the posterior
    assert found["kl"] == pytest.approx(KL, abs=1e-4)
    assert found["kl_aggregated_posterior"] == pytest.approx(KL, abs=0.4)  # by 400 codes
    assert 1 < found["effective_sample_size_importance"] < 32


def test_the_faces_recipe(reported):
    config = celeba_config.get_config("smoke")
    config.evaluation.images = 40
    images, found = X[:40], reported(celeba, config, data.from_arrays(X[:40], X))
    assert found["elbo"] == pytest.approx(log_p(images) - KL, abs=1e-3)
    assert found["kl"] == pytest.approx(KL, abs=1e-4)
    assert found["reconstruction_rmse_pixels"] == pytest.approx(rmse(images), rel=1e-4)
    assert found["ms_ssim_samples"] == pytest.approx(1.0, abs=1e-4)  # all samples are one
    assert found["sliced_wasserstein_16"] > 100


@pytest.mark.parametrize(("shares", "expected"), [((0.25, 0.25, 0.25, 0.25), 4), ((0.5, 0.47, 0.03, 0.0), 2)])
def test_points_that_a_generator_leaves_out(shares, expected):
    """Those with 5% of the samples near them; samples that are near none count for none."""
    points = data.load("four_points")

    def sample(key, state, count):
        del state
        which = jax.random.choice(key, 4, (count,), p=jnp.array(shares))
        near = jnp.eye(4)[which] * jnp.where(jnp.arange(count) % 2 == 0, 0.9, 0.3)[:, None]
        return near.reshape(count, 2, 2)

    method = Method("given", None, None, sample)
    estimators = [synthetic.SampledPoints()]
    report = avb_jax.evaluate(method, State(jnp.zeros(()), None, None, None), points, estimators, quiet=True)
    assert report["points", "generated"].mean == expected
