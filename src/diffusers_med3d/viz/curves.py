"""Curves of rewards and measures, distances with their intervals, histograms."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import new_figure, styled


@styled
def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str = "step", ylabel: str = ""
) -> Figure:
    """Lines over a common axis; `series` maps a name to its (x values, y values), both of the same length.

    Raises:
        ValueError: if there is no series, or x and y of one differ in length.
    """
    if not series:
        raise ValueError("curves needs at least one series, got none.")
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    _draw_curves(axes, series)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def _draw_curves(axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    for name, (x, y) in series.items():
        if len(x) != len(y):
            raise ValueError(f"Series {name!r} has {len(x)} x values and {len(y)} y values.")
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None, markersize=3)
    axes.grid()


@styled
def curve_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], xlabel: str = "step", title: str = ""
) -> Figure:
    """`curves` side by side, one panel with a scale of its own per entry: title -> {name: (x values, y values)}.

    Raises:
        ValueError: if there is no panel, or x and y of a series differ in length.
    """
    if not panels:
        raise ValueError("curve_panels needs at least one panel, got none.")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(3.4 * columns, 2.4 * rows + 0.3 * bool(title))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, series) in zip(grid, panels.items(), strict=False):
        _draw_curves(axes, series)
        axes.set(title=name, xlabel=xlabel)
        if len(series) > 1:
            axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    return figure


@styled
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
    figure = new_figure(3.3 * columns, rows * (1.1 + 0.28 * sets))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        for row, (value, low, high) in enumerate(panel.values()):
            axes.plot([low, high], [row, row], color="#666666", linewidth=1.5)
            axes.plot(value, row, "o", markersize=4)
        axes.axvline(0, color="#bbbbbb", linewidth=0.8)
        axes.set_yticks(range(len(panel)), list(panel))
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(xlabel)
        axes.invert_yaxis()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


@styled
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
    figure = new_figure(5.5 * columns, 3.4 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, panel), floor_error in zip(grid, panels.items(), floor_errors, strict=False):
        places = range(len(panel))
        values, errors = zip(*panel.values(), strict=True)
        axes.axhspan(-floor_error, floor_error, color="#999999", alpha=0.25, linewidth=0)
        axes.axhline(0, color="#666666", linewidth=0.8, label="floor: training scans, ± standard error")
        axes.errorbar(places, values, errors, fmt="o", markersize=4, capsize=2, label="± standard error")
        axes.set_xticks(places, list(panel), rotation=35, ha="right")
        axes.set_title(name)
        axes.set_ylabel("excess over the floor")
        axes.grid(axis="y")
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, wrap=True)
    return figure


@styled
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
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for name, values in series.items():
        if len({len(one) for one in values}) != 1:
            raise ValueError(f"Series {name!r} has {[len(one) for one in values]} values of x, y, low and high.")
        x, y, low, high = values
        (line,) = axes.plot(x, y, label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid()
    axes.legend()
    return figure


@styled
def histogram(series: Mapping[str, Sequence[float]], xlabel: str, bins: int = 20) -> Figure:
    """Shares of each series in common bins, as outlines; values that are not finite are left out.

    Raises:
        ValueError: if no series holds a finite value.
    """
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in series.items()}
    together = [value for values in finite.values() for value in values]
    if not together:
        raise ValueError(f"histogram needs at least one finite value, got none in {list(series)}.")
    figure = new_figure(6, 3.6)
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
    axes.grid()
    axes.legend(loc="upper left")
    return figure


@styled
def ratio_bars(ratios: Mapping[str, tuple[float, float, float, float | None]], xlabel: str = "") -> Figure:
    """One horizontal bar per ratio with its spread, a line at 1, and a mark at the most that was asked for.

    Args:
        ratios: name -> (value, low, high, most), `most` being None where nothing was asked for.
        xlabel: under the axis.

    Raises:
        ValueError: if there is no ratio.
    """
    if not ratios:
        raise ValueError("ratio_bars needs at least one ratio, got none.")
    figure = new_figure(8, 0.9 + 0.25 * len(ratios))
    axes = figure.subplots()
    for place, (value, low, high, most) in enumerate(ratios.values()):
        axes.barh(place, value, xerr=[[value - low], [high - value]], color="#0072b2", alpha=0.7, ecolor="#666666")
        if most is not None:
            axes.plot([most, most], [place - 0.4, place + 0.4], color="#d55e00", linewidth=2)
    axes.axvline(1, color="#666666", linewidth=0.8)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_xlabel(f"{xlabel}; orange: at most" if xlabel else "orange: at most")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    return figure
