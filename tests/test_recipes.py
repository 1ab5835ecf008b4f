"""What the experiments report of a trained model, on one whose numbers are all known.

The decoder makes the same pixels whatever z, and q(z|x) = N(1, 0.5^2) whatever x: log p(x), the ELBO, both KLs and every error
of a pixel are closed forms.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import linen as nn

from avb_jax import Bernoulli, Model, Players, Posterior, StandardNormal, State, data
from avb_jax.methods import vae
from experiments import celeba, mnist, synthetic

LOGITS = np.random.default_rng(0).choice([-2.0, 2.0], (16, 16)).astype(np.float32)
X = np.random.default_rng(1).integers(0, 2, (400, 16, 16)).astype(np.float32)
P = 1 / (1 + np.exp(-np.float64(LOGITS)))
LOG_P = np.mean(np.sum(X * np.log(P) + (1 - X) * np.log(1 - P), axis=(1, 2)))
KL = 0.5 * (1 + 0.25 - 1 - 2 * np.log(0.5))
RMSE = np.sqrt(np.mean((P - X) ** 2))


class Aside(nn.Module):
    """Q(z|x) = N(1, 0.5^2)."""

    def __call__(self, x, noise):
        mean = jnp.ones((len(x), 1))
        return Posterior(mean + 0.5 * noise, mean, 0.5 * mean, gaussian=True)


class Constant(nn.Module):
    """The same pixels whatever z."""

    def __call__(self, z):
        return jnp.broadcast_to(jnp.asarray(LOGITS), (len(z), 16, 16))[..., None]


MODEL = Model(Players(Aside(), Constant(), None), StandardNormal(1), Bernoulli(), 1)
STATE = State(jnp.zeros((), jnp.int32), Players({}, {}), Players(), Players({}, {}, {}), None)
OPTIONS = {"samples": 8000, "draws": 2, "chunk": 100, "importance_images": 400, "importance_samples": 32}
CONFIG = ml_collections.ConfigDict(
    {"seed": 0, "num_seeds": 1, "latent_dim": 1, "data": {"binarize": "none"}, "evaluation": OPTIONS}
)


def test_the_synthetic_recipe():
    points = data.from_arrays(X[:4])
    numbers = synthetic.evaluate(vae, MODEL, STATE, points, CONFIG, 0)
    assert not any(reason for _, reason in numbers.values())
    found = {quantity: value for quantity, (value, _) in numbers.items()}
    log_p = np.mean(np.sum(X[:4] * np.log(P) + (1 - X[:4]) * np.log(1 - P), axis=(1, 2)))
    assert found["log_likelihood"] == pytest.approx(log_p, abs=1e-3)
    assert found["elbo"] == pytest.approx(log_p - KL, abs=1e-3)
    assert found["elbo_knn"] == pytest.approx(log_p - KL, abs=0.1)
    assert found["reconstruction_error"] == pytest.approx(-log_p, abs=1e-3)
    assert found["reconstruction_error_per_pixel"] == pytest.approx(-log_p / 256, abs=1e-5)
    assert found["kl_aggregated_posterior"] == pytest.approx(KL, abs=0.1)
    assert found["kl_aggregated_posterior_quadrature"] == pytest.approx(KL, abs=1e-3)
    assert found["reconstruction_rmse"] == pytest.approx(np.sqrt(np.mean((P - X[:4]) ** 2)), rel=1e-4)


def test_the_mnist_recipe():
    digits, states = data.from_arrays(X[:10], X), STATE._replace(step=jnp.zeros(1, jnp.int32))
    found = {quantity: number["mean"] for quantity, number in mnist.evaluate(vae, MODEL, states, digits, CONFIG).items()}
    assert found["elbo"] == pytest.approx(LOG_P - KL, abs=1e-3)
    assert found["reconstruction_error"] == pytest.approx(-LOG_P, abs=1e-3)
    assert found["reconstruction_rmse"] == pytest.approx(RMSE, rel=1e-4)
    assert LOG_P - 0.5 < found["log_likelihood"] < LOG_P + 0.05  # 32 draws from a proposal that is not the posterior
    assert found["kl"] == pytest.approx(KL, abs=1e-4)
    assert found["kl_aggregated_posterior"] == pytest.approx(KL, abs=0.4)  # by 400 codes
    assert 1 < found["effective_sample_size"] < 32


def test_the_faces_recipe():
    faces = data.from_arrays(X[:10], X)
    found, protocol = celeba.evaluate(jax.random.key(0), vae, MODEL, STATE, faces, CONFIG, 40, None)
    images = X[:40]
    log_p = np.mean(np.sum(images * np.log(P) + (1 - images) * np.log(1 - P), axis=(1, 2)))
    assert found["elbo"] == pytest.approx(log_p - KL, abs=1e-3)
    assert found["kl"] == pytest.approx(KL, abs=1e-4)
    assert found["reconstruction_rmse"] == pytest.approx(np.sqrt(np.mean((P - images) ** 2)), rel=1e-4)
    assert found["ms_ssim"] == pytest.approx(1.0, abs=1e-4)  # all samples are one
    assert found["sliced_wasserstein_16"] > 100
    assert protocol == ""
