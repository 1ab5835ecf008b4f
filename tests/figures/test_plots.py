"""The diagrams: what stands on their axes and over them, and what is drawn where a logarithmic axis ends."""

import numpy as np

from avb_jax.figures import plots, save


def test_an_annealing_is_drawn_from_zero_up_with_its_names_over_it():
    """A panel per trace and one of beta, each against the steps from 1 on; the band is the middle 90% of the examples."""
    traces = {"acceptance": np.linspace(0.5, 0.9, 11)[:, None] + np.zeros(4), "step size": np.full((11, 4), 0.2)}
    figure = plots.annealing(traces, np.array([0.1, 0.3, 0.6, 1.0]))
    assert [panel.get_title() for panel in figure.axes] == ["acceptance", "step size", "share of the posterior, 0 to 1"]
    assert {panel.get_xlabel() for panel in figure.axes} == {"step of the annealing"}
    assert {panel.get_ylim()[0] for panel in figure.axes} == {0.0}
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xydata(), [(i, 0.7) for i in (1, 2, 3, 4)])
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose((band.min(), band.max()), (0.52, 0.88))
    np.testing.assert_allclose(figure.axes[-1].get_lines()[0].get_ydata(), [0.1, 0.3, 0.6, 1.0])


def test_a_latent_below_the_floor_is_drawn_on_it_and_said_to_be_below():
    activity, variance = np.array([0.2, 0.0, 1.0]), np.array([0.5, 1.0, 0.1])
    (panel,) = plots.latent_activity(activity, variance, 0.01).axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    np.testing.assert_allclose(lines["variance over x of E[z|x]"].get_xydata(), [(1, 1.0), (2, 0.2)])
    np.testing.assert_allclose(lines["the same, below 1e-05"].get_xydata(), [(3, plots.FLOOR)])
    np.testing.assert_allclose(lines["mean variance of q(z|x)"].get_ydata(), [0.1, 0.5, 1.0])
    (panel,) = plots.latent_activity(np.ones(2), np.ones(2), 0.01).axes
    assert not [line for line in panel.get_lines() if "below" in line.get_label()]


def test_figures_of_a_run_have_its_name_over_them(tmp_path):
    z, rng = np.zeros((4, 5, 2)), np.random.default_rng(0)
    drawn = (
        plots.latent_codes({"AVB": z}, "1234"),
        plots.pairs({"AVB": rng.normal(size=(50, 2))}, ("a", "b")),
        plots.comparison({"AVB": {"samples": np.zeros((3, 3)), "codes": {"7": z[0], "8": z[1]}}}),
    )
    for figure in drawn:
        save(tmp_path / "figure.png", figure, "a run")
    assert [figure.get_suptitle() for figure in drawn] == ["a run"] * 3
    untitled = plots.latent_codes({"AVB": z}, "1234")
    save(tmp_path / "figure.png", untitled)
    assert not untitled.get_suptitle()
    assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == ["7", "8"]
