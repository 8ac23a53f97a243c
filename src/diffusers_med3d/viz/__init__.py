"""Pictures of volumes and of what was measured, as matplotlib figures of one style."""

from .anatomy import PLANES, Placed, place
from .comparison import before_after, difference_map
from .curves import bands, curve_panels, curves, histogram, intervals, ratio_bars, stage_distances
from .film import write_film
from .notebook import show
from .page import Picture, Section, html_page
from .slices import orthogonal_views, slice_grid, volume_rows
from .spectrum import spectrum_strip
from .style import png_bytes, save

__all__ = [
    "PLANES",
    "Picture",
    "Placed",
    "Section",
    "bands",
    "before_after",
    "curve_panels",
    "curves",
    "difference_map",
    "histogram",
    "html_page",
    "intervals",
    "orthogonal_views",
    "place",
    "png_bytes",
    "ratio_bars",
    "save",
    "show",
    "slice_grid",
    "spectrum_strip",
    "stage_distances",
    "volume_rows",
    "write_film",
]
