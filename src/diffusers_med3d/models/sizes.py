"""Checks of sizes and volumes, with the nearest size that fits in the message."""

from collections.abc import Sequence

import torch

from ..utils.checks import three_numbers


def check_divisible(shape: Sequence[int], divisor: int, what: str) -> tuple[int, int, int]:
    """A spatial size as whole numbers; sizes that are not positive multiples of ``divisor`` are refused.

    Args:
        shape: spatial size (X, Y, Z) in voxels.
        divisor: what every side must be a multiple of.
        what: name of the thing whose size this is, for the message.

    Raises:
        ValueError: names the size found and the nearest that fits.
    """
    sides = three_numbers(shape)
    if sides is None or not all(side.is_integer() for side in sides):
        raise ValueError(f"{what} must have three sides (X, Y, Z), whole numbers, got {shape!r:.200}.")
    x, y, z = (int(side) for side in sides)
    shape = (x, y, z)
    if any(side < divisor or side % divisor for side in shape):
        nearest = tuple(max(divisor, round(side / divisor) * divisor) for side in shape)
        raise ValueError(
            f"{what} {shape} must be a multiple of {divisor} on every side; the nearest that fits is {nearest}."
        )
    return x, y, z


def check_volumes(volumes: torch.Tensor, channels: int) -> None:
    """Refuse anything that is not a finite (B, C, X, Y, Z) tensor with ``channels`` channels."""
    if not torch.is_tensor(volumes):
        raise TypeError(f"volumes must be a torch.Tensor, got {type(volumes).__name__}.")
    if volumes.ndim != 5:
        raise ValueError(f"volumes must have shape (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
    if volumes.shape[1] != channels:
        raise ValueError(f"volumes must have {channels} channel(s), got {volumes.shape[1]} in {tuple(volumes.shape)}.")
    if not torch.isfinite(volumes).all():
        raise ValueError(f"volumes hold {int((~torch.isfinite(volumes)).sum())} NaN or infinite voxels.")
