"""Pictures of volumes and curves. Figures are made without pyplot, so nothing is global and no display is needed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..utils.files import whole_file


def _draw_views(axes: Axes, volume: torch.Tensor, spacing: Sequence[float]) -> None:
    """Draws axial, coronal and sagittal mid-slices of one RAS volume (X, Y, Z) side by side, in millimetres.

    Axes of a RAS array grow towards right, anterior, superior. The pictures follow the radiological convention: the
    patient's right is on the left side of axial and coronal pictures, anterior is on the left of the sagittal one.
    """
    x, y, z = (size // 2 for size in volume.shape)
    size_mm = [size * step for size, step in zip(volume.shape, spacing, strict=True)]
    # Each: picture as (column, row upwards), width and height in mm, letters at (left, right, top).
    views = (
        (volume[:, :, z].flip(0), size_mm[0], size_mm[1], "RLA"),  # axial
        (volume[:, y, :].flip(0), size_mm[0], size_mm[2], "RLS"),  # coronal
        (volume[x, :, :].flip(0), size_mm[1], size_mm[2], "APS"),  # sagittal
    )
    height = max(view[2] for view in views)
    offset = 0.0
    for picture, width, view_height, letters in views:
        low = (height - view_height) / 2
        extent = (offset, offset + width, low, low + view_height)
        axes.imshow(picture.T.numpy(), cmap="gray", vmin=0, vmax=1, origin="lower", extent=extent)
        style: dict[str, Any] = {"color": "#ffb000", "fontsize": 6, "va": "center", "ha": "center"}
        axes.text(offset + 0.03 * width, height / 2, letters[0], **style)
        axes.text(offset + 0.97 * width, height / 2, letters[1], **style)
        axes.text(offset + 0.5 * width, low + 0.97 * view_height, letters[2], **style)
        offset += width
    axes.set(xlim=(0, offset), ylim=(0, height), facecolor="black", xticks=[], yticks=[], aspect="equal")


def orthogonal_views(rows: Mapping[str, torch.Tensor], spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> Figure:
    """Mid-slices of volumes: one named row per entry, one cell (axial | coronal | sagittal) per volume.

    Args:
        rows: name -> (B, 1, X, Y, Z) in [0, 1], RAS axes. B may differ from row to row.
        spacing: voxel size in mm, so that anisotropic voxels keep their shape.

    Raises:
        ValueError: if there is no row, or a row is not (B, 1, X, Y, Z).
    """
    if not rows:
        raise ValueError("orthogonal_views needs at least one row of volumes, got none.")
    for name, volumes in rows.items():
        if volumes.ndim != 5 or volumes.shape[1] != 1 or volumes.shape[0] == 0:
            raise ValueError(f"Row {name!r} must be (B, 1, X, Y, Z) with B >= 1, got {tuple(volumes.shape)}.")
    columns = max(volumes.shape[0] for volumes in rows.values())
    figure = Figure(figsize=(3.6 * columns + 0.3, 1.45 * len(rows) + 0.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, volumes) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(name, fontsize=8)
        cpu = volumes.detach().float().cpu()
        for index, axes in enumerate(row):
            if index < len(cpu):
                _draw_views(axes, cpu[index, 0], spacing)
            else:
                axes.set_axis_off()
    return figure


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str = "step", ylabel: str = ""
) -> Figure:
    """Lines over a common axis; `series` maps a name to its (x values, y values), both of the same length.

    Raises:
        ValueError: if there is no series, or x and y of one differ in length.
    """
    if not series:
        raise ValueError("curves needs at least one series, got none.")
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (x, y) in series.items():
        if len(x) != len(y):
            raise ValueError(f"Series {name!r} has {len(x)} x values and {len(y)} y values.")
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=3)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def intervals(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], xlabel: str = "") -> Figure:
    """Figures with their intervals: one panel per entry with a scale of its own, one row per set, a line at 0.

    Args:
        panels: title -> {set: (value, low, high)}; low and high may be NaN.
        xlabel: under every panel.

    Raises:
        ValueError: if there is no panel.
    """
    if not panels:
        raise ValueError("intervals needs at least one panel, got none.")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    sets = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(3.3 * columns, rows * (1.1 + 0.28 * sets)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        for row, (value, low, high) in enumerate(panel.values()):
            axes.plot([low, high], [row, row], color="#666666", linewidth=1.5)
            axes.plot(value, row, "o", markersize=4)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8)
        axes.set_yticks(range(len(panel)), list(panel), fontsize=7)
        axes.set_title(title, fontsize=7)
        axes.set_xlabel(xlabel, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.invert_yaxis()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def stage_distances(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], floor_errors: Sequence[float], title: str = ""
) -> Figure:
    """Distance against stage: one panel per measure, a point with its standard error per stage, the floor at 0.

    Args:
        panels: measure -> {stage: (excess over the floor, standard error)}; all with the same stages.
        floor_errors: standard error of the floor in each panel, drawn as a band around 0.
        title: over all panels.

    Raises:
        ValueError: no panel, or another number of floors.
    """
    if not panels or len(floor_errors) != len(panels):
        raise ValueError(f"stage_distances needs a floor for each panel, got {len(panels)} and {len(floor_errors)}.")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, panel), floor_error in zip(grid, panels.items(), floor_errors, strict=False):
        places = range(len(panel))
        values, errors = zip(*panel.values(), strict=True)
        axes.axhspan(-floor_error, floor_error, color="#999999", alpha=0.25, linewidth=0)
        axes.axhline(0, color="#666666", linewidth=0.8, label="floor: training scans, ± standard error")
        axes.errorbar(places, values, errors, fmt="o", markersize=4, capsize=2, label="± standard error")
        axes.set_xticks(places, list(panel), rotation=35, ha="right", fontsize=7)
        axes.set_title(name, fontsize=8)
        axes.set_ylabel("excess over the floor", fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=6)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=8, wrap=True)
    return figure


def bands(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Lines with their intervals over a common axis; `series` maps a name to (x, y, low, high).

    Raises:
        ValueError: if there is no series, or the four of one differ in length.
    """
    if not series:
        raise ValueError("bands needs at least one series, got none.")
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in series.items():
        if len({len(one) for one in values}) != 1:
            raise ValueError(f"Series {name!r} has {[len(one) for one in values]} values of x, y, low and high.")
        x, y, low, high = values
        (line,) = axes.plot(x, y, label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def histogram(series: Mapping[str, Sequence[float]], xlabel: str, bins: int = 20) -> Figure:
    """Shares of each series in common bins, as outlines; values that are not finite are left out.

    Raises:
        ValueError: if no series holds a finite value.
    """
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in series.items()}
    together = [value for values in finite.values() for value in values]
    if not together:
        raise ValueError(f"histogram needs at least one finite value, got none in {list(series)}.")
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    low, high = min(together), max(together)
    span = (high - low) or 1.0
    edges = [low + span * k / bins for k in range(bins + 1)]
    for name, values in finite.items():
        if values:
            axes.hist(
                values, edges, weights=[1 / len(values)] * len(values), histtype="step", label=f"{name} ({len(values)})"
            )
    axes.set(xlabel=xlabel, ylabel="share of volumes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Writes `figure` to `path` (format from the suffix), making its folder.

    A reader, or an interrupted run, never sees half a file: the picture is written beside it and then moved.
    """
    path = Path(path)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or None)
    return path
