"""Generated volumes in a notebook: turning in NiiVue where `ipyniivue` is installed, else as a picture."""

import importlib.util
from typing import Any

import nibabel
import numpy as np

from .anatomy import as_array, place
from .slices import volume_rows

VIEWERS = ("auto", "static", "niivue")
WIDGETS = 4


def show(volumes: Any, affine: Any, viewer: str = "auto", title: str = "samples", channel: int = 0) -> Any:
    """What a notebook displays of a batch of volumes.

    Args:
        volumes: (B, C, X, Y, Z) in [0, 1].
        affine: voxel to RAS millimetres, (4, 4), or (B, 4, 4).
        viewer: "niivue" is a row of `ipyniivue` widgets, three planes and a turning volume each; "static" is a
            matplotlib figure of the middle slices; "auto" is NiiVue where it is installed, else the figure.
        title: the name of the row in the figure, or of the volumes in NiiVue.
        channel: which one is drawn.

    Returns:
        the widgets (of at most 4 volumes, because a browser draws only so many) or the figure.

    Raises:
        ValueError: no such viewer, volumes of another rank.
        ImportError: NiiVue was asked for and is not installed.
    """
    if viewer not in VIEWERS:
        raise ValueError(f"viewer must be one of {VIEWERS}, got {viewer!r}.")
    arrays = as_array(volumes)
    if arrays.ndim != 5:
        raise ValueError(f"volumes must be (B, C, X, Y, Z), got {arrays.shape}.")
    affines = np.broadcast_to(np.asarray(affine, dtype=np.float64), (len(arrays), 4, 4))
    installed = importlib.util.find_spec("ipyniivue") is not None
    if viewer == "niivue" and not installed:
        raise ImportError("NiiVue needs the package ipyniivue: pip install ipyniivue, or the extra notebook.")
    if viewer == "static" or not installed:
        rows = [place(volume, one, channel=channel) for volume, one in zip(arrays, affines, strict=True)]
        return volume_rows({title: rows})
    from ipyniivue import NiiVue, Volume
    from ipywidgets import HBox, Layout

    viewers = []
    for index, (volume, one) in enumerate(zip(arrays[:WIDGETS, channel], affines, strict=False)):
        image = nibabel.Nifti1Image(volume, one)
        image.header.set_xyzt_units("mm")
        viewers.append(NiiVue(height=360, is_radiological_convention=True, sagittal_nose_left=True))
        viewers[-1].layout = Layout(flex="1")
        name = f"{title.replace('/', '-')}-{index}.nii"  # NiiVue tells the format by the end of the name
        viewers[-1].load_volumes([Volume(data=image.to_bytes(), name=name, cal_min=0.0, cal_max=1.0)])
    return HBox(viewers)
