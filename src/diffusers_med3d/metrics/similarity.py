"""Likeness between volumes (MS-SSIM) and the diversity of a set."""

import random
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from monai.metrics.regression import compute_ms_ssim
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003, section 3.2
KERNEL_SIZE = 4  # MONAI's 11 refuses volumes under about 160 voxels a side; 4 takes all five scales at 64


def _scales(shape: torch.Size) -> int:
    """Most scales that MONAI takes at this size: size // (scales - 1)**2 must reach the kernel size."""
    for scales in range(len(WEIGHTS), 0, -1):
        if min(shape) // max(1, scales - 1) ** 2 >= KERNEL_SIZE:
            return scales
    raise ValueError(f"MS-SSIM needs at least {KERNEL_SIZE} voxels a side, got {tuple(shape)}.")


def ms_ssim(volumes: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity of pairs, for a data range of 1 (MONAI, Gaussian window of 4 voxels).

    Sides of 64 and more use the five scales of the paper; smaller volumes use as many as fit, with the weights of those
    rescaled to sum to one. Figures at different numbers of scales are not comparable.

    Args:
        volumes, reference: (B, C, X, Y, Z) in [0, 1].

    Returns:
        (B,), 1 for equal volumes.

    Raises:
        ValueError: if the shapes differ, are not 5-D, or a side is under 4 voxels.
    """
    if volumes.shape != reference.shape or volumes.ndim != 5:
        raise ValueError(
            f"Expected two (B, C, X, Y, Z) of one shape, got {tuple(volumes.shape)} and {tuple(reference.shape)}."
        )
    weights = WEIGHTS[: _scales(volumes.shape[2:])]
    weights = tuple(weight / sum(weights) for weight in weights)
    value = compute_ms_ssim(
        volumes.detach().float(), reference.detach().float(), 3, kernel_size=KERNEL_SIZE, weights=weights
    )
    return value.flatten(1).mean(1)


def ms_ssim_matrix(
    volumes: Tensor,
    labels: Sequence[int] | None = None,
    batch_size: int = 8,
    max_pairs: int | None = None,
    seed: int = 0,
) -> Tensor:
    """MS-SSIM of all pairs of one class: float32 (B, B), symmetric, NaN on the diagonal and where not compared.

    Args:
        volumes: (B, C, X, Y, Z) in [0, 1].
        labels: class of each volume; None puts all in one.
        batch_size: pairs compared at once.
        max_pairs: most pairs per class, drawn with `seed`; None for all.
    """
    labels = [0] * len(volumes) if labels is None else [int(label) for label in labels]
    if len(labels) != len(volumes):
        raise ValueError(f"{len(volumes)} volumes have {len(labels)} labels.")
    rng, pairs = random.Random(seed), []
    for label in sorted(set(labels)):
        of_class = list(combinations([i for i, own in enumerate(labels) if own == label], 2))
        pairs += of_class if max_pairs is None or len(of_class) <= max_pairs else rng.sample(of_class, max_pairs)
    matrix = torch.full((len(volumes), len(volumes)), float("nan"))
    for start in range(0, len(pairs), batch_size):
        first, second = (list(side) for side in zip(*pairs[start : start + batch_size], strict=True))
        values = ms_ssim(volumes[first], volumes[second]).cpu()
        matrix[first, second] = matrix[second, first] = values
    return matrix


class Diversity(NamedTuple):
    """Distances 1 - MS-SSIM within a set. A low mean alone may be collapse or blur; a near closest pair is collapse."""

    mean: float
    closest: float
    closest_pair: tuple[int, int]


def diversity(volumes: Tensor, batch_size: int = 8) -> Diversity:
    """Mean of 1 - MS-SSIM over all pairs of the set, and the closest pair.

    Give one class at a time, and read the answer beside that of as many real scans: blur lowers it as collapse does.

    Args:
        volumes: (B, C, X, Y, Z) in [0, 1], B >= 2.
        batch_size: pairs compared at once.

    Raises:
        ValueError: for fewer than two volumes.
    """
    if len(volumes) < 2:
        raise ValueError(f"Diversity needs at least 2 volumes, got {len(volumes)}.")
    pairs = torch.combinations(torch.arange(len(volumes)))
    distance = 1 - ms_ssim_matrix(volumes, batch_size=batch_size)[pairs[:, 0], pairs[:, 1]]
    closest = int(distance.argmin())
    return Diversity(distance.mean().item(), distance[closest].item(), tuple(pairs[closest].tolist()))
