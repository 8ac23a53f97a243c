"""A grid for a data set whose user names none: fine enough for its voxels, small enough to train on."""

import math
from collections.abc import Sequence

import nibabel
import numpy as np

from ..utils.wording import few, times

SIDE_MULTIPLE = 16
"""Default networks halve a volume twice in the autoencoder and twice in the generator."""
MAX_VOXELS = 350_000
MARGIN = 2  # voxels: interpolation widens what is above 0 by up to one on either side
SAME_SPACING = 1.05
"""Voxel sizes count as the same up to this factor."""
SAME_SIZE = 2.0
"""The same for the anatomy, whose size differs from person to person."""
COARSER = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10)


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """Voxel size in mm along the axes nearest to right, anterior and superior, from an affine (4, 4)."""
    axes = nibabel.io_orientation(affine)[:, 0].argsort()
    return tuple(float(side) for side in np.linalg.norm(affine[:3, :3], axis=0)[axes])


def odd_spacings(names: Sequence[str], spacings: Sequence[Sequence[float]]) -> str:
    """Sentence that names the scans whose voxel size is not the commonest; "" if there is none."""
    rounded = [tuple(round(side, 1) for side in spacing) for spacing in spacings]
    usual = spacings[rounded.index(max(sorted(set(rounded)), key=rounded.count))]
    return _odd_ones(names, spacings, usual, SAME_SPACING, "voxels of another size than the commonest")


def odd_sizes(names: Sequence[str], sizes: Sequence[Sequence[float]]) -> str:
    """Sentence that names the scans whose anatomy is less than half or more than twice as large as usual; or ""."""
    return _odd_ones(
        names,
        sizes,
        np.median(sizes, axis=0).tolist(),
        SAME_SIZE,
        "anatomy less than half or more than twice as large as usual",
    )


def _odd_ones(
    names: Sequence[str], values: Sequence[Sequence[float]], usual: Sequence[float], factor: float, what: str
) -> str:
    ratios = np.abs(np.log(np.array(values) / np.array(usual))).max(1)
    odd = [
        f"{name} ({times(own)} mm)"
        for name, own, ratio in zip(names, values, ratios, strict=True)
        if ratio > math.log(factor)
    ]
    return f"{len(odd)} of {len(names)} scans have {what}, {times(usual)} mm: {few(odd)}." if odd else ""


def choose_grid(
    foregrounds: Sequence[Sequence[float]],
    spacings: Sequence[Sequence[float]],
    spacing: Sequence[float] | None = None,
    volume_shape: Sequence[int] | None = None,
    max_voxels: int = MAX_VOXELS,
    registered: bool = False,
) -> tuple[list[int], list[float], str]:
    """Volume shape, spacing in mm, and a sentence that says how they were chosen.

    Args:
        foregrounds: size (X, Y, Z) in mm of the box of each scan's foreground.
        spacings: voxel size (X, Y, Z) in mm of each scan.
        spacing, volume_shape: what is given already.
        max_voxels: voxels of the grid; the spacing gets coarser until they suffice.
        registered: scans will be turned and scaled, so their boxes do not say what a given grid holds; whoever writes
            them checks it.

    Raises:
        ValueError: a given grid that does not hold the largest foreground, with both sizes.
    """
    largest, usual = np.max(foregrounds, axis=0), np.median(spacings, axis=0)
    box = " x ".join(f"{side:.0f}" for side in largest)
    if spacing is not None and volume_shape is not None:
        size = np.array(spacing) * volume_shape
        if not registered and (size < largest - 0.5 * np.array(spacing)).any():
            held = " x ".join(f"{side:.0f}" for side in size)
            raise ValueError(
                f"the largest foreground is {box} mm, the grid of {list(volume_shape)} voxels at {list(spacing)} mm "
                f"holds {held} mm; leave out --volume_shape to have it chosen."
            )
        when = " before registration" if registered else ""
        return list(volume_shape), list(spacing), f"Grid as asked for; the largest foreground{when} is {box} mm."
    if volume_shape is not None:
        step = max(float((largest / (np.array(volume_shape) - MARGIN)).max()), float(usual.max()))
        spacing = [math.ceil(step * 20) / 20] * 3
        return (
            list(volume_shape),
            spacing,
            (f"Spacing {spacing[0]:g} mm: with it the shape asked for holds the largest foreground, {box} mm."),
        )
    if spacing is not None:
        shape = _shape(largest, np.array(spacing))
        return shape, list(spacing), f"Volume shape {shape}: at the spacing asked for it holds {box} mm, the largest."
    # Near-isotropic voxels become cubes; thick slices keep their proportions, since there is nothing between them
    finest = usual if usual.max() > 2 * usual.min() else np.full(3, usual.max())
    for factor in COARSER:
        steps = [round(float(side), 2) for side in finest * factor]
        shape = _shape(largest, np.array(steps))
        if math.prod(shape) <= max_voxels:
            break
    return (
        shape,
        steps,
        (
            f"Grid {' x '.join(map(str, shape))} at {' x '.join(f'{side:g}' for side in steps)} mm: the finest of at "
            f"most {max_voxels} voxels that holds the largest foreground, {box} mm, and is no finer than the scans "
            f"({' x '.join(f'{side:.2f}' for side in usual)} mm, median)."
        ),
    )


def _shape(largest: np.ndarray, spacing: np.ndarray) -> list[int]:
    sides = np.ceil(largest / spacing) + MARGIN
    return [int(SIDE_MULTIPLE * math.ceil(side / SIDE_MULTIPLE)) for side in sides]
