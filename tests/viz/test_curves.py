"""Curves, distances with intervals, histograms."""

import numpy as np
import pytest

from diffusers_med3d import viz


def test_curves_draw_the_values_given_and_refuse_uneven_ones():
    axes = viz.curves({"reward": ([0, 5, 10], [1.0, 2.0, 1.5])}, ylabel="score").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.0], [5, 2.0], [10, 1.5]]
    assert (axes.get_ylabel(), axes.get_legend().get_texts()[0].get_text()) == ("score", "reward")
    with pytest.raises(ValueError, match="'reward' has 2 x values and 3 y values"):
        viz.curves({"reward": ([0, 1], [1.0, 2.0, 3.0])})


def test_intervals_draw_every_set_of_every_panel_with_its_ends():
    figure = viz.intervals({"KID": {"a": (1.0, 0.5, 2.0), "b": (0.1, -0.2, 0.3)}, "other": {"a": (5.0, 4.0, 6.0)}})
    first, second = figure.axes[:2]
    assert first.lines[0].get_xdata().tolist() == [0.5, 2.0] and first.lines[2].get_xdata().tolist() == [-0.2, 0.3]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert first.get_title() == "KID" and second.lines[1].get_xdata().tolist() == [5.0]
    with pytest.raises(ValueError, match="at least one panel"):
        viz.intervals({})


def test_bands_fill_between_the_ends_and_refuse_uneven_ones():
    axes = viz.bands({"scan": ([0, 1], [2.0, 3.0], [1.0, 2.0], [3.0, 5.0])}).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2.0, 3.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == 1.0 and corners[:, 1].max() == 5.0
    with pytest.raises(ValueError, match=r"'x' has \[2, 1, 2, 2\]"):
        viz.bands({"x": ([0, 1], [1.0], [0.0, 0.0], [1.0, 1.0])})


def test_a_histogram_shows_shares_in_common_bins_and_leaves_out_nan():
    axes = viz.histogram({"a": [0.0, 1.0, 1.0, float("nan")], "b": [0.5]}, "ratio", bins=2).axes[0]
    heights = [patch.get_xy()[:, 1].max() for patch in axes.patches]
    assert heights == pytest.approx([2 / 3, 1.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (3)", "b (1)"]
    with pytest.raises(ValueError, match="at least one finite"):
        viz.histogram({"a": [float("nan")]}, "ratio")


def test_stage_distances_draw_every_stage_with_its_error_and_the_floor_with_its_own():
    stages = {"round-trips": (0.02, 0.01), "samples": (0.3, 0.05)}
    figure = viz.stage_distances({"KID": stages, "other": stages}, [0.03, 0.5], "the generator")
    first = figure.axes[0]
    points, _, (bars,) = first.containers[0]
    assert points.get_xydata().tolist() == [[0, 0.02], [1, 0.3]]
    assert [[y for _, y in bar] for bar in bars.get_segments()] == pytest.approx(np.array([[0.01, 0.03], [0.25, 0.35]]))
    assert [label.get_text() for label in first.get_xticklabels()] == list(stages)
    assert first.patches[0].get_height() == pytest.approx(0.06)  # the floor's band, one error to each side
    with pytest.raises(ValueError, match="got 1 and 2"):
        viz.stage_distances({"KID": stages}, [0.1, 0.1])


def test_ratio_bars_draw_the_ratio_its_spread_and_the_most_that_was_asked_for():
    axes = viz.ratio_bars({"sampling": (0.5, 0.4, 0.7, 0.8), "start": (2.0, 2.0, 2.0, None)}, "ours / peer").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sampling", "start"]
    assert list(axes.lines[0].get_xdata()) == [0.8, 0.8]
    with pytest.raises(ValueError, match="at least one ratio"):
        viz.ratio_bars({})
