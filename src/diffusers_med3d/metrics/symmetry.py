"""Likeness of left and right."""

import torch
from torch import Tensor


def left_right_symmetry(volumes: Tensor, max_shift: int = 4) -> Tensor:
    """Correlation of each volume (B, C, X, Y, Z), X from left to right, with its mirror image: 1 = symmetric.

    The mirror image is moved along X by up to `max_shift` voxels, and the highest correlation taken, so that the
    midline need not be the middle of the array. All voxels count, so the outline counts too; compare with scans: brains
    are not symmetric, and a sample above them is as wrong as one below.

    Returns:
        (B,); NaN for a constant volume.

    Raises:
        ValueError: volumes that are not 5-D or not wider than the shift.
    """
    if volumes.ndim != 5 or volumes.shape[2] <= max_shift:
        raise ValueError(f"Volumes must be (B, C, X, Y, Z) with X > {max_shift}, got {tuple(volumes.shape)}.")
    volumes = volumes.detach().float()
    size, mirrored = volumes.shape[2], volumes.flip(2)
    correlations = []
    for shift in range(-max_shift, max_shift + 1):
        here = volumes.narrow(2, max(shift, 0), size - abs(shift)).flatten(1)
        there = mirrored.narrow(2, max(-shift, 0), size - abs(shift)).flatten(1)
        here, there = here - here.mean(1, keepdim=True), there - there.mean(1, keepdim=True)
        correlations.append((here * there).sum(1) / (here.norm(dim=1) * there.norm(dim=1)))
    return torch.stack(correlations).amax(0)
