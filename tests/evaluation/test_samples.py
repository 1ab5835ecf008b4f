"""Numbers of samples and reconstructions, for methods with a likelihood and without, on a model whose pixels are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avb_jax import Method, Posterior, State, UserError
from avb_jax.data import Dataset, from_arrays
from avb_jax.distributions import bernoulli, normal, standard_normal
from avb_jax.evaluation import ImageQuality, ReconstructionError, SampleDistance, image_quality
from avb_jax.evaluation.run import evaluate
from avb_jax.evaluation.samples import as_pixels, draw_samples
from tests.conftest import small_method
from tests.evaluation.common import KEY

LOGITS = np.random.default_rng(0).choice([-2.0, 2.0], (16, 16)).astype(np.float32)
P = 1 / (1 + np.exp(-np.float64(LOGITS)))
X = np.random.default_rng(1).integers(0, 2, (60, 16, 16)).astype(np.float32)
STATE = State(jnp.zeros((), jnp.int32), {}, None, None)


def constant() -> Method:
    """The same pixels whatever z, and q(z|x) = N(1, 0.5^2)."""
    prior = standard_normal(1)

    def decode(state, z):
        return bernoulli(jnp.broadcast_to(jnp.asarray(LOGITS), (len(z), 16, 16))[..., None])

    def encode(key, state, x, draws=None):
        return Posterior(1.0 + 0.5 * jax.random.normal(key, (len(x), 1)))

    def sample(key, state, count):
        return decode(state, prior.sample(key, (count,))).mean

    return Method("constant", None, None, sample, prior, encode, decode)


def report(*estimators, method=None, data=X):
    return evaluate(method or constant(), STATE, data, estimators, quiet=True)


def test_reconstructions():
    """The root of the mean square over all pixels of all examples; and in parts."""
    expected = np.sqrt(np.mean((P - X) ** 2))
    for estimator in (ReconstructionError(), ReconstructionError(chunk=7), ReconstructionError(repeats=3)):
        number = report(estimator)["reconstruction_rmse", "pixels"]
        assert number.mean == pytest.approx(expected, rel=1e-4)
    few = report(ReconstructionError(images=10))["reconstruction_rmse", "pixels"]
    assert few.mean == pytest.approx(np.sqrt(np.mean((P - X[:10]) ** 2)), rel=1e-4)


def test_reconstructions_of_binarised_images():
    """What the decoder is compared with is x as the networks see it."""
    data = from_arrays(np.full((40, 16, 16), 0.5, np.float32), binarize="dynamic")
    number = report(ReconstructionError(), data=data)["reconstruction_rmse", "pixels"]
    assert number.mean == pytest.approx(np.sqrt(np.mean((P**2 + (1 - P) ** 2) / 2)), rel=0.02)


def test_reconstructions_are_decoded_from_draws():
    """p(x|z) = N(z, 1), q(z|x) = N(x, 0.5^2): the error is the draws'."""

    def encode(key, state, x, draws=None):
        return Posterior(x + 0.5 * jax.random.normal(key, x.shape))

    method = Method("noisy", None, None, None, standard_normal(3), encode, lambda state, z: normal(z, 1.0))
    x = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    number = evaluate(method, STATE, x, [ReconstructionError()], quiet=True)["reconstruction_rmse", "pixels"]
    assert number.mean == pytest.approx(0.5, rel=0.05)


def test_distance_of_samples():
    """To as many examples, in pixels as they are stored, times 1,000; and of few examples that are repeated."""
    number = report(SampleDistance(count=40))["sliced_wasserstein", "pixels"]
    flat = np.float32(np.repeat(P[None], 40, axis=0)).reshape(40, -1)
    expected = 1000 * image_quality.sliced_wasserstein(flat, X[:40].reshape(40, -1))
    assert number.mean == pytest.approx(expected, rel=1e-3)
    whole = report(SampleDistance())["sliced_wasserstein", "pixels"]  # there are only 60 examples
    flat = np.float32(np.repeat(P[None], 60, axis=0)).reshape(60, -1)
    assert whole.mean == pytest.approx(1000 * image_quality.sliced_wasserstein(flat, X.reshape(60, -1)), rel=1e-3)
    repeated = report(SampleDistance(count=80, repeat=True), data=X[:4])["sliced_wasserstein", "pixels"]
    assert repeated.mean == pytest.approx(report(SampleDistance(), data=X[:4])["sliced_wasserstein", "pixels"].mean, rel=1e-3)
    few = report(SampleDistance(images=40))["sliced_wasserstein", "pixels"]
    assert few.mean == pytest.approx(number.mean, rel=1e-6)
    bytes_ = Dataset(np.uint8(255 * X), np.uint8(255 * X), binarize="dynamic")
    assert report(SampleDistance(count=40), data=bytes_)["sliced_wasserstein", "pixels"].mean == pytest.approx(
        number.mean, rel=1e-3
    )


def test_distance_of_samples_that_are_no_images():
    """Of numbers outside [0, 1], samples are not clipped."""
    x = np.float32(5 * np.random.default_rng(0).standard_normal((300, 3)))
    method = constant()._replace(sample=lambda key, state, count: 5 * jax.random.normal(key, (count, 3)))
    assert report(SampleDistance(), method=method, data=x)["sliced_wasserstein", "pixels"].mean < 1000


def test_quality_of_images():
    """All samples are one: an MS-SSIM of 1 and far from the examples; the Frechet distance is with the user's features."""

    def features(images):
        return images.reshape(len(images), -1)[:, :2]

    found = report(ImageQuality(images=40, features=features))
    similarity = found["ms_ssim", "samples"]
    assert similarity.mean == pytest.approx(1.0, abs=1e-4)
    assert similarity.examples == 20
    assert found["sliced_wasserstein", "16"].mean > 100
    covariance = np.cov(X[:40].reshape(40, -1)[:, :2].T)
    means = P.ravel()[:2] - X[:40].reshape(40, -1)[:, :2].mean(axis=0)
    assert found["frechet_distance", "features"].mean == pytest.approx(means @ means + np.trace(covariance), rel=1e-3)
    (note,) = found.notes
    assert note.startswith("constant: Frechet distance: 40 samples against 40 test images of 16x16, 2 features of")
    assert ("frechet_distance", "features") not in report(ImageQuality(images=40))


def test_quality_of_what_are_no_images():
    with pytest.raises(UserError, match=r"examples of shape \(256,\): image quality needs images \[H, W\] or \[H, W, C\]"):
        report(ImageQuality(images=10), data=X.reshape(60, -1))
    with pytest.raises(UserError, match=r"examples from -1 to 1: image quality needs pixels in \[0, 1\]"):
        report(ImageQuality(images=10), data=2 * X - 1)


def test_samples_are_drawn_anew_and_clipped():
    """The same key gives the same samples, however many; they are means of p(x|z) at separate z."""
    method = constant()._replace(sample=lambda key, state, count: 2 * jax.random.normal(key, (count, 3)))
    many, few = (draw_samples(KEY, method, STATE, count) for count in (250, 30))
    np.testing.assert_array_equal(many[:30], few)
    assert many.shape == (250, 3)
    assert (many.min(), many.max()) == (0.0, 1.0)
    inside = many[(many > 0) & (many < 1)]
    assert len(np.unique(inside)) == len(inside) > 100


def test_pixels_of_stored_images():
    np.testing.assert_allclose(as_pixels(np.array([[0, 51, 255]], np.uint8)), [[0.0, 0.2, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(as_pixels(np.array([[0.0, 0.2]], np.float32)), np.array([[0.0, 0.2]], np.float32))


def test_what_they_need():
    for name in ("avb", "gan"):
        assert SampleDistance().lacks(small_method(name)) == ImageQuality().lacks(small_method(name)) == ""
    assert ReconstructionError().lacks(small_method("bigan")) == ""
    assert ReconstructionError().lacks(small_method("gan")) == "has no encoder"
    for make, message in (
        (lambda: SampleDistance(count=0), "count=0: must be at least 1"),
        (lambda: ReconstructionError(repeats=0), "repeats=0: must be at least 1"),
        (lambda: ReconstructionError(chunk=0), "chunk=0: must be at least 1"),
        (lambda: ImageQuality(images=1), "images=1: must be at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            make()
