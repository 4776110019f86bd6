"""The plot of a run: what is joined, what has a panel, what sets the scale."""

import sys

import numpy as np
import pytest

from loft_jax.training import plot
from loft_jax.training.plot import plot_run


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Plots rows, and gives the panels of the figure."""
    from matplotlib.figure import Figure

    made = []

    class Kept(Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            made.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)

    def plotted(rows):
        plot_run(rows, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert [f.name for f in tmp_path.iterdir()] == ["loss.png"]
        return made[-1].axes

    return plotted


def lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_two_evaluations_are_points_and_several_are_a_line(panels):
    for count, style in ((2, "None"), (3, "-")):
        rows = [{"step": 5 * i, "eval_loss": 2.0 - i, "eval_accuracy": 0.5} for i in range(count)]
        loss, held_out = panels(rows)
        assert lines(loss)["held-out"].get_linestyle() == style
        assert lines(held_out)["accuracy"].get_linestyle() == style
        assert held_out.get_ylabel() == "held-out"


def test_the_learning_rate_has_a_panel_of_its_own(panels):
    loss, rate = panels([{"step": s, "train_loss": 1.0, "learning_rate": 1e-4} for s in (1, 2)])
    assert [*lines(loss)] == ["training"]
    assert (rate.get_ylabel(), rate.get_xlabel()) == ("learning rate", "step")


def test_many_losses_have_a_smoothed_line_and_peaks_do_not_set_the_scale(panels):
    losses = [1.0 + 0.1 * (s % 7) for s in range(100)]
    losses[50] = 900.0
    (axes,) = panels([{"step": s, "train_loss": loss} for s, loss in enumerate(losses)])
    smoothed = lines(axes)["training, smoothed"].get_ydata()
    assert 1.1 < smoothed.min() <= smoothed.max() < 1.5
    assert axes.get_ylim()[1] < 4
    (marks,) = (line for line in axes.lines if line.get_marker() == "^")
    assert [*marks.get_xdata()] == [50]
    assert axes.get_title(loc="right") == "up to 900 at the triangles"


def test_equal_losses_and_no_losses_are_plotted(panels):
    panels([{"step": s, "train_loss": 1.0} for s in range(30)])
    panels([])


def test_without_matplotlib_nothing_is_plotted(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_run([], tmp_path / "loss.png")
    assert not [*tmp_path.iterdir()]


def test_a_peak_does_not_move_the_smoothed_line():
    values = np.ones(100)
    values[40] = 50.0
    np.testing.assert_array_equal(plot.smoothed(values), np.ones(100))
