"""The figures of images: what is in their rows, and how a grid is put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from avb_jax import Posterior, UserError, data
from avb_jax.distributions import normal, standard_normal
from avb_jax.figures import images, named
from avb_jax.training.callbacks import Run
from tests.conftest import small_method

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def trained():
    """A small method, its State, and a data set of 6x6 images."""
    rng = np.random.default_rng(0)
    dataset = data.from_arrays(rng.random((30, 6, 6)), rng.random((24, 6, 6)))
    method = small_method("avb")
    return method, method.init(jax.random.key(0), dataset.train[:4]), dataset


def test_interpolation_ends_in_the_reconstructions(trained):
    grid = images.interpolation(KEY, *trained)
    rows = grid.images.reshape(-1, grid.columns, 6, 6)
    method, state, dataset = trained
    count = len(rows)
    assert (count, grid.columns) == (10, 10)
    np.testing.assert_allclose(rows[:, 0], dataset.test[:count], rtol=1e-6)
    np.testing.assert_allclose(rows[:, -1], dataset.test[count : 2 * count], rtol=1e-6)
    z = method.encode(KEY, state, dataset.test[: 2 * count]).z
    again = method.decode(state, z).mean
    np.testing.assert_allclose(rows[:, 1], again[:count], atol=1e-5)
    np.testing.assert_allclose(rows[:, -2], again[count:], atol=1e-5)
    between = (4 * z[:count] + 3 * z[count:]) / 7  # the fourth of eight codes on the line
    np.testing.assert_allclose(rows[:, 4], method.decode(state, between).mean, atol=1e-5)


def test_neighbours_are_the_nearest(trained, monkeypatch):
    monkeypatch.setattr(images, "BLOCK", 7)
    grid = images.neighbours(KEY, *trained)
    train = trained[2].train
    for sample, *near in grid.images.reshape(-1, grid.columns, 6, 6):
        distance = np.sum((train - sample) ** 2, axis=(1, 2))
        np.testing.assert_allclose(near, train[np.argsort(distance)[: len(near)]], rtol=1e-6)


def test_reconstructions_lie_below_their_originals(trained):
    method, state, dataset = trained
    grid = images.reconstructions(KEY, *trained)
    rows = grid.images.reshape(-1, grid.columns, 6, 6)
    np.testing.assert_allclose(rows[0], dataset.test[: grid.columns], rtol=1e-6)
    again = method.decode(state, method.encode(KEY, state, dataset.test).z).mean
    np.testing.assert_allclose(rows[1], again[: grid.columns], atol=1e-5)


def test_a_picture_is_its_grid_enlarged_in_whole_steps(trained):
    grid = named.grid("samples", *trained)
    picture = images.to_image(grid)
    factor = picture.width // (10 * 7 + 1)
    assert picture.size == (71 * factor, 71 * factor)
    first = np.asarray(picture)[factor : 7 * factor : factor, factor : 7 * factor : factor] / 255
    np.testing.assert_allclose(first, grid.images[0], atol=1 / 255)


def test_a_latent_plane_has_z_1_to_the_right_and_z_2_upwards():
    """At quantiles of the prior; by a decoder whose first two pixels are the two latents."""

    def decode(state, z):
        return normal(jnp.pad(z, ((0, 0), (0, 34))).reshape(-1, 6, 6), 1.0)

    method = small_method("avb")._replace(decode=decode, prior=standard_normal(2))
    grid = named.grid("latent_plane", method, None, None)
    z = grid.images[:, 0, :2].reshape(grid.columns, grid.columns, 2)
    levels = stats.norm.ppf(np.linspace(0.02, 0.98, grid.columns))
    np.testing.assert_allclose(z[3, :, 0], levels, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(z[::-1, 5, 1], levels, rtol=1e-5, atol=1e-6)


def test_a_spherical_interpolation_keeps_to_the_sphere(trained):
    """Between two codes of length 1 at a right angle, all have length 1; on the line they would be shorter."""
    codes = jnp.eye(3)[:2]
    method = small_method("avb")._replace(
        encode=lambda key, state, x, draws=None: Posterior(jnp.concatenate([codes[:1]] * 10 + [codes[1:]] * 10)),
        decode=lambda state, z: normal(jnp.pad(z, ((0, 0), (0, 33))).reshape(-1, 6, 6), 1.0),
    )
    for spherical in (True, False):
        grid = images.interpolation(KEY, method, None, trained[2], spherical=spherical)
        z = grid.images.reshape(-1, grid.columns, 36)[:, 1:-1, :3]
        lengths = np.linalg.norm(z, axis=-1)
        np.testing.assert_allclose(z[:, [0, -1]], np.broadcast_to(np.eye(3)[:2], (10, 2, 3)), atol=1e-5)
        assert (abs(lengths - 1) < 1e-4).all() == spherical


def test_traversals_move_one_latent_at_a_time(trained):
    """The one that varies most first; the others stay where the first test image's code is."""
    scale = jnp.array([1.0, 3.0, 0.5])
    codes = scale * jax.random.normal(KEY, (24, 3))
    method = small_method("avb")._replace(
        encode=lambda key, state, x, draws=None: Posterior(codes),
        decode=lambda state, z: normal(jnp.pad(z, ((0, 0), (0, 33))).reshape(-1, 6, 6), 1.0),
    )
    grid = images.traversals(KEY, method, None, trained[2])
    z = grid.images.reshape(3, grid.columns, 36)[:, 1:, :3]
    assert grid.rows == ["z2", "z1", "z3"]
    np.testing.assert_allclose(z[0, :, 1], np.linspace(-3, 3, grid.columns - 1), atol=1e-6)
    np.testing.assert_allclose(z[0, :, [0, 2]], np.broadcast_to(codes[0, [0, 2]][:, None], (2, grid.columns - 1)), rtol=1e-6)
    np.testing.assert_allclose(z[2, :, 2], np.linspace(-3, 3, grid.columns - 1), atol=1e-6)


def test_a_picture_has_its_title_and_labels_about_it():
    grid = images.Grid(np.zeros((6, 8, 8)), 3, "", ("data", "model"), ("a", "b", "c"))
    plain, labelled = images.to_image(grid._replace(rows=(), heads=())), images.to_image(grid, "title")
    assert labelled.width > plain.width
    assert labelled.height == plain.height + 48
    inside = np.asarray(labelled.convert("L"))[48:, labelled.width - plain.width :]
    np.testing.assert_array_equal(inside, np.asarray(plain))
    assert np.asarray(labelled.convert("L"))[:48].min() < 100  # something is written


def test_codes_of_few_examples_are_many_each():
    """And of many one each: a colour per example, or per class where there are classes."""
    method = small_method("avb")
    x, rng = np.eye(4, 36, dtype=np.float32).reshape(4, 6, 6), np.random.default_rng(0)
    state = method.init(jax.random.key(0), x)
    few = named.draw("codes", method, state, data.from_arrays(x, x), name="a run, avb")
    (panel,) = few.axes
    assert panel.get_title() == "a run, avb, step 0: 1,250 codes of each of 4 test examples"
    assert [(part.get_label(), len(part.get_offsets())) for part in panel.collections] == [(str(i + 1), 1250) for i in range(4)]
    many = rng.random((30, 6, 6))
    (panel,) = named.draw("codes", method, state, data.from_arrays(many, many)).axes
    assert [len(part.get_offsets()) for part in panel.collections] == [30]
    assert panel.get_title() == "avb, step 0: codes of 30 test examples"


def test_pictures_say_of_which_run_they_are(trained, tmp_path, monkeypatch):
    method, state, dataset = trained
    titles = []
    monkeypatch.setattr(named, "draw", lambda *given, name: titles.append(name))
    monkeypatch.setattr(named, "save", lambda path, picture: path)
    for folder, expected in ((tmp_path / "mnist-20260101", "mnist-20260101, avb"), (tmp_path / "avb", "avb"), (None, "avb")):
        pictures = named.Pictures(tmp_path / "figures", ("samples",))
        pictures.start(Run("avb", method, dataset, 2, 0, 4, None, 0, folder))
        pictures.checkpoint(1, state)
        assert titles.pop() == expected


def test_slips(trained):
    gan = small_method("gan")
    with pytest.raises(UserError, match="figure='interpolation': gan has no encoder; take samples or neighbours"):
        named.grid("interpolation", gan, None, trained[2])
    with pytest.raises(UserError, match="figure='latent_plane': avb has 3 latents; it takes two"):
        named.grid("latent_plane", *trained)
    with pytest.raises(UserError, match="figure='portraits': must be one of samples"):
        named.grid("portraits", *trained)
