"""The noise spectrum of a scan: versions from clean to noise as a strip, with the scores that rewards give them."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from .anatomy import draw_slice, write_letters
from .slices import place_all
from .style import new_figure, styled


@styled
def spectrum_strip(
    versions: Mapping[str, Any],
    scores: Mapping[str, Sequence[float]],
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    channel: int = 0,
) -> Figure:
    """Versions of one scan from left to right, as middle axial slices, and below each its score by every reward.

    Args:
        versions: name (such as "scan", "round trip", "0.3") -> (C, X, Y, Z) or (X, Y, Z), in the order of the strip.
        scores: name of a reward -> one score per version.
        affine, spacing, channel: as in `place`.
        window: intensities that become black and white.
        title: over the figure.

    Raises:
        ValueError: see `place`; fewer than two versions; scores of another number.
    """
    if len(versions) < 2:
        raise ValueError(f"A spectrum needs at least two versions, got {list(versions)}.")
    for name, values in scores.items():
        if len(values) != len(versions):
            raise ValueError(f"{name!r} has {len(values)} scores for {len(versions)} versions.")
    placed = place_all("versions", versions.values(), affine, spacing, channel)
    first = placed[0]
    ratio = first.voxels.shape[1] * first.spacing[1] / (first.voxels.shape[0] * first.spacing[0])
    cell = min(1.5, 12 / len(placed))
    picture = cell * ratio
    chart = 1.7 if scores else 0.0
    figure = new_figure(cell * len(placed) + 0.7, picture + chart + 0.3 + 0.3 * bool(title))
    grid = figure.add_gridspec(2 if scores else 1, len(placed), height_ratios=[picture, chart][: 2 if scores else 1])
    figure.get_layout_engine().set(w_pad=0.02, wspace=0)  # type: ignore[union-attr, call-arg]
    for column, (name, volume) in enumerate(zip(versions, placed, strict=True)):
        axes = figure.add_subplot(grid[0, column])
        draw_slice(axes, volume, "axial", window=window)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name.replace("_", " "), fontsize=8, pad=3)
        if column == 0:
            write_letters(axes, "axial")
    if scores:
        chart_axes = figure.add_subplot(grid[1, :])
        places = range(len(placed))
        for name, values in scores.items():
            chart_axes.plot(places, values, marker="o", markersize=4, label=name)
        chart_axes.set(xlim=(-0.5, len(placed) - 0.5), ylabel="score")
        chart_axes.set_xticks(places, [name.replace("_", " ") for name in versions], fontsize=7)
        chart_axes.grid(axis="y")
        chart_axes.legend()
    figure.suptitle(title)
    return figure
