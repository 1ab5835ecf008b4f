"""How samples differ from images, without a network to download: sliced Wasserstein distance, MS-SSIM; Frechet with your own.

Images are [N, H, W] or [N, H, W, C], pixels in [0, 1]. Host side, NumPy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
import scipy.linalg

from avb_jax.types import UserError

SMALLEST = 16  # pixels of the pyramid's last level
PATCH, PATCHES = 7, 64  # a descriptor's side, and how many are taken from an image and level
PROJECTIONS = 512
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik (2003)
_BINOMIAL = np.array([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, projections: int = PROJECTIONS, seed: int = 0, order: int = 1) -> float:
    """Wasserstein distance of samples a [n, d] and b [m, d], averaged over random directions (Rabin et al. 2011).

    The average is of the distance's power `order`, of which then the root is taken.
    """
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    # Along a direction it is the integral of the two quantile functions' difference, which are constant between these ends.
    ends = np.union1d(np.arange(len(a) + 1) / len(a), np.arange(len(b) + 1) / len(b))
    ranks_a, ranks_b = (((ends[1:] + ends[:-1]) / 2 * len(x)).astype(int) for x in (a, b))
    total = 0.0
    for part in np.array_split(directions, max(1, projections // 32), axis=1):
        one, two = np.sort(a @ part, axis=0)[ranks_a], np.sort(b @ part, axis=0)[ranks_b]
        total += np.sum(np.diff(ends) @ np.abs(one - two) ** order)
    return float((total / projections) ** (1 / order))


def pyramid_distances(samples: np.ndarray, images: np.ndarray, seed: int = 0) -> dict[int, float]:
    """Sliced Wasserstein distance times 1,000 of 7x7 patches, per level of a Laplacian pyramid (Karras et al. 2018, section 5).

    It is not 0 for samples of the images' own law, but falls with the number of patches, so that only distances from as many
    images compare. Karras et al. take 128 patches from each of 16,384 images, here 64 are taken from each that is given.

    Args:
      samples: [n, H, W, ...].
      images: [m, H, W, ...].
      seed: of patches and directions.

    Returns:
      By the level's height in pixels, from the images' own down to 16: how far fine and coarse structure is off.
    """
    _check(samples, images)
    rng = np.random.default_rng(seed)
    levels = zip(_laplacian_pyramid(_with_channels(samples)), _laplacian_pyramid(_with_channels(images)), strict=True)
    return {a.shape[1]: 1000.0 * sliced_wasserstein(_descriptors(a, rng), _descriptors(b, rng), seed=seed) for a, b in levels}


def ms_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity [N] of image pairs [N, H, W, ...] (Wang, Simoncelli & Bovik 2003); 1 for equal ones.

    Averaged over pairs of samples it falls with their variety (Odena et al. 2017). Scales that an image is too small for, of
    less than 4 pixels, are left out, and the weights of the others scaled to sum to 1.

    Raises:
      UserError: images of different or wrong shapes, or of less than 4 pixels in height or width.
    """
    _check(a, b)
    if min(np.shape(a)[1:3]) < 4:
        raise UserError(f"images of {np.shape(a)[1]}x{np.shape(a)[2]} pixels: MS-SSIM needs at least 4x4")
    a, b = _with_channels(a).astype(np.float64), _with_channels(b).astype(np.float64)
    scales = min(len(MS_SSIM_WEIGHTS), 1 + int(math.log2(min(a.shape[1:3]) / 4)))
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    result = np.ones(len(a))
    for i, weight in enumerate(weights):
        luminance, contrast = _ssim_terms(a, b)
        term = luminance * contrast if i == scales - 1 else contrast
        result *= np.maximum(term, 0.0) ** weight
        a, b = (_halved(x) for x in (a, b))
    return result


class Frechet(NamedTuple):
    """A Frechet distance with how it was measured, without which it cannot be compared."""

    distance: float
    protocol: str


def frechet_distance(
    samples: np.ndarray, images: np.ndarray, features: Callable[[np.ndarray], np.ndarray], batch: int = 100
) -> Frechet:
    """Frechet distance of Gaussians fitted to features of samples and of images (Heusel et al. 2017).

    Args:
      samples: [n, H, W, ...].
      images: [m, H, W, ...].
      features: the network, images [B, H, W, ...] in [0, 1] -> [B, d]; with Inception's pool3 this is the FID.
      batch: images per call of it.

    Raises:
      UserError: fewer than 2 samples or images; features that are not [B, d], or not finite.
    """
    _check(samples, images)
    if min(len(samples), len(images)) < 2:
        raise UserError(f"{len(samples)} samples and {len(images)} images: a covariance needs at least 2 of each")
    one, two = (_features(features, x, batch) for x in (samples, images))
    means = one.mean(axis=0) - two.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, two)]
    # The trace of the root of a product of positive matrices is that of their eigenvalues' roots.
    eigenvalues = scipy.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sum(np.sqrt(np.maximum(eigenvalues.real, 0.0)))
    distance = float(means @ means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * root)
    name = getattr(features, "__qualname__", type(features).__name__)
    sizes = f"{len(samples):,} samples against {len(images):,} test images of {'x'.join(map(str, images.shape[1:]))}"
    return Frechet(distance, f"{sizes}, {one.shape[1]} features of {getattr(features, '__module__', '?')}.{name}")


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if np.shape(a)[1:] != np.shape(b)[1:] or np.ndim(a) not in (3, 4):
        raise UserError(f"images of shapes {np.shape(a)} and {np.shape(b)}; give [N, H, W] or [N, H, W, C] of one size")


def _with_channels(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, np.float32)
    return images if images.ndim == 4 else images[..., None]


def _smoothed(images: np.ndarray, gain: float = 1.0) -> np.ndarray:
    for axis in (1, 2):
        images = scipy.ndimage.convolve1d(images, gain * _BINOMIAL, axis=axis, mode="mirror")
    return images


def _laplacian_pyramid(images: np.ndarray) -> list[np.ndarray]:
    """Differences between neighbouring scales (Burt & Adelson 1983), and the last scale itself."""
    levels = []
    while min(images.shape[1:3]) // 2 >= SMALLEST and not (images.shape[1] % 2 or images.shape[2] % 2):
        coarse = _smoothed(images)[:, ::2, ::2]
        spread = np.zeros_like(images)
        spread[:, ::2, ::2] = coarse
        levels.append(images - _smoothed(spread, gain=2.0))
        images = coarse
    return [*levels, images]


def _descriptors(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random patches [N * PATCHES, PATCH^2 C], each channel with mean 0 and standard deviation 1 over all of them."""
    count, height, width, channels = images.shape
    side = min(PATCH, height, width)
    top = rng.integers(0, height - side + 1, (count, PATCHES, 1, 1))
    left = rng.integers(0, width - side + 1, (count, PATCHES, 1, 1))
    rows, columns = top + np.arange(side)[:, None], left + np.arange(side)
    patches = images[np.arange(count)[:, None, None, None], rows, columns]
    # In float32 NumPy's sums over several channels lose digits: of 4,000 images the deviation came out 1.3 percent too small.
    patches -= patches.mean(axis=(0, 1, 2, 3), dtype=np.float64)
    patches /= np.sqrt(np.mean(np.square(patches), axis=(0, 1, 2, 3), dtype=np.float64)) + 1e-8
    return patches.reshape(count * PATCHES, side * side * channels)


def _ssim_terms(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM's luminance and contrast-structure terms [N], averaged over pixels and channels."""
    size = min(11, *a.shape[1:3])
    offsets = np.arange(size) - (size - 1) / 2.0
    window = np.exp(-0.5 * (offsets / (1.5 * size / 11.0)) ** 2)
    window /= window.sum()
    margin = (size - 1) // 2, size // 2

    def average(x: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            x = scipy.ndimage.convolve1d(x, window, axis=axis, mode="nearest")
        return x[:, margin[0] : x.shape[1] - margin[1], margin[0] : x.shape[2] - margin[1]]

    mean_a, mean_b = average(a), average(b)
    variances, covariance = average(a * a + b * b) - mean_a**2 - mean_b**2, average(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast = (2.0 * covariance + c2) / (variances + c2)
    return luminance.mean(axis=(1, 2, 3)), contrast.mean(axis=(1, 2, 3))


def _halved(images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1] // 2 * 2, images.shape[2] // 2 * 2
    images = images[:, :height, :width]
    return images.reshape(len(images), height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))


def _features(features: Callable, images: np.ndarray, batch: int) -> np.ndarray:
    parts = [np.asarray(features(images[i : i + batch]), np.float64) for i in range(0, len(images), batch)]
    for i, part in enumerate(parts):
        expected = len(images[i * batch : (i + 1) * batch])
        if part.ndim != 2 or len(part) != expected or not np.isfinite(part).all():
            raise UserError(f"features: returned shape {part.shape} for {expected} images; give finite numbers [B, d]")
    return np.concatenate(parts)
