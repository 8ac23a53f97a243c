"""Slices of volumes: three planes of one volume, many slices of one volume, rows of many volumes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .anatomy import OUTLINE, PLANES, Placed, PlaneName, draw_slice, place, write_letters
from .style import LETTER, new_figure, styled

COLUMNS = 8
"""Most volumes that `volume_rows` draws beside each other."""


@styled
def orthogonal_views(
    volume: Any,
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    at: Sequence[float] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    channel: int = 0,
) -> Figure:
    """Axial, coronal and sagittal slice of one volume, with axes in millimetres and anatomical letters.

    Slices follow the radiological convention: the patient's right is on the left. Thin lines show where the other two
    slices lie.

    Args:
        volume: (X, Y, Z) or (C, X, Y, Z), tensor, array or `Placed`.
        affine, spacing, channel: as in `place`.
        at: (right, anterior, superior) in mm, where the slices cross; None is the middle of the volume.
        window: intensities that become black and white.
        title: over the figure.

    Raises:
        ValueError: see `place`; ``at`` is not three numbers.

    Example:
        >>> import torch
        >>> figure = orthogonal_views(torch.rand(64, 64, 64), spacing=(3.0, 3.0, 3.0))
        >>> figure.axes[0].get_title()
        'axial, z = 1.5 mm'
    """
    placed = place(volume, affine, spacing, channel)
    if at is not None and len(at) != 3:
        raise ValueError(f"at must be three positions in mm (right, anterior, superior), got {tuple(at)}.")
    indices = [
        size // 2 if at is None else placed.index(axis, at[axis]) for axis, size in enumerate(placed.voxels.shape)
    ]
    sizes = [size * step for size, step in zip(placed.voxels.shape, placed.spacing, strict=True)]
    widths = [sizes[plane.across] for plane in PLANES.values()]
    height = max(sizes[plane.up] for plane in PLANES.values())
    figure = new_figure(9.6, 0.95 + 7.2 * height / sum(widths) + 0.3 * bool(title))
    for axes, name in zip(figure.subplots(1, 3, width_ratios=widths), PLANES, strict=True):
        plane = PLANES[name]
        draw_slice(axes, placed, name, indices[plane.through], window)
        write_letters(axes, name)
        line: dict[str, Any] = {"color": LETTER, "linewidth": 0.6, "alpha": 0.5}
        axes.axvline(placed.position(plane.across, indices[plane.across]), **line)
        axes.axhline(placed.position(plane.up, indices[plane.up]), **line)
        axis_letter = "xyz"[plane.through]
        axes.set_title(f"{name}, {axis_letter} = {placed.position(plane.through, indices[plane.through]):.4g} mm")
        axes.set_xlabel(_axis_label(plane.across))
        axes.set_ylabel(_axis_label(plane.up))
    figure.suptitle(title)
    return figure


def _filled(volume: Placed, axis: int, window: tuple[float, float]) -> tuple[int, int]:
    """First and last slice that holds anything; all of them for an empty volume."""
    bright = volume.voxels > window[0] + 0.1 * (window[1] - window[0])
    inside = np.flatnonzero(bright.any(axis=tuple({0, 1, 2} - {axis})))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (0, volume.voxels.shape[axis] - 1)


def _axis_label(axis: int) -> str:
    return f"{'xyz'[axis]} (mm), {('R', 'A', 'S')[axis]} is +"


@styled
def slice_grid(
    volume: Any,
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    plane: PlaneName = "axial",
    count: int = 12,
    window: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    channel: int = 0,
) -> Figure:
    """Evenly spaced slices of one volume, each with its position in millimetres.

    Args:
        volume: (X, Y, Z) or (C, X, Y, Z), tensor, array or `Placed`.
        affine, spacing, channel: as in `place`.
        plane: "axial", "coronal" or "sagittal".
        count: number of slices, spread over what is brighter than a tenth of the window.
        window: intensities that become black and white.
        title: over the figure.

    Raises:
        ValueError: see `place`; no such plane; fewer than one slice.
    """
    placed = place(volume, affine, spacing, channel)
    if plane not in PLANES:
        raise ValueError(f"plane must be one of {list(PLANES)}, got {plane!r}.")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    how = PLANES[plane]
    first, last = _filled(placed, how.through, window)
    indices = np.linspace(first, last, count + 2).round().astype(int).tolist()[1:-1]
    columns = min(count, 6)
    rows = -(-count // columns)
    width, height = (placed.voxels.shape[axis] * placed.spacing[axis] for axis in (how.across, how.up))
    figure = new_figure(1.6 * columns, rows * (1.6 * height / width + 0.22) + 0.3 * bool(title))
    for cell, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if cell >= count:
            axes.set_axis_off()
            continue
        draw_slice(axes, placed, plane, indices[cell], window)
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            f"{'xyz'[how.through]} = {placed.position(how.through, indices[cell]):.4g} mm", fontsize=8, pad=3
        )
        if cell == 0:
            write_letters(axes, plane)
            right, bottom = placed.edges(how.across)[0], placed.edges(how.up)[0]  # drawn from high to low
            _scale_bar(axes, width, right + 0.04 * width, bottom + 0.05 * height, direction=-1)
    figure.suptitle(title)
    return figure


@styled
def volume_rows(
    rows: Mapping[str, Any],
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    planes: Sequence[PlaneName] = ("axial", "coronal", "sagittal"),
    window: tuple[float, float] = (0.0, 1.0),
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
    channel: int = 0,
    cell_width: float = 2.6,
) -> Figure:
    """Named rows of volumes, every volume as its middle slices side by side in true proportions.

    The first volume carries the anatomical letters and a bar of some millimetres.

    Args:
        rows: name -> (B, C, X, Y, Z), or a sequence of (X, Y, Z), (C, X, Y, Z) or `Placed`. B may differ from row to
            row; of more than 8 the first 8 are drawn.
        affine, spacing, channel: as in `place`, of all volumes that are not `Placed` already.
        planes: which middle slices of each volume.
        window: intensities that become black and white.
        captions: name of a row -> a line for each of its volumes.
        title: over the figure.
        cell_width: inches that a volume takes.

    Raises:
        ValueError: see `place`; no row, or one without volumes; no such plane.
    """
    if not rows:
        raise ValueError("volume_rows needs at least one row of volumes, got none.")
    if not planes or any(plane not in PLANES for plane in planes):
        raise ValueError(f"planes must be some of {list(PLANES)}, got {list(planes)}.")
    placed = {name: place_all(name, row, affine, spacing, channel)[:COLUMNS] for name, row in rows.items()}
    captions = captions or {}
    columns = max(len(row) for row in placed.values())
    heights = [cell_width * max(side_by_side(one, planes)[1] for one in row) for row in placed.values()]
    lines = 0.06 * len(heights) + 0.2 * sum(name in captions for name in placed) + 0.3 * bool(title)
    figure = new_figure(cell_width * columns + 0.3, sum(heights) + lines)
    grid = figure.subplots(len(placed), columns, squeeze=False, height_ratios=heights)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    for number, (cells, (name, row)) in enumerate(zip(grid, placed.items(), strict=True)):
        cells[0].set_ylabel(name, fontsize=8)
        for index, axes in enumerate(cells):
            if index >= len(row):
                axes.set_axis_off()
                continue
            draw_views(axes, row[index], planes, window, letters=number == index == 0)
            if name in captions:
                axes.set_title(captions[name][index], fontsize=8, pad=2)
    figure.suptitle(title)
    return figure


def place_all(
    name: str, volumes: Iterable[Any], affine: Any, spacing: Sequence[float] | None, channel: int
) -> list[Placed]:
    """Every volume of a row, placed; a row of another shape is refused by its name."""
    try:
        found = [place(volume, affine, spacing, channel) for volume in volumes]
    except ValueError as error:
        raise ValueError(f"Row {name!r} must be (B, C, X, Y, Z) or a sequence of volumes: {error}") from None
    if not found:
        raise ValueError(f"Row {name!r} holds no volume.")
    return found


def side_by_side(volume: Placed, planes: Sequence[PlaneName]) -> tuple[float, float]:
    """Width in mm of the planes side by side, and height over width."""
    sizes = [size * step for size, step in zip(volume.voxels.shape, volume.spacing, strict=True)]
    width = sum(sizes[PLANES[plane].across] for plane in planes)
    return width, max(sizes[PLANES[plane].up] for plane in planes) / width


def draw_views(
    axes: Axes,
    volume: Placed,
    planes: Sequence[PlaneName] = tuple(PLANES),
    window: tuple[float, float] = (0.0, 1.0),
    letters: bool = False,
    colours: str = "gray",
) -> None:
    """Draw the middle slices of a volume side by side into one axes, without ticks.

    Args:
        letters: also write the anatomical letters, and a bar of known length into the first slice.
    """
    width, ratio = side_by_side(volume, planes)
    height, offset = ratio * width, 0.0
    for plane in planes:
        low, high = volume.edges(PLANES[plane].across)
        draw_slice(axes, volume, plane, window=window, colours=colours, left=offset)
        if letters:
            write_letters(axes, plane, (offset / width, 0.0, (offset + high - low) / width, 1.0), size=6)
        offset += high - low
    if letters:
        _scale_bar(axes, width / len(planes), 0.98 * width, -height / 2 + 0.06 * height)
    axes.set(xlim=(0, width), ylim=(-height / 2, height / 2), facecolor="black", xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _scale_bar(axes: Axes, room: float, right: float, y: float, direction: int = 1) -> None:
    """A bar of 10, 20, 50, ... mm, at most a third of the room, with its length above it.

    Args:
        right: where it ends on the right side of the picture.
        direction: -1 where the axis runs from high to low values.
    """
    power = 10 ** math.floor(math.log10(room / 3))
    length = max(step * power for step in (1, 2, 5) if step * power <= room / 3)
    axes.plot([right - direction * length, right], [y, y], color=LETTER, linewidth=1.5, solid_capstyle="butt")
    text_style: dict[str, Any] = {"color": LETTER, "fontsize": 6, "path_effects": OUTLINE, "ha": "right"}
    axes.annotate(f"{length:g} mm", (right, y), (0, 2), textcoords="offset points", va="bottom", **text_style)
