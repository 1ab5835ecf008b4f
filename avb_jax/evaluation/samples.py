"""What any method is compared by, likelihood or not: its samples, and its reconstructions where it has an encoder."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np

from avb_jax.data.dataset import to_pixels
from avb_jax.evaluation import image_quality
from avb_jax.evaluation.estimator import Estimator, Number, mean
from avb_jax.method import Method
from avb_jax.models import images_of
from avb_jax.settings import check_counts
from avb_jax.streams import stream
from avb_jax.types import Array, State, UserError

AT_ONCE = 100


def draw_samples(key: Array, method: Method, state: State, count: int, clip: bool = True) -> np.ndarray:
    """Means of p(x|z) at z ~ p(z) [count, *x], the samples of a model, clipped to [0, 1] as images are unless `clip` is off."""
    generate = jax.jit(lambda key, state: method.sample(key, state, AT_ONCE))
    keys = jax.random.split(stream(key, "samples"), -(-count // AT_ONCE))
    drawn = np.concatenate([np.asarray(generate(k, state)) for k in keys])[:count]
    return np.clip(drawn, 0.0, 1.0) if clip else drawn


def as_pixels(images: np.ndarray) -> np.ndarray:
    """Stored images as pixels in [0, 1], not binarised."""
    return np.asarray(to_pixels(jax.random.key(0), np.asarray(images), "none"))


def _in_unit_interval(images: np.ndarray) -> bool:
    return bool(images.min() >= 0 and images.max() <= 1)


@dataclasses.dataclass(frozen=True)
class SampleDistance(Estimator):
    """Sliced Wasserstein distance times 1,000 of samples to as many examples, in pixels (Rabin et al. 2011).

    Samples are clipped to [0, 1] where the examples are in it.

    Attributes:
      images: how many examples there are to compare with; all where it is None.
      count: of samples, at most as many as there are examples.
      repeat: whether few examples, such as the four points, are repeated to `count`.

    Raises:
      UserError: a count below 1.
    """

    count: int = 2000
    repeat: bool = False

    name: ClassVar[str] = "samples"
    requires: ClassVar[tuple[str, ...]] = ("sample",)

    def __post_init__(self):
        check_counts(count=self.count, images=self.images)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        examples = subject.examples[: self.images]
        count = self.count if self.repeat else min(len(examples), self.count)
        if self.repeat:
            images = np.repeat(np.asarray(subject.x())[: self.images], -(-count // len(examples)), axis=0)
        else:
            images = as_pixels(examples[:count])
        drawn = draw_samples(subject.key, subject.method, subject.state, count, clip=_in_unit_interval(images))
        flat = (np.asarray(a, np.float32).reshape(len(a), -1) for a in (drawn, images))
        distance = 1000.0 * image_quality.sliced_wasserstein(*flat)
        return {("sliced_wasserstein", "pixels"): Number(distance)}


@dataclasses.dataclass(frozen=True)
class ReconstructionError(Estimator):
    """Root mean squared error of a pixel, of images decoded from one draw of z per example (`models.images_of`).

    Attributes:
      chunk: examples at once; which draws an example gets follows from it.
      repeats: draws per example.

    Raises:
      UserError: a count below 1.
    """

    repeats: int = 1

    name: ClassVar[str] = "reconstructions"
    requires: ClassVar[tuple[str, ...]] = ("encode", "decode")

    def __post_init__(self):
        check_counts(chunk=self.chunk, images=self.images, repeats=self.repeats)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        method = subject.method

        @jax.jit
        def squares(key: Array, state: State, images: Array) -> Array:
            data_key, z_key = jax.random.split(key)
            x = to_pixels(data_key, images, subject.binarize)
            return (images_of(stream(key, "images"), method.decode(state, method.encode(z_key, state, x).z)) - x) ** 2

        total, key = 0.0, stream(subject.key, "reconstructions")
        images = np.repeat(subject.examples[: self.images], self.repeats, axis=0)
        for i, start in enumerate(range(0, len(images), self.chunk)):
            chunk = np.asarray(images[start : start + self.chunk])
            total += float(np.sum(squares(jax.random.fold_in(key, i), subject.state, chunk)))
        return {("reconstruction_rmse", "pixels"): Number(float(np.sqrt(total / np.prod(images.shape))))}


@dataclasses.dataclass(frozen=True)
class ImageQuality(Estimator):
    """Samples against as many test images: MS-SSIM of pairs, sliced Wasserstein distances by level, a Frechet distance.

    Attributes:
      images: of samples and of test images.
      features: images [B, ...] -> features [B, F] of the user's own, for a Frechet distance; None for none.

    Raises:
      UserError: fewer than 2 images.
    """

    images: int | None = 2000
    features: Callable | None = None

    name: ClassVar[str] = "image_quality"
    requires: ClassVar[tuple[str, ...]] = ("sample",)

    def __post_init__(self):
        check_counts(2, images=self.images)

    def run(self, subject) -> dict[tuple[str, str], Number]:
        test = as_pixels(subject.examples[: self.images])
        if test.ndim not in (3, 4):
            raise UserError(f"examples of shape {test.shape[1:]}: image quality needs images [H, W] or [H, W, C]")
        if not _in_unit_interval(test):
            raise UserError(f"examples from {test.min():g} to {test.max():g}: image quality needs pixels in [0, 1]")
        half = len(test) // 2
        samples = draw_samples(subject.key, subject.method, subject.state, len(test))
        similarity = image_quality.ms_ssim(samples[:half], samples[half : 2 * half])
        numbers = {("ms_ssim", "samples"): mean(similarity)}
        for level, distance in image_quality.pyramid_distances(samples, test).items():
            numbers["sliced_wasserstein", f"{level}"] = Number(distance)
        if self.features is not None:
            frechet = image_quality.frechet_distance(samples, test, self.features)
            subject.note(f"Frechet distance: {frechet.protocol}")
            numbers["frechet_distance", "features"] = Number(frechet.distance)
        return numbers
