"""Do samples lie where scans lie, and do they reach all of them? Nearest-neighbour balls in a feature space."""

from typing import NamedTuple

import torch
from torch import Tensor


class Manifold(NamedTuple):
    """One entry per volume; the figure is the mean of each."""

    precision: Tensor  # (N,) bool: sample inside the ball of some scan
    density: Tensor  # (N,) in how many balls of scans the sample lies, over k
    recall: Tensor  # (M,) bool: scan inside the ball of some sample
    coverage: Tensor  # (M,) bool: some sample inside the scan's ball


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of every vector to its k-th nearest other one: (N,)."""
    distances = torch.cdist(features, features).fill_diagonal_(float("inf"))
    return distances.kthvalue(k, dim=1).values


def manifold(samples: Tensor, scans: Tensor, k: int = 5) -> Manifold:
    """Precision and recall (Kynkäänniemi et al., NeurIPS 2019, eq. 1-2), density and coverage (Naeem et al., ICML 2020,
    eq. 6 and 9): the ball of a vector reaches to its k-th nearest neighbour in its own set.

    Density and coverage stand outliers better. All four depend on k and on both counts: read them beside those of as
    many other scans in place of the samples.

    Args:
        samples, scans: features (N, D) and (M, D).
        k: neighbours, fewer than N and M.

    Raises:
        ValueError: for other shapes or too few volumes for k.
    """
    if samples.ndim != 2 or scans.ndim != 2 or samples.shape[1] != scans.shape[1]:
        raise ValueError(f"Expected (N, D) and (M, D), got {tuple(samples.shape)} and {tuple(scans.shape)}.")
    if not 1 <= k < min(len(samples), len(scans)):
        raise ValueError(f"k = {k} neighbours need more than that in each set, got {len(samples)} and {len(scans)}.")
    samples, scans = samples.detach().double(), scans.detach().double()
    distances = torch.cdist(samples, scans)  # (N, M)
    radii = _radii(scans, k)
    inside_scans = distances < radii
    inside_samples = distances < _radii(samples, k)[:, None]
    return Manifold(
        precision=inside_scans.any(1),
        density=inside_scans.double().sum(1) / k,
        recall=inside_samples.any(0),
        coverage=distances.min(0).values < radii,
    )
