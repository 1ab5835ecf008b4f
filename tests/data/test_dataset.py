"""Data sets: what is read, in which order, and what is refused."""

import gzip
import io
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from avb_jax import UserError, data
from avb_jax.data import idx, tfds
from avb_jax.data.dataset import batch_indices, from_arrays
from tests import prepared


def idx_bytes(array):
    """An IDX file's content, written by hand: two zeros, the type, the rank, the sizes, the numbers."""
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Two IDX files of 3 and 2 images of 4x5, the second one gzipped."""
    images = np.arange(3 * 20, dtype=np.uint8).reshape(3, 4, 5) * 4
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images[:2])))
    return tmp_path


def test_idx_files_round_trip(folder):
    mnist = data.load("mnist", str(folder), "dynamic")
    np.testing.assert_array_equal(mnist.train, np.arange(60, dtype=np.uint8).reshape(3, 4, 5) * 4)
    assert mnist.test.shape == (2, 4, 5)
    assert mnist.x_shape == (4, 5)


def test_missing_files_are_named(folder):
    with pytest.raises(UserError, match=r"data\.dir='': give the folder"):
        data.load("mnist")
    with pytest.raises(UserError, match=r"data\.dir=.*no such folder"):
        data.load("mnist", str(folder / "nowhere"))
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"holds no t10k-images-idx3-ubyte\[\.gz\]"):
        data.load("mnist", str(folder))


def test_damaged_files_are_named(folder):
    path = folder / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, message in [
        (whole[:-1], "59 bytes of data, its header promises 60"),
        (whole + b"\0", "more bytes of data, its header promises 60"),
        (whole[:10], "cut short within its header"),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, 2**16, 2**16, 2**8), "its header promises 1,099,511,627,776 bytes, more than"),
        (b"hello", "not an IDX file"),
        (b"", "not an IDX file"),
        (gzip.compress(whole)[:30], "cannot be read"),
        (idx_bytes(np.zeros(3, np.uint8)), r"uint8 of shape \(3,\), expected uint8 images"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            data.load("mnist", str(folder))


def test_embedded_sets():
    points = data.load("four_points")
    assert points.train.shape == (4, 2, 2)
    np.testing.assert_array_equal(points.train.sum((1, 2)), 1)
    digits = data.load("digits")
    assert digits.train.shape == (1498, 8, 8)
    assert digits.test.shape == (299, 8, 8)
    assert (digits.train.min(), digits.train.max()) == (0, 1)


def test_real_mnist(real_data):
    mnist = data.load("mnist", str(real_data / "mnist"))
    assert (mnist.train.shape, mnist.test.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert abs(mnist.train.mean() / 255 - 0.1307) < 1e-4  # the mean intensity that everyone normalises with


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((3, 4, 4), np.nan), "values from nan to nan; all must be finite"),
        (np.array([[1.0, np.inf]]), "values from 1 to inf; all must be finite"),
        (np.zeros((3,)), r"shape \(3,\)"),
        (np.zeros((0, 4, 4)), "non-empty"),
        ([np.zeros((2, 2)), np.zeros((3, 3))], "unequal shapes"),
        (np.full((3, 2), "a"), "dtype"),
        (np.zeros((3, 2), complex), "dtype complex128"),
    ],
)
def test_bad_arrays_are_named(images, message):
    with pytest.raises(UserError, match=f"mine: train.*{message}"):
        data.from_arrays(images, name="mine")


@pytest.mark.parametrize("values", [1.5, -0.1, 7])
def test_values_beyond_pixels_are_data_like_others_unless_they_are_to_be_binarised(values):
    """Which ones there may be is up to the likelihood."""
    examples = np.full((3, 4, 4), values)
    np.testing.assert_array_equal(data.from_arrays(examples).train, np.float32(examples))
    for binarize in ("dynamic", "threshold"):
        with pytest.raises(UserError, match=f"mine: test: values from {values:g} to {values:g}; to binarise them"):
            data.from_arrays(np.zeros((3, 4, 4)), examples, binarize, "mine")


def test_what_training_is_given_is_made_of_what_is_stored():
    """Scaled, binarised and mirrored by one key; the coin of mirroring has a stream of its own."""
    stored = np.random.default_rng(0).integers(0, 256, (50, 4, 6), np.uint8)
    key = jax.random.key(0)
    plain = data.from_arrays(stored, binarize="dynamic")
    drawn = plain.prepare(key, stored)
    np.testing.assert_array_equal(drawn, data.to_pixels(key, jnp.asarray(stored), "dynamic"))
    mirrored = np.asarray(plain._replace(flip=True).prepare(key, stored))
    turned = [(image == original[:, ::-1]).all() for image, original in zip(mirrored, np.asarray(drawn), strict=True)]
    kept = [(image == original).all() for image, original in zip(mirrored, np.asarray(drawn), strict=True)]
    assert np.all(np.array(turned) ^ np.array(kept))
    assert 10 < sum(turned) < 40
    np.testing.assert_allclose(data.from_arrays(stored).prepare(key, stored), stored / 255, rtol=1e-6)


def test_both_sides_are_scaled_alike():
    """Images of 0..255 next to blank ones, as uint8 both; numbers of 0 and 1 as uint8 are numbers where nothing is above 1."""
    images, blank = np.full((3, 2), 255, np.uint8), np.ones((3, 2), np.uint8)
    for train, test in ((images, blank), (blank, images)):
        found = data.from_arrays(train, test)
        x = [np.asarray(data.to_pixels(jax.random.key(0), jnp.asarray(side), "none")) for side in (found.train, found.test)]
        np.testing.assert_allclose(x, [train / 255, test / 255], rtol=1e-6)
    assert data.from_arrays(blank, blank).test.dtype == np.float32


KINDS = st.sampled_from([np.uint8, np.int16, np.int64, np.float16, np.float32, np.float64, bool, np.complex64, "U2"])
ARRAYS = KINDS.flatmap(lambda kind: hnp.arrays(kind, st.lists(st.integers(0, 3), max_size=3).map(tuple)))


@settings(deadline=None, max_examples=200)
@given(train=ARRAYS, how=st.sampled_from(["none", "dynamic", "threshold"]))
def test_whatever_is_given_is_refused_or_finite_in_float32(train, how):
    """And a test set on the scale of the training set: the same numbers on both sides stay the same."""
    try:
        found = data.from_arrays(train, train, how)
    except UserError:
        return
    x = [np.asarray(data.to_pixels(jax.random.key(0), jnp.asarray(side), how)) for side in (found.train, found.test)]
    assert x[0].dtype == np.float32
    assert np.isfinite(x[0]).all()
    np.testing.assert_array_equal(*x)
    assert x[0].shape == train.shape


def test_a_memory_mapped_array_stays_on_the_disk(tmp_path):
    """A training then reads it batch by batch."""
    for dtype in (np.uint8, np.float32):
        np.save(tmp_path / "x.npy", np.arange(24, dtype=dtype).reshape(6, 4))
        mapped = data.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"))
        assert isinstance(mapped.train, np.memmap)
        assert mapped.train.filename is not None


def test_arrays_of_any_honest_type():
    for images in (np.eye(4, dtype=bool), np.eye(4, dtype=np.int64), np.eye(4, dtype=np.uint8), np.eye(4)):
        dataset = data.from_arrays(images)
        np.testing.assert_array_equal(dataset.train, np.eye(4, dtype=np.float32))
        assert dataset.test is dataset.train
    with pytest.raises(UserError, match=r"test has examples of shape \(3,\), train \(4,\)"):
        data.from_arrays(np.eye(4), np.eye(3))
    with pytest.raises(UserError, match=r"data\.binarize='sometimes'"):
        data.from_arrays(np.eye(4), binarize="sometimes")
    with pytest.raises(UserError, match=r"data\.name='cifar': must be one of four_points, digits"):
        data.load("cifar")


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 300), batch=st.integers(1, 50), start=st.integers(0, 200), steps=st.integers(1, 20))
def test_batches_are_a_function_of_the_step_and_epochs_are_whole(size, batch, start, steps):
    block = batch_indices(size, batch, 3, start, steps)
    assert block.shape == (steps, batch)
    singly = np.concatenate([batch_indices(size, batch, 3, start + i, 1) for i in range(steps)])
    np.testing.assert_array_equal(block, singly)
    stream = batch_indices(size, batch, 3, 0, -(-3 * size // batch)).ravel()
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_orders_differ_between_seeds_and_epochs():
    one, two = (batch_indices(1000, 1000, seed, 0, 2) for seed in (0, 1))
    assert not (one[0] == one[1]).all()
    assert not (one[0] == two[0]).all()


def digit(i):
    png = io.BytesIO()
    Image.fromarray(np.full((28, 28), i, np.uint8)).save(png, "PNG")
    return {"image": png.getvalue(), "label": i}


def test_tfds_sets_are_read_without_tensorflow(tmp_path):
    prepared.write(tmp_path, "mnist", {"train": 5, "test": 2}, digit)
    dataset = data.load("tfds:mnist", str(tmp_path))
    np.testing.assert_array_equal(dataset.train[:, 0, 0], [0, 1, 2, 3, 4])
    assert dataset.train.shape == (5, 28, 28)
    assert dataset.train.dtype == np.uint8
    assert dataset.test.shape == (2, 28, 28)
    assert "tensorflow" not in sys.modules


def test_an_unprepared_tfds_set_names_the_extra_or_the_failure(tmp_path):
    with pytest.raises(UserError, match=r"data\.name='tfds:mnist': .*(avb_jax\[tfds\]|could not give)"):
        tfds.read_images("mnist", str(tmp_path), "train")


def test_labels_are_read_where_they_are_and_must_fit(folder):
    """Of the test images alone, and for figures: a set without them is a set all the same."""
    assert data.load("mnist", str(folder)).test_labels is None
    count = len(idx.read_images(folder, "t10k"))
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(range(count)))
    np.testing.assert_array_equal(data.load("mnist", str(folder)).test_labels, np.arange(count))
    path.write_bytes(b"\0\0\x08\x01" + (count + 1).to_bytes(4, "big") + bytes(count + 1))
    with pytest.raises(UserError, match=f"{count + 1} test labels for {count} images"):
        data.load("mnist", str(folder))
    digits = data.load("digits")
    assert digits.test_labels.shape == digits.test.shape[:1]
    assert set(digits.test_labels) == set(range(10))


def test_images_of_one_channel_lose_it(folder):
    assert idx.read_images(folder, "train").shape == (3, 4, 5)


def test_labels_of_arrays():
    x = np.zeros((4, 2), np.float32)
    found = from_arrays(x, train_labels=[0, 1, 1, 2])
    np.testing.assert_array_equal(found.test_labels, [0, 1, 1, 2])
    assert from_arrays(x, x[:2], train_labels=[0, 1, 1, 2]).test_labels is None
    for labels in ([0, 1], [0.0, 1.0, 1.0, 2.0], [-1, 0, 0, 0]):
        with pytest.raises(UserError, match=r"mine: train_labels: .* one for each of 4 examples"):
            from_arrays(x, name="mine", train_labels=labels)
