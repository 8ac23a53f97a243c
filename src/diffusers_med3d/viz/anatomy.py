"""Where a volume lies in the body: its axes as letters and millimetres, and its slices in anatomical planes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import nibabel
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from ..utils.checks import positive_spacing
from .style import LETTER

OUTLINE = [withStroke(linewidth=1, foreground="black")]
"""Keeps letters readable on bright tissue."""

PlaneName = Literal["axial", "coronal", "sagittal"]


@dataclass(frozen=True)
class Plane:
    """How a plane is drawn: the RAS axis that runs across, upwards and through it; letters left, right, bottom, top.

    The radiological convention: the patient's right is on the left of axial and coronal slices, anterior is on the left
    of sagittal ones. So all three draw their first axis from its high end to its low end.
    """

    across: int
    up: int
    through: int
    letters: tuple[str, str, str, str]
    through_letters: tuple[str, str]


PLANES: dict[PlaneName, Plane] = {
    "axial": Plane(0, 1, 2, ("R", "L", "P", "A"), ("I", "S")),
    "coronal": Plane(0, 2, 1, ("R", "L", "I", "S"), ("P", "A")),
    "sagittal": Plane(1, 2, 0, ("A", "P", "I", "S"), ("L", "R")),
}


@dataclass(frozen=True)
class Placed:
    """A volume whose axes point to the right, the front and the top of the patient (RAS).

    Args:
        voxels: float32 (X, Y, Z).
        spacing: mm per voxel along the three axes.
        centre: mm, where the middle of the volume lies.
    """

    voxels: NDArray[np.float32]
    spacing: tuple[float, float, float]
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def edges(self, axis: int) -> tuple[float, float]:
        """Where the volume begins and ends along an axis, in mm, with the halves of its outermost voxels."""
        half = self.voxels.shape[axis] * self.spacing[axis] / 2
        return self.centre[axis] - half, self.centre[axis] + half

    def position(self, axis: int, index: int) -> float:
        """Where the middle of a voxel lies along an axis, in mm."""
        return self.edges(axis)[0] + (index + 0.5) * self.spacing[axis]

    def index(self, axis: int, position: float) -> int:
        """Which voxel holds a position in mm; the nearest one for a position outside of the volume."""
        index = int(np.floor((position - self.edges(axis)[0]) / self.spacing[axis]))
        return min(max(index, 0), self.voxels.shape[axis] - 1)


def place(
    volume: Any,
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    channel: int = 0,
) -> Placed:
    """A volume brought into RAS axes.

    Args:
        volume: tensor or array (X, Y, Z) or (C, X, Y, Z); a `Placed` volume is returned as it is.
        affine: (4, 4), voxel to RAS millimetres, as in NIfTI. An oblique one is drawn along its own axes, which get the
            letters of the nearest anatomical ones; millimetres are then exact through the middle of the volume.
        spacing: instead of an affine: mm per voxel of a volume in RAS axes, whose middle is at 0 mm. Neither: 1 mm.
        channel: which one is drawn.

    Raises:
        ValueError: a volume of another rank, no such channel, an affine and a spacing at once, or an unusable one.
    """
    if isinstance(volume, Placed):
        return volume
    array = as_array(volume)
    if array.ndim == 4:
        if not 0 <= channel < len(array):
            raise ValueError(f"The volume has {len(array)} channel(s), asked for is channel {channel}.")
        array = array[channel]
    if array.ndim != 3:
        raise ValueError(f"A volume must be (X, Y, Z) or (C, X, Y, Z), got {array.shape}.")
    if affine is None:
        return Placed(array, (1.0, 1.0, 1.0) if spacing is None else positive_spacing(spacing))
    if spacing is not None:
        raise ValueError("Give affine or spacing, not both: an affine has its own spacing.")
    matrix = np.asarray(affine.cpu() if isinstance(affine, torch.Tensor) else affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix[:3, :3]) < 3:
        raise ValueError(f"affine must be a finite, invertible (4, 4), got {matrix.tolist()}.")
    directions = nibabel.io_orientation(matrix)
    matrix = matrix @ nibabel.orientations.inv_ornt_aff(directions, array.shape)
    array = np.ascontiguousarray(nibabel.apply_orientation(array, directions))
    middle = matrix @ np.array([*((side - 1) / 2 for side in array.shape), 1.0])
    across, ahead, up = np.linalg.norm(matrix[:3, :3], axis=0).tolist()
    return Placed(array, (across, ahead, up), (float(middle[0]), float(middle[1]), float(middle[2])))


def as_array(values: Any) -> NDArray[np.float32]:
    """A tensor of any device and dtype, or an array, as a float32 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float32)


def draw_slice(
    axes: Axes,
    volume: Placed,
    plane: PlaneName,
    index: int | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    colours: str = "gray",
    left: float | None = None,
) -> AxesImage:
    """Draw one slice with its true proportions.

    Args:
        axes: where.
        volume: what.
        plane: "axial", "coronal" or "sagittal".
        index: which voxel along the third axis; None is the middle one.
        window: intensities that become black and white.
        colours: matplotlib's name of a colour map.
        left: None draws on anatomical axes in mm. A number draws the slice with its left edge there, its middle at
            height 0, so that several slices can stand side by side.
    """
    how = PLANES[plane]
    index = volume.voxels.shape[how.through] // 2 if index is None else index
    picture = volume.voxels.take(index, how.through).T  # rows upwards; RAS order of the other two axes is kept
    low, high = volume.edges(how.across)
    bottom, top = volume.edges(how.up)
    extent: tuple[float, float, float, float]
    if left is None:
        extent = (low, high, bottom, top)
    else:
        extent = (left + high - low, left, (bottom - top) / 2, (top - bottom) / 2)
    image = axes.imshow(picture, cmap=colours, vmin=window[0], vmax=window[1], origin="lower", extent=extent)
    if left is None:
        axes.set(xlim=(high, low), ylim=(bottom, top), aspect="equal", facecolor="black")
        axes.spines[:].set_visible(False)
    return image


def write_letters(
    axes: Axes, plane: PlaneName, box: tuple[float, float, float, float] = (0, 0, 1, 1), size: float = 8
) -> None:
    """Write the four letters of a plane, ``size`` points high, at the edges of a box (left, bottom, right, top).

    The box is in shares of the axes.
    """
    left, bottom, right, top = box
    middle, height = (left + right) / 2, (bottom + top) / 2
    inset = 0.035 * (top - bottom)
    places: tuple[tuple[float, float, Any, Any], ...] = (
        (left + inset, height, "left", "center"),
        (right - inset, height, "right", "center"),
        (middle, bottom + inset, "center", "bottom"),
        (middle, top - inset, "center", "top"),
    )
    for letter, (x, y, ha, va) in zip(PLANES[plane].letters, places, strict=True):
        letter_style: dict[str, Any] = {"color": LETTER, "fontsize": size, "path_effects": OUTLINE}
        axes.text(x, y, letter, ha=ha, va=va, transform=axes.transAxes, **letter_style)
