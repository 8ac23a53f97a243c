"""Letters and millimetres come from the affine: the same body stored in any order of axes gives the same picture."""

import nibabel
import numpy as np
import pytest
import torch

from diffusers_med3d import viz
from diffusers_med3d.viz.anatomy import draw_slice
from diffusers_med3d.viz.style import new_figure

# One bright block on the patient's right, at the front and at the top: no mirroring of any axis leaves it in place.
BLOCK_MM = {"x": 20.0, "y": 36.0, "z": 44.0}


def body(axes: str = "RAS") -> tuple[np.ndarray, np.ndarray]:
    """Array and affine of a body of 64 x 80 x 96 mm around (0, 0, 0), stored in the given order of axes."""
    array = np.zeros((32, 20, 24), np.float32)  # voxels of 2, 4 and 4 mm
    array[24:28, 18:20, 22:24] = 1
    affine = np.diag([2.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -31.0, -38.0, -46.0
    image = nibabel.Nifti1Image(array, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(axes))
    )
    stored = image.as_reoriented(turn)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == axes
    return np.asarray(stored.dataobj), stored.affine


def drawn_at(axes, image) -> tuple[float, float]:
    """Where the bright block lies in the picture, as shares of its width and height from the left bottom corner."""
    rows, columns = np.nonzero(np.asarray(image.get_array()) > 0.5)
    left, right, bottom, top = image.get_extent()
    height, width = image.get_array().shape
    across = left + (columns.mean() + 0.5) / width * (right - left)
    up = bottom + (rows.mean() + 0.5) / height * (top - bottom)
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    return (across - x0) / (x1 - x0), (up - y0) / (y1 - y0)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "ASR", "SPL", "PIR"])
def test_the_letters_name_the_side_on_which_a_structure_is_drawn(axes):
    array, affine = body(axes)
    figure = viz.orthogonal_views(array, affine, at=(21, 34, 42))
    sides = {"axial": ("R", "A"), "coronal": ("R", "S"), "sagittal": ("A", "S")}
    for drawn, (plane, expected) in zip(figure.axes, sides.items(), strict=True):
        across, up = drawn_at(drawn, drawn.images[0])
        left, right, bottom, top = drawn.texts
        assert left.get_position()[0] < 0.1 and right.get_position()[0] > 0.9
        assert bottom.get_position()[1] < 0.1 and top.get_position()[1] > 0.9
        horizontal, vertical = (left if across < 0.5 else right), (bottom if up < 0.5 else top)
        assert (horizontal.get_text(), vertical.get_text()) == expected, plane


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL"])
def test_the_axes_are_the_millimetres_of_the_affine(axes):
    array, affine = body(axes)
    placed = viz.place(array, affine)
    assert placed.spacing == pytest.approx((2, 4, 4)) and placed.centre == pytest.approx((0, 0, 0))
    figure = viz.orthogonal_views(array, affine, at=(21, 34, 42))
    for drawn, (across, up) in zip(figure.axes, ["xy", "xz", "yz"], strict=True):
        image = drawn.images[0]
        low, high, bottom, top = image.get_extent()
        assert (low, high) == pytest.approx({"x": (-32, 32), "y": (-40, 40)}[across])
        assert (bottom, top) == pytest.approx({"y": (-40, 40), "z": (-48, 48)}[up])
        assert drawn.get_xlim() == pytest.approx((high, low))  # the patient's right, or front, is on the left
        right, above = drawn_at(drawn, image)
        found = [high - right * (high - low), bottom + above * (top - bottom)]
        assert found == pytest.approx([BLOCK_MM[across], BLOCK_MM[up]], abs=0.01)
    titles = [drawn.get_title() for drawn in figure.axes]
    assert titles == ["axial, z = 42 mm", "coronal, y = 34 mm", "sagittal, x = 21 mm"]
    assert [drawn.get_xlabel() for drawn in figure.axes] == ["x (mm), R is +", "x (mm), R is +", "y (mm), A is +"]


def test_an_affine_away_from_the_origin_moves_the_axes_and_an_oblique_one_keeps_the_voxel_size():
    array, affine = body()
    affine[:3, 3] += (10, 20, 30)
    assert viz.place(array, affine).edges(2) == pytest.approx((-18, 78))
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = viz.place(array, turn @ body()[1])
    assert oblique.spacing == pytest.approx((2, 4, 4)) and oblique.centre == pytest.approx((0, 0, 0))
    assert np.array_equal(oblique.voxels, array)


def test_a_volume_without_affine_is_ras_around_zero():
    placed = viz.place(torch.rand(2, 4, 6, 8), spacing=(1.0, 2.0, 3.0), channel=1)
    assert placed.voxels.shape == (4, 6, 8)
    assert placed.edges(1) == (-6, 6) and placed.position(1, 0) == -5 and placed.index(1, 100) == 5


def test_slices_side_by_side_keep_right_on_the_left_and_true_proportions():
    array, affine = body("LPS")
    axes = new_figure(3, 3).add_subplot()
    image = draw_slice(axes, viz.place(array, affine), "coronal", 18, left=100.0)
    axes.set(xlim=(100, 164), ylim=(-48, 48))
    assert sorted(image.get_extent()[:2]) == pytest.approx([100, 164])
    across, up = drawn_at(axes, image)
    assert across < 0.5 < up


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"volume": np.zeros((2, 2))}, r"\(X, Y, Z\) or \(C, X, Y, Z\), got \(2, 2\)"),
        ({"volume": np.zeros((2, 2, 2)), "affine": np.zeros((4, 4))}, "invertible"),
        ({"volume": np.zeros((2, 2, 2)), "spacing": (1, 0, 1)}, "positive"),
        ({"volume": np.zeros((2, 2, 2)), "affine": np.eye(4), "spacing": (1, 1, 1)}, "not both"),
        ({"volume": np.zeros((1, 2, 2, 2)), "channel": 1}, "has 1 channel"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        viz.place(**arguments)
