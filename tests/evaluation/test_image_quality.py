"""Image quality against closed forms, and in the directions that it must move."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.special
import scipy.stats

from avb_jax import UserError
from avb_jax.data import faces
from avb_jax.evaluation import image_quality
from avb_jax.evaluation.image_quality import frechet_distance, ms_ssim, pyramid_distances, sliced_wasserstein

RNG = np.random.default_rng(0)


def drawn(count, seed=0):
    return faces.draw(count, 64, seed).astype(np.float32) / 255.0


def test_sliced_wasserstein_of_a_shift():
    """Of equal laws shifted by m it is |m| E|u_1|, u uniform on the sphere: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))."""
    a, shift = RNG.standard_normal((2000, 10)).astype(np.float32), np.zeros(10, np.float32)
    shift[3] = 2.0
    expected = 2.0 * np.exp(scipy.special.gammaln(5.0) - scipy.special.gammaln(5.5)) / np.sqrt(np.pi)
    assert abs(sliced_wasserstein(a, a + shift, projections=4000) - expected) < 0.02
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, RNG.permutation(a)) < 1e-6
    more = RNG.standard_normal((5000, 10)).astype(np.float32)
    assert sliced_wasserstein(a, more) < 0.05  # of unequal sizes


def plain_sliced_wasserstein(a, b, projections, seed):
    """Direction by direction, with SciPy's distance of two samples on a line."""
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.sqrt(np.sum(directions**2, axis=0))
    return np.mean([scipy.stats.wasserstein_distance(a @ u, b @ u) for u in directions.T])


@pytest.mark.parametrize("count", [40, 60, 17])
def test_sliced_wasserstein_against_scipy(count):
    a, b = RNG.standard_normal((40, 5)), RNG.standard_normal((count, 5)) * 2 + 1
    for projections in (3, 70):  # one part, and parts of different sizes
        np.testing.assert_allclose(
            sliced_wasserstein(a, b, projections, seed=4), plain_sliced_wasserstein(a, b, projections, 4), rtol=1e-5
        )


def plain_pyramid(images):
    """As Karras et al. (2018) publish it: one filter in the plane, which upsampling has four times."""
    plane = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[None, :, :, None] / 256.0
    levels = [images.astype(np.float64)]
    while levels[-1].shape[1] // 2 >= 16:
        coarse = scipy.ndimage.convolve(levels[-1], plane, mode="mirror")[:, ::2, ::2]
        spread = np.zeros_like(levels[-1])
        spread[:, ::2, ::2] = coarse
        levels[-1] = levels[-1] - scipy.ndimage.convolve(spread, 4 * plane, mode="mirror")
        levels.append(coarse)
    return levels


def test_pyramid_distances_against_the_published_formulas():
    """Level by level, with the patches given; what a patch is, and its normalisation, is the next test's."""
    a, b = drawn(6, 3), np.clip(drawn(6, 4) + 0.05 * RNG.standard_normal((6, 64, 64, 3)), 0, 1).astype(np.float32)
    rng, levels = np.random.default_rng(5), {}
    for one, two in zip(plain_pyramid(a), plain_pyramid(b), strict=True):
        patches = [image_quality._descriptors(x, rng) for x in (one, two)]
        levels[one.shape[1]] = 1000 * plain_sliced_wasserstein(*patches, image_quality.PROJECTIONS, 5)
    ours = pyramid_distances(a, b, seed=5)
    assert list(ours) == list(levels) == [64, 32, 16]
    np.testing.assert_allclose(list(ours.values()), list(levels.values()), rtol=1e-4)


def test_descriptors_are_patches_with_mean_0_and_deviation_1():
    """Of images that hold their row, column and number, so that a patch says where it is from."""
    count, height, width = 200, 18, 24
    number, row, column = np.meshgrid(*map(np.arange, (count, height, width)), indexing="ij")
    images = np.stack([row, column, number / count], axis=-1).astype(np.float32)
    patches = image_quality._descriptors(images, np.random.default_rng(0))
    assert patches.shape == (count * image_quality.PATCHES, 7 * 7 * 3)
    assert patches.dtype == np.float32
    patches = patches.reshape(count, image_quality.PATCHES, 7, 7, 3).astype(np.float64)
    np.testing.assert_allclose(patches.mean(axis=(0, 1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(patches.std(axis=(0, 1, 2, 3)), 1, atol=1e-6)  # float32 sums are off by 1e-4 here
    for channel, axis, size in ((0, 2, height), (1, 3, width)):
        first = np.take(patches[..., channel], 0, axis=axis)
        step = (first.max() - first.min()) / (size - 7)  # the patches reach both ends
        np.testing.assert_allclose(np.diff(patches[..., channel], axis=axis), step, rtol=1e-4)
        np.testing.assert_allclose(np.diff(patches[..., channel], axis=5 - axis), 0, atol=1e-5)
        start = np.round((first - first.min()) / step).astype(int).reshape(-1, 7)[:, 0]
        assert scipy.stats.chisquare(np.bincount(start, minlength=size - 6)).pvalue > 1e-4  # uniform
    of_image = patches[..., 2].reshape(count, -1)
    np.testing.assert_allclose(of_image, of_image[:, :1] * np.ones(7 * 7 * image_quality.PATCHES), atol=1e-6)
    assert np.all(np.diff(of_image[:, 0]) > 0)


def test_the_pyramid_adds_up_to_the_image():
    images = RNG.random((2, 64, 64, 3)).astype(np.float32)
    levels = image_quality._laplacian_pyramid(images)
    assert [level.shape[1] for level in levels] == [64, 32, 16]
    rebuilt = levels[-1]
    for level in reversed(levels[:-1]):
        spread = np.zeros_like(level)
        spread[:, ::2, ::2] = rebuilt
        rebuilt = level + image_quality._smoothed(spread, gain=2.0)
    np.testing.assert_allclose(rebuilt, images, atol=1e-5)
    flat = image_quality._laplacian_pyramid(np.full((1, 64, 64, 1), 0.3, np.float32))
    np.testing.assert_allclose(flat[0], 0, atol=1e-6)
    np.testing.assert_allclose(flat[-1], 0.3, atol=1e-6)


def test_descriptors_are_patches_standardised_by_channel():
    """7x7 pixels of its own image each, less the channel's mean over all patches and divided by its deviation.

    Pixel values number the pixels, so that a patch shows where it was taken.
    """
    numbers = np.arange(3 * 16 * 20).reshape(3, 16, 20, 1)
    images = (numbers * np.array([0.1, 3.0, 40.0]) + np.array([0.0, 5.0, -2.0])).astype(np.float32)
    found = image_quality._descriptors(images, np.random.default_rng(3)).reshape(3, image_quality.PATCHES, 7, 7, 3)
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(found.std(axis=(0, 1, 2, 3)), 1, rtol=1e-3)
    step = found[0, 0, 0, 1, 0] - found[0, 0, 0, 0, 0]
    patches = np.round((found - found.min()) / step).astype(int)  # the first pixel that was taken is 0
    np.testing.assert_array_equal(patches - patches[:, :, :1, :1], np.broadcast_to(numbers[0, :7, :7], found.shape))
    image, row, column = np.unravel_index(patches[:, :, 0, 0, 0], (3, 16, 20))
    assert (image == np.arange(3)[:, None]).all()
    assert (row.min(), row.max(), column.min(), column.max()) == (0, 9, 0, 13)  # all places, the last ones too


@pytest.mark.slow
def test_pyramid_distances_of_fine_and_of_coarse_changes():
    """Noise harms the fine levels, a change of layout the coarse ones; a second draw of the same law neither."""
    images, same = drawn(300, 0), drawn(300, 1)
    noisy = np.clip(same + 0.1 * RNG.standard_normal(same.shape), 0, 1).astype(np.float32)
    floor, noise = (pyramid_distances(other, images) for other in (same, noisy))
    assert set(floor) == {64, 32, 16}
    assert noise[64] > 4 * floor[64]
    assert noise[16] < noise[64] / 2
    upside_down = pyramid_distances(same[:, ::-1], images)
    assert upside_down[16] > 1.5 * floor[16]
    assert pyramid_distances(RNG.random((20, 28, 28)), RNG.random((20, 28, 28))).keys() == {28}


def test_ms_ssim():
    images = drawn(8)
    np.testing.assert_allclose(ms_ssim(images, images), 1, atol=1e-6)
    little, much = (ms_ssim(images, np.clip(images + s * RNG.standard_normal(images.shape), 0, 1)) for s in (0.03, 0.2))
    assert np.all(much < little)
    assert np.all(little < 1)
    assert ms_ssim(images, images[::-1]).mean() < 0.6
    assert ms_ssim(images[:, :8, :8, 0], images[:, :8, :8, 0]) == pytest.approx(1)


def test_ms_ssim_against_explicit_windows():
    """Wang, Simoncelli & Bovik (2003): contrast of every scale, luminance of the last, each to the scale's power; 3 scales."""
    a = RNG.random((2, 17, 22, 2))
    b = np.clip(a + 0.3 * RNG.standard_normal(a.shape), 0, 1)
    ours, expected, weights = ms_ssim(a, b), np.ones(2), np.array([0.0448, 0.2856, 0.3001])
    for scale, weight in enumerate(weights / weights.sum()):
        size = min(11, *a.shape[1:3])
        window = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * (1.5 * size / 11) ** 2))
        window = np.outer(window, window) / window.sum() ** 2
        x, y = (np.lib.stride_tricks.sliding_window_view(z, (size, size), axis=(1, 2)) for z in (a, b))
        mean_x, mean_y = (np.sum(window * z, axis=(-2, -1), keepdims=True) for z in (x, y))
        variances = np.sum(window * ((x - mean_x) ** 2 + (y - mean_y) ** 2), axis=(-2, -1))
        covariance = np.sum(window * (x - mean_x) * (y - mean_y), axis=(-2, -1))
        contrast = np.mean((2 * covariance + 9e-4) / (variances + 9e-4), axis=(1, 2, 3))
        luminance = np.mean((2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4), axis=(1, 2, 3, 4, 5))
        expected *= (contrast * luminance if scale == 2 else contrast) ** weight
        a, b = (z[:, : z.shape[1] // 2 * 2, : z.shape[2] // 2 * 2] for z in (a, b))
        a, b = (sum(z[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4 for z in (a, b))
    assert np.all((expected > 0.1) & (expected < 0.9))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_ms_ssim_has_up_to_five_scales():
    """Images that differ by a constant: contrast 1, so that only the last scale's power and luminance are in it."""
    for side, last in ((4, 1.0), (8, 0.2856 / 0.3304), (63, 0.2363 / 0.8668), (64, 0.1333), (200, 0.1333)):
        a = np.full((1, side, side), 0.2)
        np.testing.assert_allclose(ms_ssim(a, a + 0.4), ((0.24 + 1e-4) / (0.4 + 1e-4)) ** last, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 64), (64, 3)])
def test_ms_ssim_refuses_images_of_a_few_pixels(shape):
    images = RNG.random((3, *shape))
    with pytest.raises(UserError, match=f"images of {shape[0]}x{shape[1]} pixels: MS-SSIM needs at least 4x4"):
        ms_ssim(images, images)


def test_ssim_of_constant_images_by_hand():
    # Variances and covariance 0: contrast (c2) / (c2) = 1, luminance (2 ab + c1) / (a^2 + b^2 + c1) at the last scale alone.
    a, b = np.full((1, 64, 64), 0.2), np.full((1, 64, 64), 0.6)
    luminance = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    np.testing.assert_allclose(ms_ssim(a, b), luminance**0.1333, rtol=1e-4)


def test_frechet_distance_of_gaussians():
    """|m|^2 + tr(A + B - 2 (A B)^(1/2)), for features that are the pixels themselves."""
    spread = np.array([1.0, 2.0, 0.5, 1.5])
    a = RNG.standard_normal((20_000, 2, 2)).astype(np.float32)
    b = (RNG.standard_normal((20_000, 4)) * spread + 0.5).reshape(-1, 2, 2).astype(np.float32)

    def pixels(images):
        return images.reshape(len(images), -1)

    result = frechet_distance(a, b, pixels)
    np.testing.assert_allclose(result.distance, 4 * 0.25 + np.sum((spread - 1) ** 2), rtol=0.03)
    assert (
        "20,000 samples against 20,000 test images of 2x2, 4 features of tests.evaluation.test_image_quality" in result.protocol
    )
    assert abs(frechet_distance(a, a, pixels).distance) < 1e-6


def test_frechet_distance_by_hand():
    """|m|^2 + tr A + tr B - 2 tr (A B)^(1/2) of 7 and 5 correlated features, with SciPy's root of a matrix, in parts of 3."""
    a, b = RNG.standard_normal((7, 2, 2)), RNG.standard_normal((5, 2, 2)) * 1.5 + 0.5

    def two_features(images):
        return np.stack([images[:, 0, 0] + images[:, 0, 1], images[:, 1, 1] - images[:, 0, 0]], axis=1)

    one, two = two_features(a), two_features(b)
    cov_a, cov_b = ((x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) / (len(x) - 1) for x in (one, two))
    expected = np.sum((one.mean(axis=0) - two.mean(axis=0)) ** 2) + np.trace(cov_a + cov_b)
    expected -= 2 * np.trace(scipy.linalg.sqrtm(cov_a @ cov_b)).real
    np.testing.assert_allclose(frechet_distance(a, b, two_features, batch=3).distance, expected, rtol=1e-6)


def test_what_is_refused():
    images = RNG.random((10, 8, 8, 3))
    with pytest.raises(UserError, match="give finite numbers"):
        frechet_distance(images, images, lambda x: x)
    with pytest.raises(UserError, match="give finite numbers"):
        frechet_distance(images, images, lambda x: np.full((len(x), 2), np.nan))
    with pytest.raises(UserError, match="10 samples and 1 images: a covariance needs at least 2"):
        frechet_distance(images, images[:1], lambda x: x.reshape(len(x), -1))
    with pytest.raises(UserError, match="of one size"):
        ms_ssim(images, images[:, :4])
