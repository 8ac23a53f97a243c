"""Is a sample a copy of a training scan? Distances to the nearest training scans, beside those of unseen scans."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .bootstrap import Interval, bootstrap_interval, bootstrap_weights, class_shares, weighted_pair_mean


class Nearest(NamedTuple):
    """One entry per volume."""

    distance: Tensor  # (N,) root mean square difference to the nearest training scan
    ratio: Tensor  # (N,) that distance over the one to the nearest scan of another training subject, in [0, 1]
    scan: Tensor  # (N,) which training scan is nearest


def _shifted(volumes: Tensor) -> list[Tensor]:
    """The volumes as they are and moved by one voxel each way along each axis, background coming in."""
    moved = [volumes]
    for axis in (2, 3, 4):
        size = volumes.shape[axis]
        empty = torch.zeros_like(volumes.narrow(axis, 0, 1))
        moved.append(torch.cat([empty, volumes.narrow(axis, 0, size - 1)], dim=axis))
        moved.append(torch.cat([volumes.narrow(axis, 1, size - 1), empty], dim=axis))
    return moved


def nearest_training_scan(
    volumes: Tensor,
    training: Tensor,
    training_subjects: Sequence[str],
    subjects: Sequence[str] | None = None,
    pool: int = 2,
) -> Nearest:
    """Distance of each volume to its nearest training scan, and its ratio to that of the second nearest subject.

    Volumes are averaged over blocks of `pool` voxels and compared with every training scan and its mirror image, as
    they stand and moved by one block along each axis: generators are trained on flipped and shifted copies. A small
    distance alone says little, because an honest blurry sample lies near everything; a copy is near one subject and as
    far from the others as anybody, so its *ratio* is low. Blends of two subjects escape both.

    Args:
        volumes: (N, C, X, Y, Z).
        training: (T, C, X, Y, Z).
        training_subjects: T names.
        subjects: N names; training scans of the same subject are left out. None: the volumes are nobody's.

    Raises:
        ValueError: shapes that differ, or fewer than two training subjects left for a volume.
    """
    if volumes.ndim != 5 or training.ndim != 5 or volumes.shape[1:] != training.shape[1:]:
        raise ValueError(f"Expected volumes of one shape, got {tuple(volumes.shape)} and {tuple(training.shape)}.")
    if len(training_subjects) != len(training):
        raise ValueError(f"{len(training)} training scans have {len(training_subjects)} subjects.")
    first, second = (F.avg_pool3d(v.detach().float().cpu(), pool) for v in (volumes, training))
    flat = first.flatten(1).double()
    distance = torch.full((len(flat), len(second)), float("inf"), dtype=torch.float64)
    for version in _shifted(second) + _shifted(second.flip(2)):
        distance = torch.minimum(distance, torch.cdist(flat, version.flatten(1).double()))
    distance = distance / flat.shape[1] ** 0.5
    owners = sorted(set(training_subjects))
    owner = torch.tensor([owners.index(name) for name in training_subjects])
    if subjects is not None:
        same = torch.tensor([[mine == other for other in training_subjects] for mine in subjects])
        distance = distance.masked_fill(same, float("inf"))
    by_subject = torch.stack([distance[:, owner == k].min(1).values for k in range(len(owners))], dim=1)
    if (by_subject.isfinite().sum(1) < 2).any():
        raise ValueError(f"The nearest two subjects need at least two to choose from, got {len(owners)} in training.")
    two = by_subject.topk(2, dim=1, largest=False).values
    ratio = torch.where(two[:, 1] > 0, two[:, 0] / two[:, 1], torch.ones_like(two[:, 0]))
    return Nearest(two[:, 0].float(), ratio.float(), distance.argmin(1))


def copy_threshold(ratios: Tensor, share: float = 0.05) -> float:
    """Ratio below which a volume is flagged as a copy: under it lies `share` of scans that are certainly no copies.

    Args:
        ratios: those of training scans against the *other* training subjects, so unseen scans too are flagged at about
            `share` and can be compared with samples.
    """
    return torch.quantile(ratios.double(), share).item()


def training_above_unseen(
    training_scores: Sequence[float],
    unseen_scores: Sequence[float],
    training_subjects: Sequence[str],
    unseen_subjects: Sequence[str],
    training_labels: Sequence[int],
    unseen_labels: Sequence[int],
) -> Interval | None:
    """Memorisation of a reward: share of pairs of one class in which the training scan scores above the unseen one.

    0.5 by chance, 1 if the training scans are known by heart; a tie counts half. Of the classes that both sets have, as
    the unseen scans have them (None if there are none); interval over the subjects of both.
    """
    wins = 0.5 + 0.5 * np.sign(np.subtract.outer(training_scores, unseen_scores))
    shares = class_shares([label for label in unseen_labels if label in training_labels])
    if not shares:
        return None
    training = bootstrap_weights(training_subjects, training_labels, num_resamples=1000), training_labels
    unseen = bootstrap_weights(unseen_subjects, unseen_labels, num_resamples=1000), unseen_labels
    return bootstrap_interval(
        weighted_pair_mean(wins, np.ones_like(wins, dtype=bool), *training, *unseen, shares, within_class=True)
    )
