"""Volumes in the middle of larger grids."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def centred(volumes: Tensor, shape: Sequence[int]) -> Tensor:
    """Volumes (B, C, X, Y, Z) in the middle of ``shape`` (three sides, none shorter), with 0 around them; where the
    difference is odd, the odd voxel is at the far end."""
    gaps = [wanted - side for wanted, side in zip(shape, volumes.shape[2:], strict=True)]
    return F.pad(volumes, [part for gap in reversed(gaps) for part in (gap // 2, gap - gap // 2)])  # Z, Y, X
