"""MONAI transforms that make every scan a volume of the same size, spacing, orientation and intensity range."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCrop,
    CropForeground,
    GaussianSmooth,
    Orientation,
    ResizeWithPadOrCrop,
    Spacing,
)

from ..utils.wording import few

FOREGROUND_THRESHOLD = 0.02
"""Voxels of a prepared volume above this count as foreground."""

FITS = ("refuse", "shrink", "crop")
"""What may become of anatomy that is larger than the grid; see ``volume_transform``."""

MAX_LOST = 0.01
"""Share of the anatomy that may lie outside the grid before a scan is refused."""

ANATOMY = 0.1
"""Voxels above this share of the 99.5th percentile are anatomy, also where the background holds noise."""


def to_meta_tensor(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    """(X, Y, Z) or (X, Y, Z, C) array and affine to a channel-first MetaTensor (C, X, Y, Z)."""
    # Channel first before the MetaTensor is made: MONAI takes a 3-D MetaTensor for a 2-D picture with channels, and
    # crop and pad would then leave the third axis of the affine as it was.
    channel_first = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(channel_first)), affine=torch.tensor(affine))


def shift_volume(volume: torch.Tensor, shift: Sequence[int]) -> torch.Tensor:
    """Move (C, X, Y, Z) by whole voxels; what comes in is background."""
    for axis, steps in enumerate(shift):
        if steps == 0:
            continue
        volume = volume.roll(steps, 1 + axis)
        incoming = volume.narrow(1 + axis, 0, steps) if steps > 0 else volume.narrow(1 + axis, steps, -steps)
        incoming.zero_()
    return volume


def flip_and_shift(volume: torch.Tensor, generator: torch.Generator, max_shift: int) -> torch.Tensor:
    """Flip left-right half of the time and shift by up to ``max_shift`` whole voxels per axis.

    No interpolation, so nothing is blurred. What leaves on one side is background as long as the volume is padded.

    Args:
        volume: (C, X, Y, Z), RAS.
        generator: on the CPU.
    """
    if torch.rand((), generator=generator) < 0.5:
        volume = volume.flip(1)
    shifts = torch.randint(-max_shift, max_shift + 1, (3,), generator=generator).tolist()
    return shift_volume(volume, shifts).contiguous()


def check_positive(volume: MetaTensor) -> MetaTensor:
    """The volume as it is, if its intensities are positive on a background of 0; what lies below 0 would become 0.

    Raises:
        ValueError: a channel (of CT in Hounsfield units, or of z-scores) where what lies below 0 weighs more than 1 %
            of what lies above; so much is left to interpolation that overshoots.
    """
    for channel in volume:
        below, above = (float(side.double().sum()) for side in ((-channel).clamp(min=0), channel.clamp(min=0)))
        if above and below > 0.01 * above:
            raise ValueError(
                f"intensities reach from {float(channel.min()):.4g} to {float(channel.max()):.4g}; they must be "
                "positive on a background of 0 (shift them: Hounsfield units by 1024, say)."
            )
    return volume


def _thinned(values: torch.Tensor) -> torch.Tensor:
    return values[:: max(1, values.numel() // 1_000_000)]  # torch.quantile takes 16 million at most


def scale_foreground(volume: MetaTensor) -> MetaTensor:
    """Robust range: 0 stays 0 and the 99.5th percentile of what is above 0 becomes 1, clipped, channel by channel."""
    scaled = []
    for channel in volume:
        foreground = channel[channel > 0]
        if foreground.numel() == 0:
            raise ValueError("nothing in the scan is above 0; intensities must be positive on a background of 0.")
        scaled.append(channel / torch.quantile(_thinned(foreground), 0.995))
    return torch.stack(scaled).clamp(0.0, 1.0)


def smooth_for_spacing(volume: MetaTensor, spacing: Sequence[float]) -> MetaTensor:
    """Gaussian filter that turns the voxels of a scan into the larger ones that it is about to be resampled to.

    A voxel of width w averages like a Gaussian whose width at half height is w, so what is missing is one of variance
    (``spacing``^2 - w^2) / (8 ln 2), along every axis that gets coarser (Cardoso et al., MICCAI 2015, "Scale factor
    point spread function matching"). The background stays exactly 0.
    """
    sigmas = []
    for before, after in zip(volume.pixdim.tolist(), spacing, strict=True):
        sigmas.append(math.sqrt(max(after**2 - before**2, 0.0) / (8 * math.log(2))) / before)  # voxels
    return torch.where(volume > 0, GaussianSmooth(sigmas)(volume), 0.0)


class Placement(NamedTuple):
    """How a scan's anatomy lies in the grid."""

    size: tuple[float, ...]  # mm (X, Y, Z) of the box around its foreground
    lost: float  # share of its voxels above ANATOMY of the bright ones that lie outside the grid, 0 if all are in
    shrunk: float  # factor by which it was made smaller, 1 if it was not


def refuse_cut(placements: Mapping[str, Placement], volume_shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Refuse (ValueError, with names and both sizes) scans of which more than ``MAX_LOST`` lies outside the grid.

    Args:
        placements: by the name of each scan.
        volume_shape, spacing: of the grid.
    """
    cut = {name: placement for name, placement in placements.items() if placement.lost > MAX_LOST}
    if cut:
        grid = [round(side * step) for side, step in zip(volume_shape, spacing, strict=True)]
        odd = [
            f"{name}: anatomy of {[round(side) for side in one.size]} mm, {one.lost:.0%} would be cut off"
            for name, one in cut.items()
        ]
        raise ValueError(
            f"{len(cut)} of {len(placements)} scan(s) are larger than the grid of {grid} mm (volume_shape "
            f"{list(volume_shape)} x spacing {list(spacing)}). {few(odd, separator='; ')}. Choose a larger "
            "volume_shape or spacing, or fit='shrink' (--fit shrink), or 'crop' to cut them."
        )


def _resample(volume: MetaTensor, spacing: Sequence[float], antialias: bool) -> MetaTensor:
    volume = smooth_for_spacing(volume, spacing) if antialias else volume
    volume = Spacing(pixdim=tuple(spacing), mode="bilinear", padding_mode="zeros")(volume)
    return CropForeground(allow_smaller=True)(volume)


def _excess(volume: MetaTensor, volume_shape: Sequence[int]) -> float:
    return max(side / most for side, most in zip(volume.shape[1:], volume_shape, strict=True))


def _lost(volume: MetaTensor, volume_shape: Sequence[int]) -> float:
    """Share of the anatomy that centre cropping cuts off; background noise is none."""
    if _excess(volume, volume_shape) <= 1:
        return 0.0
    plain = volume.as_tensor()
    bright = torch.stack([torch.quantile(_thinned(c[c > 0]), 0.995) if (c > 0).any() else c.max() for c in plain])
    anatomy = (plain > ANATOMY * bright.view(-1, 1, 1, 1)).any(0)
    inside = CenterSpatialCrop(tuple(volume_shape))(anatomy[None])
    return 1 - float(inside.sum()) / max(float(anatomy.sum()), 1.0)


def _check_grid(volume: MetaTensor, volume_shape: Sequence[int], spacing: Sequence[float]) -> None:
    found = volume.pixdim.tolist()
    same_spacing = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, spacing, strict=True))
    if tuple(volume.shape[1:]) != tuple(volume_shape) or not same_spacing:
        raise ValueError(
            f"a registered scan must have {tuple(volume_shape)} voxels of {tuple(spacing)} mm, got "
            f"{tuple(volume.shape[1:])} of {tuple(found)}; register it with examples/prepare_dataset.py."
        )


def place(
    volume: MetaTensor,
    volume_shape: Sequence[int],
    spacing: Sequence[float],
    antialias: bool = False,
    fit: str = "crop",
    registered: bool = False,
) -> tuple[MetaTensor, Placement]:
    """Prepared volume, as by ``volume_transform``, and how its anatomy lies in the grid; "refuse" is the caller's."""
    if fit not in FITS:
        raise ValueError(f"fit must be one of {list(FITS)}, got {fit!r}.")
    scan = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(check_positive(volume))
    if registered:
        _check_grid(scan, volume_shape, spacing)
        anatomy = CropForeground(allow_smaller=True)(scan)
        size = tuple(side * step for side, step in zip(anatomy.shape[1:], spacing, strict=True))
        return scale_foreground(scan), Placement(size, lost=0.0, shrunk=1.0)
    volume = _resample(scan, spacing, antialias)
    size = tuple(side * step for side, step in zip(volume.shape[1:], spacing, strict=True))
    shrunk = 1.0
    while fit == "shrink" and (excess := _excess(volume, volume_shape)) > 1:  # rounding may leave a voxel too many
        shrunk *= excess
        volume = _resample(scan, [step * shrunk for step in spacing], antialias)
    placement = Placement(size, _lost(volume, volume_shape), shrunk)
    return scale_foreground(ResizeWithPadOrCrop(spatial_size=tuple(volume_shape))(volume)), placement


def volume_transform(
    volume_shape: Sequence[int],
    spacing: Sequence[float],
    antialias: bool = False,
    fit: str = "refuse",
    registered: bool = False,
) -> Callable[[MetaTensor], MetaTensor]:
    """Channel-first MetaTensor to (C, *volume_shape) in [0, 1], RAS, ``spacing`` mm; the affine follows every step.

    Args:
        volume_shape, spacing: of the result.
        antialias: the scan goes through ``smooth_for_spacing`` first.
        fit: what becomes of anatomy that is larger than the grid: "refuse" raises a ValueError, "shrink" takes larger
            voxels for this scan (its affine says so), "crop" cuts it about its centre.
        registered: the scan has this size and spacing already (ValueError) and stays where it lies.
    """

    def transform(volume: MetaTensor) -> MetaTensor:
        prepared, placement = place(volume, volume_shape, spacing, antialias, fit, registered)
        if fit == "refuse":
            refuse_cut({"this scan": placement}, volume_shape, spacing)
        return prepared

    return transform
