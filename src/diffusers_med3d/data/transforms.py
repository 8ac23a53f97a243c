"""MONAI transforms that make every scan a volume of the same size, spacing, orientation and intensity range."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForeground,
    GaussianSmooth,
    Orientation,
    ResizeWithPadOrCrop,
    Spacing,
)

FOREGROUND_THRESHOLD = 0.02
"""Voxels of a prepared volume above this count as foreground."""


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


def scale_foreground(volume: MetaTensor) -> MetaTensor:
    """Robust range: 0 stays 0 and the 99.5th percentile of what is above 0 becomes 1, clipped, channel by channel."""
    scaled = []
    for channel in volume:
        foreground = channel[channel > 0]
        if foreground.numel() == 0:
            raise ValueError("nothing in the scan is above 0; intensities must be positive on a background of 0.")
        scaled.append(channel / torch.quantile(foreground[:: max(1, foreground.numel() // 1_000_000)], 0.995))
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


def check_grid(volume: MetaTensor, volume_shape: Sequence[int], spacing: Sequence[float]) -> MetaTensor:
    """The volume as it is, if it has this size and spacing (ValueError)."""
    found = volume.pixdim.tolist()
    same_spacing = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, spacing, strict=True))
    if tuple(volume.shape[1:]) != tuple(volume_shape) or not same_spacing:
        raise ValueError(
            f"with registered=True every scan must have {tuple(volume_shape)} voxels of {tuple(spacing)} mm, got "
            f"{tuple(volume.shape[1:])} of {tuple(found)}; register them with examples/prepare_dataset.py."
        )
    return volume


def volume_transform(
    volume_shape: Sequence[int], spacing: Sequence[float], antialias: bool = False, registered: bool = False
) -> Compose:
    """Channel-first MetaTensor to (C, *volume_shape) in [0, 1], RAS, ``spacing`` mm; the affine follows every step.

    With ``antialias`` the scan goes through ``smooth_for_spacing`` first. With ``registered`` it must have this size
    and spacing already, and stays where it is.
    """
    if registered:
        same_grid = partial(check_grid, volume_shape=volume_shape, spacing=spacing)
        return Compose([check_positive, Orientation(axcodes="RAS"), same_grid, scale_foreground])
    smooth = [partial(smooth_for_spacing, spacing=spacing)] if antialias else []
    return Compose(
        [
            check_positive,
            Orientation(axcodes="RAS"),
            *smooth,
            Spacing(pixdim=tuple(spacing), mode="bilinear", padding_mode="zeros"),
            CropForeground(allow_smaller=True),
            ResizeWithPadOrCrop(spatial_size=tuple(volume_shape)),
            scale_foreground,
        ]
    )
