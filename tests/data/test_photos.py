"""Photographs: what is decoded, cached, noticed, refused and skipped."""

import io
import json
import os
import sys
import threading
import time
import zipfile

import jax
import numpy as np
import PIL.Image
import pytest

from avb_jax import UserError, data
from avb_jax.data import faces, images, photos
from avb_jax.data.dataset import Dataset
from avb_jax.data.photos import Photos
from tests import prepared

RNG = np.random.default_rng(0)


def picture(height=20, width=16, mode="RGB", kind="PNG"):
    """An encoded image of random pixels."""
    pixels = RNG.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        image = PIL.Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(pixels).convert("RGBA").convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Thirty small pictures, some of them in a folder of their own."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i in range(30):
        (root / ("more" if i % 3 == 0 else ".") / f"{i:03}.png").write_bytes(picture())
    return root


def test_decoding_by_hand():
    """The centre of the image; no resampling where the size is right; the mean survives where it is not."""
    pixels = RNG.integers(0, 256, (10, 8, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    np.testing.assert_array_equal(images.decode(image, 4, 4), pixels[3:7, 2:6])
    np.testing.assert_array_equal(images.decode(image, 8, 0), pixels[1:9])
    flat = images.decode(PIL.Image.fromarray(np.full((178, 218, 3), 77, np.uint8)), 64, 140)
    np.testing.assert_array_equal(flat, np.full((64, 64, 3), 77))


def test_a_photograph_stands_as_its_camera_says():
    """EXIF orientation 6: the sensor lay on its side."""
    pixels, file = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8), io.BytesIO()
    image = PIL.Image.fromarray(np.rot90(pixels))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(images.decode(PIL.Image.open(file), 6, 0), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    with PIL.Image.open(io.BytesIO(picture(8, 8, mode, kind))) as image:
        decoded = images.decode(image, 8, 0)
        assert decoded.shape == (8, 8, 3)
        np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGBA").convert("RGB")))


def test_folder_and_zip_give_the_same(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, path.relative_to(folder))
        archive.writestr("__MACOSX/000.png", b"not an image")
        archive.writestr("notes.txt", b"nor this")
    options = Photos(size=8, held_out=0.2, cache=str(tmp_path / "cache"))
    one = data.load("images", str(folder), options=options)
    two = data.load("images", str(tmp_path / "pictures.zip"), options=options)
    assert one.train.shape == (24, 8, 8, 3)
    assert one.test.shape == (6, 8, 8, 3)
    assert isinstance(one.train, np.memmap)
    np.testing.assert_array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.test, two.test)
    other = data.load("images", str(folder), options=options._replace(split_seed=1))
    assert not np.array_equal(one.test, other.test)
    together = lambda d: sorted(image.tobytes() for part in d[:2] for image in part)  # noqa: E731
    assert together(one) == together(other)


def test_a_cache_is_used_and_noticed_when_stale_or_damaged(folder, tmp_path, capsys, monkeypatch):
    decoded = []
    original = images.decode
    monkeypatch.setattr(images, "decode", lambda *arguments: decoded.append(1) or original(*arguments))
    load = lambda: images.cached(images.from_folder(folder), tmp_path / "cache", 8)  # noqa: E731
    first = np.array(load().pixels)
    assert len(decoded) == 30
    assert "decoding image 30/30" in capsys.readouterr().err
    np.testing.assert_array_equal(load().pixels, first)
    assert len(decoded) == 30
    assert not capsys.readouterr().err

    index = tmp_path / "cache" / "index.json"
    content = bytearray((tmp_path / "cache" / "pixels.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "cache" / "pixels.bin").write_bytes(content)
    np.testing.assert_array_equal(load().pixels, first)
    assert "is damaged; decoding it again" in capsys.readouterr().err
    (tmp_path / "cache" / "pixels.bin").write_bytes(content[:5000])
    np.testing.assert_array_equal(load().pixels, first)
    assert "is damaged" in capsys.readouterr().err

    for nonsense in ('{"settings"', "[]", json.dumps({"settings": json.loads(index.read_text())["settings"], "next": 3})):
        index.write_text(nonsense)
        np.testing.assert_array_equal(load().pixels, first)
        assert "damaged; decoding it again" in capsys.readouterr().err
    elsewhere = tmp_path / "precious"
    elsewhere.write_bytes(b"of the user's own")
    (tmp_path / "cache" / "pixels.bin").unlink()
    (tmp_path / "cache" / "pixels.bin").symlink_to(elsewhere)
    np.testing.assert_array_equal(load().pixels, first)
    assert elsewhere.read_bytes() == b"of the user's own"

    (folder / "001.png").write_bytes(picture())
    assert not np.array_equal(load().pixels, first)
    assert "has changed since it was decoded" in capsys.readouterr().err


def test_two_processes_build_a_cache_once(folder, tmp_path, capsys, monkeypatch):
    """The one that comes later waits, and takes what the other has built."""
    source, started, results, original = images.from_folder(folder), threading.Event(), [], images._decode_all
    there = tmp_path / "cache"

    def slowly(*arguments):
        started.set()
        time.sleep(1.0)
        original(*arguments)

    monkeypatch.setattr(images, "_decode_all", slowly)
    first = threading.Thread(target=lambda: results.append(images.cached(source, there, 8)))
    first.start()
    started.wait(60)
    monkeypatch.setattr(images, "_decode_all", lambda *arguments: pytest.fail("decoded twice"))
    results.append(images.cached(source, there, 8))
    first.join(60)
    np.testing.assert_array_equal(*(result.pixels for result in results))
    assert f"data.cache={there}: process {os.getpid()} on " in capsys.readouterr().err


def test_an_interrupted_build_continues(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BLOCK", 8)
    source, read = images.from_folder(folder), []

    def failing(name):
        if len(read) == 20:
            raise KeyboardInterrupt
        read.append(name)
        return source.read(name)

    with pytest.raises(KeyboardInterrupt):
        images.cached(source._replace(read=failing), tmp_path / "cache", 8, workers=1)
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["next"] == 16
    with (tmp_path / "cache" / "pixels.bin").open("ab") as file:
        file.write(b"half a block")  # as a power cut would leave it
    again = []
    result = images.cached(source._replace(read=lambda name: again.append(name) or source.read(name)), tmp_path / "cache", 8)
    assert sorted(again) == sorted(source.images[16:])
    np.testing.assert_array_equal(result.pixels, images.cached(source, tmp_path / "other", 8).pixels)


def test_images_that_cannot_be_decoded_are_skipped_by_name(folder, tmp_path, capsys):
    (folder / "002.png").write_bytes(picture()[:100])
    (folder / "004.jpg").write_bytes(picture(200, 200, "RGB", "JPEG")[:3000])
    (folder / "005.png").write_bytes(picture(8, 8, "I;16"))
    (folder / "007.png").write_bytes(picture(9, 30))
    (folder / "008.png").write_bytes(b"")
    result = images.cached(images.from_folder(folder), tmp_path / "cache", 8, crop=12)
    reasons = dict(result.skipped)
    assert set(reasons) == {"002.png", "004.jpg", "005.png", "007.png", "008.png"}
    assert "truncated" in reasons["004.jpg"]
    assert "not 8 bits per channel" in reasons["005.png"]
    assert reasons["007.png"] == "30x9 pixels, smaller than the crop of 12; data.crop=0 takes the largest square"
    assert len(result.pixels) == len(result.rows) == 31 - 5
    error = capsys.readouterr().err
    assert "skipped 5 of 31 images: " in error
    assert "002.png" in error


def test_what_is_refused(folder, tmp_path, monkeypatch):
    load = lambda where, **options: data.load(  # noqa: E731
        "images", str(where), options=Photos(**{"size": 8, "held_out": 0.2, "cache": str(tmp_path / "cache"), **options})
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no images in it"):
        load(empty)
    with pytest.raises(UserError, match="no such folder or zip file"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"held_out=0\.01: would hold out 0 of 30 images"):
        load(folder, held_out=0.01)
    with pytest.raises(UserError, match=r"data\.size=2"):
        load(folder, size=2)
    with pytest.raises(UserError, match="not one of its 30 images could be decoded"):
        load(folder, crop=1000)
    with pytest.raises(UserError, match=r"binarize='dynamic': images are photographs"):
        data.load("images", str(folder), "dynamic")
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="not a zip file that can be read"):
        load(broken)
    for name in ("/etc/a.png", "../a.png"):
        with zipfile.ZipFile(tmp_path / "unsafe.zip", "w") as archive:
            archive.writestr(name, picture())
        with pytest.raises(UserError, match="points outside the archive"):
            load(tmp_path / "unsafe.zip")
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture())
        archive.writestr("b.png", bytes(10_000))
    monkeypatch.setenv("AVB_JAX_UNPACKED", "9999")
    result = images.cached(images.from_zip(tmp_path / "large.zip"), tmp_path / "of_large", 8)
    assert result.skipped == [("b.png", "unpacks to 10,000 bytes, more than 9,999 (AVB_JAX_UNPACKED)")]
    monkeypatch.setenv("AVB_JAX_UNPACKED", "100")
    with pytest.raises(ValueError, match=r"decodes to 1,600 bytes, more than 100 \(AVB_JAX_UNPACKED\)"):
        images.decode(PIL.Image.new("RGB", (20, 20)), 8, 0)
    monkeypatch.setenv("AVB_JAX_UNPACKED", "2 GB")
    with pytest.raises(UserError, match="AVB_JAX_UNPACKED='2 GB': must be a number of bytes, such as 1073741824"):
        images.decode(PIL.Image.new("RGB", (20, 20)), 8, 0)
    monkeypatch.delenv("AVB_JAX_UNPACKED")
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="MiB, 0 are free; name a folder with more space"):
        load(folder)


@pytest.fixture(params=["folder", "zip"])
def celeba_folder(tmp_path, request):
    """Twelve images as CelebA is distributed: five to train, three to validate, four to test."""
    names = [f"{i:06}.jpg" for i in range(1, 13)]
    files = {name: picture(218, 178, "RGB", "JPEG") for name in names}
    if request.param == "folder":
        (tmp_path / "img_align_celeba").mkdir()
        for name, content in files.items():
            (tmp_path / "img_align_celeba" / name).write_bytes(content)
    else:
        with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"img_align_celeba/{name}", content)
    splits = [0] * 5 + [1] * 3 + [2] * 4
    lines = "".join(f"{name} {split}\n" for name, split in zip(names, splits, strict=True))
    (tmp_path / "list_eval_partition.txt").write_text(lines)
    return tmp_path, files


def test_celeba_as_it_is_distributed(celeba_folder):
    folder, files = celeba_folder
    options = Photos(size=32, crop=140, cache=str(folder / "cache"), flip=True)
    celeba = data.load("celeba", str(folder), options=options)
    assert (len(celeba.train), len(celeba.test)) == (5, 4)
    assert celeba.flip
    with PIL.Image.open(io.BytesIO(files["000001.jpg"])) as image:
        np.testing.assert_array_equal(celeba.train[0], images.decode(image, 32, 140))
    with PIL.Image.open(io.BytesIO(files["000009.jpg"])) as image:
        np.testing.assert_array_equal(celeba.test[0], images.decode(image, 32, 140))
    partition = folder / "list_eval_partition.txt"
    partition.write_text("\n".join(partition.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=r"says nothing about .*000012\.jpg"):
        data.load("celeba", str(folder), options=options)
    partition.write_text("000001.jpg train\n")
    with pytest.raises(UserError, match="not lines of an image's name"):
        data.load("celeba", str(folder), options=options)
    partition.unlink()
    with pytest.raises(UserError, match=r"list_eval_partition\.txt: missing"):
        data.load("celeba", str(folder), options=options)
    with pytest.raises(UserError, match="holds neither img_align_celeba nor"):
        data.load("celeba", str(folder / "cache"), options=options)
    with pytest.raises(UserError, match="no such folder; give the one that holds celeba's files"):
        data.load("celeba", "", options=options)


def test_celeba_as_tfds_prepares_it(tmp_path):
    """Its own splits and features; the same images as from a folder."""
    encoded = [picture(218, 178) for _ in range(9)]
    prepared.write(tmp_path, "celeb_a", {"train": 9, "validation": 1, "test": 3}, lambda i: {"image": encoded[i]})
    got = data.load("tfds:celeb_a", str(tmp_path), options=Photos(size=8, crop=140, cache=str(tmp_path / "cache")))
    assert got.train.shape == (9, 8, 8, 3)
    assert got.test.shape == (3, 8, 8, 3)
    for i, pixels in enumerate(got.train):
        with PIL.Image.open(io.BytesIO(encoded[i])) as image:
            np.testing.assert_array_equal(pixels, images.decode(image, 8, 140))
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_real_faces(real_data, tmp_path):
    """The cut between training and test is seeded; pixels are those that PIL gives."""
    path = real_data / "faces64.zip"
    if not path.exists():
        pytest.skip("AVB_JAX_DATA has no faces64.zip")
    faces64 = data.load("images", str(path), options=Photos(size=16, cache=str(tmp_path)))
    assert faces64.train.shape == (19_000, 16, 16, 3)
    assert faces64.test.shape == (1_000, 16, 16, 3)


def test_mirroring():
    x = jax.random.uniform(jax.random.key(0), (200, 4, 4, 3))
    stored = np.asarray(x)
    plain, mirrored = (np.asarray(Dataset(stored, stored, flip=flip).prepare(jax.random.key(1), x)) for flip in (False, True))
    np.testing.assert_array_equal(plain, x)
    turned = np.array([np.array_equal(image, original[:, ::-1]) for image, original in zip(mirrored, plain, strict=True)])
    kept = np.array([np.array_equal(image, original) for image, original in zip(mirrored, plain, strict=True)])
    assert np.all(turned ^ kept)
    assert 70 < turned.sum() < 130


def test_drawn_faces():
    drawn = faces.draw(6, 32, 0)
    assert drawn.shape == (6, 32, 32, 3)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:3], faces.draw(3, 32, 0))
    assert len({image.tobytes() for image in drawn}) == 6
    loaded = photos.drawn_faces("", Photos(size=8, flip=True))
    assert loaded.train.shape == (4096, 8, 8, 3)
    assert loaded.flip


@pytest.mark.parametrize(("width", "height", "crop"), [(178, 218, 140), (64, 64, 0), (300, 200, 0)])
def test_the_crop_follows_from_the_images(tmp_path, capsys, width, height, crop):
    """CelebA's own size has its convention, all else the largest square; the choice is said."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(6):
        PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    cache = str(tmp_path / "cache")
    found, given = (
        data.load("images", str(tmp_path / "images"), options=Photos(size=8, crop=one, held_out=0.5, cache=cache))
        for one in (None, crop)
    )
    assert f"data.crop={crop}: " in capsys.readouterr().err
    np.testing.assert_array_equal(found.train, given.train)
