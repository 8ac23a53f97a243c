"""Two volumes compared: samples before and after, and the difference of two volumes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .anatomy import PLANES, Placed, place
from .slices import draw_views, side_by_side, volume_rows
from .style import new_figure, styled

DIFFERENCE_COLOURS = "RdBu_r"


def before_after(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    channel: int = 0,
) -> Figure:
    """Strips of the same samples before and after: for every name one row of each.

    Args:
        before, after: name (such as a class) -> (B, C, X, Y, Z), with the same names and as many volumes.
        affine, spacing, window, title, channel: as in `volume_rows`.

    Raises:
        ValueError: names or numbers of volumes that differ; see `volume_rows`.
    """
    if list(before) != list(after):
        raise ValueError(f"before and after must have the same names, got {list(before)} and {list(after)}.")
    for name in before:
        if len(before[name]) != len(after[name]):
            raise ValueError(f"{name!r} has {len(before[name])} volumes before and {len(after[name])} after.")
    rows: dict[str, Any] = {}
    for name in before:
        rows |= {f"{name}, before": before[name], f"{name}, after": after[name]}
    return volume_rows(rows, affine, spacing, window=window, title=title, channel=channel)


@styled
def difference_map(
    first: Any,
    second: Any,
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    names: tuple[str, str] = ("before", "after"),
    limit: float | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    channel: int = 0,
) -> Figure:
    """Two volumes and what the second has more (red) or less (blue) of, as middle slices in three planes.

    Args:
        first, second: (X, Y, Z) or (C, X, Y, Z) of one shape, tensors, arrays or `Placed`.
        affine, spacing, channel: as in `place`.
        names: of the two.
        limit: difference at which the colours end; None takes the largest absolute difference but for one voxel in a
            thousand.
        window: intensities that become black and white.

    Raises:
        ValueError: see `place`; shapes that differ; a limit that is not positive.
    """
    one, other = (place(volume, affine, spacing, channel) for volume in (first, second))
    if one.voxels.shape != other.voxels.shape:
        raise ValueError(f"Two volumes of one shape are compared, got {one.voxels.shape} and {other.voxels.shape}.")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}.")
    change = other.voxels - one.voxels
    end = float(np.quantile(np.abs(change), 0.999)) or 1.0 if limit is None else limit
    figure = new_figure(7.0, 3 * (5.9 * side_by_side(one, tuple(PLANES))[1]) + 0.2)
    panels = {
        names[0]: (one, window, "gray"),
        names[1]: (other, window, "gray"),
        f"{names[1]} - {names[0]}": (Placed(change, one.spacing, one.centre), (-end, end), DIFFERENCE_COLOURS),
    }
    for number, (axes, (name, (volume, ends, colours))) in enumerate(
        zip(figure.subplots(3, 1), panels.items(), strict=True)
    ):
        draw_views(axes, volume, window=ends, letters=number == 0, colours=colours)
        axes.set_ylabel(name)
        if colours != "gray":
            axes.set_facecolor("white")
            figure.colorbar(axes.images[0], ax=axes, label="difference", shrink=0.9)
    return figure
