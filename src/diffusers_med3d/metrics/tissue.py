"""Volumes of tissue classes, from any segmenter."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Segmenter = Callable[[Tensor], Tensor]
"""Volumes (B, C, X, Y, Z) to whole-number label maps (B, X, Y, Z) or (B, 1, X, Y, Z), 0 being background."""


def tissue_volumes(volumes: Tensor, segmenter: Segmenter, num_tissues: int, spacing: Sequence[float]) -> Tensor:
    """Millilitres of each tissue: (B, num_tissues), tissue 1 first.

    Args:
        volumes: (B, C, X, Y, Z).
        segmenter: any callable; one that works on scans may fail on samples, so look at its maps.
        num_tissues: labels 1 to this count.
        spacing: voxel size in mm.

    Raises:
        ValueError: the segmenter's answer has another shape, is not whole numbers, or holds labels beyond.
    """
    labels = segmenter(volumes)
    if labels.ndim == 5 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(volumes), *volumes.shape[2:]) or labels.is_floating_point():
        raise ValueError(
            f"The segmenter must give whole numbers of shape {(len(volumes), *volumes.shape[2:])}, "
            f"got {labels.dtype} {tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() > num_tissues:
        raise ValueError(f"Labels must lie in 0 to {num_tissues}, got {int(labels.min())} to {int(labels.max())}.")
    millilitres = math.prod(spacing) / 1000
    return torch.stack([(labels == k).flatten(1).sum(1) for k in range(1, num_tissues + 1)], 1).float() * millilitres


def intensity_tissues(volumes: Tensor, num_tissues: int = 3, background: float = 0.05, steps: int = 20) -> Tensor:
    """A segmenter without a network: k-means of each volume's intensities above `background`, darkest tissue = 1.

    On T1 scans without skull the three classes are roughly fluid, grey and white matter. It knows no anatomy: partial
    volume and bias fields shift its borders, for scans and samples alike.

    Returns:
        int64 (B, X, Y, Z)
    """
    labels = torch.zeros(len(volumes), *volumes.shape[2:], dtype=torch.long)
    for volume, out in zip(volumes.detach().float().cpu().mean(1), labels, strict=True):
        inside = volume > background
        values = volume[inside]
        if len(values) < num_tissues:
            continue
        centres = torch.quantile(
            values[:: max(1, len(values) // 1_000_000)], (torch.arange(num_tissues) + 0.5) / num_tissues
        )
        for _ in range(steps):
            member = (values[:, None] - centres).abs().argmin(1)
            sums = torch.zeros(num_tissues).index_add_(0, member, values)
            counts = torch.bincount(member, minlength=num_tissues)
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres).sort().values
        out[inside] = (values[:, None] - centres).abs().argmin(1) + 1
    return labels
