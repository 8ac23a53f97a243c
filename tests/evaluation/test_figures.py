"""diffusers_med3d.figures"""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from diffusers_med3d.evaluation import figures


def cube_at(x: int, y: int, z: int) -> torch.Tensor:
    """RAS volume (1, 1, 16, 20, 24) with a bright 4-voxel cube whose low corner is at x, y, z."""
    volume = torch.zeros(1, 1, 16, 20, 24)
    volume[0, 0, x : x + 4, y : y + 4, z : z + 4] = 1
    return volume


def bright_centre(image) -> tuple[float, float]:
    """Centre of what is bright in one drawn view, as shares of its width and height (from left, from bottom)."""
    array = np.asarray(image.get_array())  # (rows, columns), origin lower
    assert image.origin == "lower"
    rows, columns = np.nonzero(array > 0.5)
    return columns.mean() / array.shape[1], rows.mean() / array.shape[0]


@pytest.mark.parametrize(
    "view, position, expected, letters",
    [
        # A structure on the patient's right is drawn on the left of axial and coronal views (radiological).
        ("axial", (12, 8, 10), "left", ("R", "L")),
        ("axial", (6, 15, 10), "top", ("R", "L")),
        ("coronal", (12, 8, 10), "left", ("R", "L")),
        ("coronal", (6, 8, 19), "top", ("R", "L")),
        ("sagittal", (6, 15, 10), "left", ("A", "P")),
        ("sagittal", (6, 8, 19), "top", ("A", "P")),
    ],
)
def test_each_view_shows_a_structure_on_the_side_its_letters_name(view, position, expected, letters):
    axes = figures.orthogonal_views({"x": cube_at(*position)}).axes[0]
    index = ["axial", "coronal", "sagittal"].index(view)
    across, up = bright_centre(axes.images[index])
    assert {"left": across < 0.35, "top": up > 0.65}[expected]
    left, right, _ = axes.texts[3 * index : 3 * index + 3]
    assert (left.get_text(), right.get_text()) == letters
    assert left.get_position()[0] < right.get_position()[0]


def test_views_are_as_wide_and_high_as_the_anatomy_in_millimetres():
    axes = figures.orthogonal_views({"x": cube_at(6, 8, 10)}, spacing=(1.0, 2.0, 3.0)).axes[0]
    sizes = [(e[1] - e[0], e[3] - e[2]) for e in (image.get_extent() for image in axes.images)]
    assert sizes == [(16, 40), (16, 72), (40, 72)]


def test_every_row_keeps_its_name_and_its_own_number_of_volumes():
    figure = figures.orthogonal_views({"scan": torch.rand(3, 1, 8, 8, 8), "sample": torch.rand(1, 1, 8, 8, 8)})
    assert [axes.get_ylabel() for axes in figure.axes] == ["scan", "", "", "sample", "", ""]
    assert [len(axes.images) for axes in figure.axes] == [3, 3, 3, 3, 0, 0]


def test_volumes_of_another_shape_are_refused_with_the_shape():
    with pytest.raises(ValueError, match=r"'scan'.*\(2, 8, 8, 8\)"):
        figures.orthogonal_views({"scan": torch.rand(2, 8, 8, 8)})
    with pytest.raises(ValueError, match="at least one row"):
        figures.orthogonal_views({})


def test_curves_draw_the_values_given_and_refuse_uneven_ones():
    axes = figures.curves({"reward": ([0, 5, 10], [1.0, 2.0, 1.5])}, ylabel="score").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.0], [5, 2.0], [10, 1.5]]
    assert (axes.get_ylabel(), axes.get_legend().get_texts()[0].get_text()) == ("score", "reward")
    with pytest.raises(ValueError, match="'reward' has 2 x values and 3 y values"):
        figures.curves({"reward": ([0, 1], [1.0, 2.0, 3.0])})


def test_save_makes_the_folder_and_writes_a_picture(tmp_path):
    path = figures.save(figures.orthogonal_views({"x": torch.rand(1, 1, 8, 8, 8)}), tmp_path / "a" / "b.png")
    assert imread(path).shape[2] == 4
    assert [file.name for file in path.parent.iterdir()] == ["b.png"]


def test_an_interrupted_save_leaves_the_old_picture_whole(tmp_path):
    path = figures.save(figures.curves({"x": ([0], [0.0])}), tmp_path / "curve.png")
    before = path.read_bytes()

    class Interrupted(Figure):
        def savefig(self, fname, **kwargs):
            with open(fname, "wb") as file:
                file.write(b"half a picture")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        figures.save(Interrupted(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


def test_intervals_draw_every_set_of_every_panel_with_its_ends():
    figure = figures.intervals({"KID": {"a": (1.0, 0.5, 2.0), "b": (0.1, -0.2, 0.3)}, "other": {"a": (5.0, 4.0, 6.0)}})
    first, second = figure.axes[:2]
    assert first.lines[0].get_xdata().tolist() == [0.5, 2.0] and first.lines[2].get_xdata().tolist() == [-0.2, 0.3]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b"]
    assert first.get_title() == "KID" and second.lines[1].get_xdata().tolist() == [5.0]
    with pytest.raises(ValueError, match="at least one panel"):
        figures.intervals({})


def test_bands_fill_between_the_ends_and_refuse_uneven_ones():
    axes = figures.bands({"scan": ([0, 1], [2.0, 3.0], [1.0, 2.0], [3.0, 5.0])}).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2.0, 3.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == 1.0 and corners[:, 1].max() == 5.0
    with pytest.raises(ValueError, match=r"'x' has \[2, 1, 2, 2\]"):
        figures.bands({"x": ([0, 1], [1.0], [0.0, 0.0], [1.0, 1.0])})


def test_a_histogram_shows_shares_in_common_bins_and_leaves_out_nan():
    axes = figures.histogram({"a": [0.0, 1.0, 1.0, float("nan")], "b": [0.5]}, "ratio", bins=2).axes[0]
    heights = [patch.get_xy()[:, 1].max() for patch in axes.patches]
    assert heights == pytest.approx([2 / 3, 1.0])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (3)", "b (1)"]
    with pytest.raises(ValueError, match="at least one finite"):
        figures.histogram({"a": [float("nan")]}, "ratio")


def test_stage_distances_draw_every_stage_with_its_error_and_the_floor_with_its_own():
    stages = {"round-trips": (0.02, 0.01), "samples": (0.3, 0.05)}
    figure = figures.stage_distances({"KID": stages, "other": stages}, [0.03, 0.5], "the generator")
    first = figure.axes[0]
    points, _, (bars,) = first.containers[0]
    assert points.get_xydata().tolist() == [[0, 0.02], [1, 0.3]]
    assert [[y for _, y in bar] for bar in bars.get_segments()] == pytest.approx(np.array([[0.01, 0.03], [0.25, 0.35]]))
    assert [label.get_text() for label in first.get_xticklabels()] == list(stages)
    assert first.patches[0].get_height() == pytest.approx(0.06)  # the floor's band, one error to each side
    with pytest.raises(ValueError, match="got 1 and 2"):
        figures.stage_distances({"KID": stages}, [0.1, 0.1])
