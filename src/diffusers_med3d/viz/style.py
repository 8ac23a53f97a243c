"""The one style of all figures, and how a figure becomes a file.

Figures are made without pyplot, so nothing is global and no display is needed.
"""

import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from matplotlib import rc_context, rcdefaults
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from ..utils.files import whole_file

DPI = 110
LETTER = "#ffb000"
"""Colour of what is written onto volumes: anatomical letters and the scale bar."""

_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    # Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow
    "axes.prop_cycle": cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]),
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def styled(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function, run with the style of this package, whatever the caller's matplotlib settings are."""

    @wraps(function)
    def with_style(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with rc_context():
            rcdefaults()
            with rc_context(_RC):
                return function(*args, **kwargs)

    return with_style


class NotebookFigure(Figure):
    """A figure that a notebook draws although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, with room made for every label."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file (format from the suffix), making its folder.

    A reader, or an interrupted run, never sees half a file: the picture is written beside it and then moved.

    Returns:
        the path.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".") or "png"
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata={"Software": None} if kind == "png" else None)
    return path
