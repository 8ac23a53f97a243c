"""The same scan under two names: copies that are bit-equal, resampled, mirrored, scaled in intensity or re-cropped.

Two steps. Candidates are pairs whose small, coarse versions agree in any of the eight mirrorings. A pair is then
decided by registering one scan to the other (affine) and correlating the *fine detail* that is left: folds and vessels
belong to one person, while the coarse shape of two heads is alike.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation
from scipy.ndimage import affine_transform, binary_erosion, gaussian_filter, label
from tqdm.auto import tqdm

from ..utils.wording import few
from .nifti import decode_nifti

SIDE = 48
CANDIDATES = 2
"""Neighbours of every scan that are looked at closely."""
COARSE_CORRELATION = 0.7
"""Candidates correlate at least this much before they are registered."""
SAME_SCAN = 0.8
"""Correlation of the fine detail from which two scans count as one.

Among 140 brains of different people (IXI, 2 mm, 224 pairs of neighbours) the highest is 0.70; copies that were
resampled to 1.5, 3 or 4 mm, mirrored, scaled, given another gamma (0.8, 1.3), noise or a turn of 5 degrees have 0.93
and more.
"""
WORTH_REGISTERING, WORTH_REFINING = 0.3, 0.6
"""Detail correlations below which the coarse and the fine registration are not tried. Copies have 0.5 and more before
any (turned by 5 degrees), 0.87 and more after the coarse one."""
STEPS = 30
MIRRORINGS = [(x, y, z) for x, y, z in product((1, -1), repeat=3)]


class Duplicate(NamedTuple):
    """Two scans that are the same one."""

    first: int
    second: int
    score: float  # correlation of the fine detail after alignment, in [-1, 1]


def otsu_threshold(values: np.ndarray) -> float:
    """Threshold that parts values into two groups of the least variance within (Otsu 1979, eq. 12-14).

    It moves with the values when these are scaled or shifted, unlike a fixed threshold.
    """
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * difference**2)
    return float(edges[1 + between.argmax()])


def fingerprint(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The foreground's box on a grid of 48^3 points, float32 in [0, 1.2], background 0: what is compared of a scan.

    Args:
        array: (X, Y, Z) or (X, Y, Z, C); channels are averaged.
        affine: (4, 4) voxel to millimetres; axes are taken in the order and direction that is nearest to RAS.

    Raises:
        ValueError: a constant array.
    """
    volume = np.asarray(array, dtype=np.float32)
    volume = volume.mean(-1) if volume.ndim == 4 else volume
    if volume.max() <= volume.min():
        raise ValueError(f"an empty scan cannot be compared: every voxel is {volume.flat[0]}.")
    volume = _nearest_to_ras(volume, affine)
    threshold = otsu_threshold(volume[:: max(1, volume.shape[0] // 128)])
    parts, count = label(volume > threshold)
    if count > 1:  # the largest part: specks far from the head must not move the box
        volume_of = np.bincount(parts.ravel())
        volume_of[0] = 0
        inside = parts == volume_of.argmax()
    else:
        inside = parts > 0
    corners = np.array([(where.min(), where.max()) for where in np.nonzero(inside)])
    low, high = corners[:, 0], corners[:, 1]
    values = np.clip((volume - threshold) / (np.quantile(volume[inside], 0.98) - threshold + 1e-6), 0, 1.2)
    return _resample_box(values, low, high)


def _nearest_to_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return apply_orientation(volume, io_orientation(affine))


def _resample_box(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The box on 48^3 points, smoothed first where that is coarser than the voxels."""
    step = np.maximum(high - low, 1) / (SIDE - 1)
    box = tuple(slice(max(0, a - 2 * int(s) - 2), b + 2 * int(s) + 3) for a, b, s in zip(low, high, step, strict=True))
    origin = np.array([part.start for part in box])
    smooth = gaussian_filter(values[box], np.where(step > 1, 0.5 * step, 0.0))
    return affine_transform(smooth, np.diag(step), low - origin, (SIDE,) * 3, order=1).astype(np.float32)


def _band(volume: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    return gaussian_filter(volume, fine) - gaussian_filter(volume, coarse)


def _unit(values: np.ndarray) -> np.ndarray:
    values = values.ravel() - values.mean()
    return values / (np.linalg.norm(values) + 1e-12)


def align(
    moving: np.ndarray, fixed: np.ndarray, smoothing: float, stride: int, start: np.ndarray | None = None
) -> np.ndarray:
    """The affine (3, 4) about the middle that lays ``moving`` over ``fixed`` with the highest correlation.

    Gauss-Newton steps (ECC; Evangelidis & Psarakis, TPAMI 2008).

    Args:
        moving, fixed: (48, 48, 48).
        smoothing: of both, in voxels.
        stride: every how many points they are compared.
        start: affine to begin with; the identity if not given.
    """
    centre = (SIDE - 1) / 2
    points = np.stack(np.meshgrid(*[np.arange(0, SIDE, stride) - centre] * 3, indexing="ij")).reshape(3, -1)
    homogeneous = np.concatenate([points, np.ones((1, points.shape[1]))]).astype(np.float32)
    transform = np.eye(3, 4) if start is None else start
    source = gaussian_filter(moving, smoothing, truncate=3)
    slopes = np.gradient(source)
    wanted = _unit(gaussian_filter(fixed, smoothing, truncate=3)[::stride, ::stride, ::stride])
    for _ in range(STEPS):
        moved = [_moved(part, transform, stride).ravel() for part in (source, *slopes)]
        # (points, 12): how each voxel changes with each entry of the transform
        jacobian = np.concatenate([slope * homogeneous for slope in moved[1:]]).T
        jacobian -= jacobian.mean(0)
        image = moved[0] - moved[0].mean()
        onto_image, onto_wanted = jacobian.T @ image, jacobian.T @ wanted
        square = jacobian.T @ jacobian + 1e-6 * np.eye(12)
        solved = np.linalg.solve(square, np.stack([onto_image, onto_wanted], 1))
        bottom = image @ wanted - onto_image @ solved[:, 1]
        if bottom <= 0:
            break
        scale = (image @ image - onto_image @ solved[:, 0]) / bottom  # eq. 19
        step = (scale * solved[:, 1] - solved[:, 0]).reshape(3, 4)
        transform = transform + step
        if np.abs(step[:, :3]).max() * centre + np.abs(step[:, 3]).max() < 0.02:
            break
    return transform


def _moved(volume: np.ndarray, transform: np.ndarray, stride: int) -> np.ndarray:
    """A volume at every ``stride``-th point after a transform (3, 4) about the middle."""
    centre = np.full(3, (SIDE - 1) / 2)
    matrix, shift = transform[:, :3], transform[:, 3]
    offset = centre + shift - matrix @ centre
    return affine_transform(volume, stride * matrix, offset, (SIDE // stride,) * 3, order=1)


def detail_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation, in [-1, 1], of the fine detail inside of what two aligned fingerprints share.

    Both are filtered within the shared inside alone, or its edge would be detail that all heads have in common, and
    divided by the local strength of their detail, lest a few bright vessels decide.
    """
    shared = binary_erosion((gaussian_filter(first, 1) > 0.15) & (gaussian_filter(second, 1) > 0.15), iterations=2)
    if shared.sum() < 1000:
        return 0.0
    weight = shared.astype(np.float32)
    weights = {width: gaussian_filter(weight, width, truncate=2) for width in (0.5, 1.5, 3.0)}

    def local_mean(values: np.ndarray, width: float) -> np.ndarray:
        return gaussian_filter(values * weight, width, truncate=2) / (weights[width] + 1e-6)

    def detail(values: np.ndarray) -> np.ndarray:
        band = local_mean(values, 0.5) - local_mean(values, 1.5)
        return (band / np.sqrt(local_mean(band**2, 3.0) + 1e-6))[shared]

    return float(_unit(detail(first)) @ _unit(detail(second)))


def fingerprint_of(scan: str | Path | np.ndarray | torch.Tensor) -> np.ndarray:
    """Fingerprint of a NIfTI file, or of a volume (C, X, Y, Z) or (X, Y, Z) whose axes are near RAS."""
    if isinstance(scan, str | Path):
        return fingerprint(*decode_nifti({"path": str(scan), "bytes": None}, Path(scan).name))
    volume = np.asarray(scan, dtype=np.float32)
    return fingerprint(volume.mean(0) if volume.ndim == 4 else volume, np.eye(4))


def print_of_entry(job: tuple[dict, str, int]) -> np.ndarray:
    """Fingerprint of a NIfTI cell that is not decoded: (entry, subject, channels), as ``decode_nifti`` takes them."""
    return fingerprint(*decode_nifti(*job))


def find_duplicates(
    scans: Sequence[str | Path | np.ndarray | torch.Tensor], threshold: float = SAME_SCAN, progress: bool = True
) -> list[Duplicate]:
    """Pairs of scans that are the same one, best first, whatever they are called.

    Found are copies that were resampled, mirrored along any axis, scaled or shifted in intensity, padded, or turned by
    a few degrees; not those of which a part was cut off.

    Args:
        scans: paths of NIfTI files, fingerprints, or volumes (see `fingerprint_of`).
        threshold: correlation of the fine detail from which two scans count as one.
        progress: whether to show a progress bar.
    """
    prints = [
        one if isinstance(one, np.ndarray) and one.shape == (SIDE,) * 3 else fingerprint_of(one)
        for one in tqdm(scans, desc="fingerprints of scans", unit="scan", disable=not progress)
    ]
    pairs = _candidates(prints)
    found = []
    for first, second, mirroring in tqdm(pairs, desc="comparing scans", unit="pair", disable=not progress):
        score = _score(prints[first], _mirrored(prints[second], mirroring))
        if score >= threshold:
            found.append(Duplicate(first, second, score))
    return sorted(found, key=lambda pair: -pair.score)


def _candidates(prints: Sequence[np.ndarray]) -> list[tuple[int, int, tuple[int, int, int]]]:
    """Each scan with its nearest neighbours and the mirroring in which they are nearest."""
    if len(prints) < 2:
        return []
    coarse = np.stack([_coarse(one) for one in prints])
    vectors = coarse.reshape(len(prints), -1)
    best = np.full((len(prints),) * 2, -1.0)
    which = np.zeros(best.shape, dtype=int)
    for number, mirroring in enumerate(MIRRORINGS):
        similar = vectors @ np.stack([_mirrored(one, mirroring) for one in coarse]).reshape(len(prints), -1).T
        which = np.where(similar > best, number, which)
        best = np.maximum(best, similar)
    np.fill_diagonal(best, -1.0)
    chosen = {}
    for one in range(len(prints)):
        for other in np.argsort(-best[one])[:CANDIDATES]:
            if best[one, other] >= COARSE_CORRELATION:
                first, second = sorted((one, int(other)))
                chosen[first, second] = MIRRORINGS[which[first, second]]
    return [(*pair, mirroring) for pair, mirroring in sorted(chosen.items())]


def _coarse(one: np.ndarray) -> np.ndarray:
    """(24, 24, 24), mean 0, norm 1; averaged over blocks, so that it mirrors as the fingerprint does."""
    half = SIDE // 2
    blocks = _band(one, 1.0, 3.0).reshape(half, 2, half, 2, half, 2).mean((1, 3, 5))
    return _unit(blocks).reshape(blocks.shape).astype(np.float32)


def _mirrored(one: np.ndarray, mirroring: Sequence[int]) -> np.ndarray:
    return np.ascontiguousarray(one[tuple(slice(None, None, step) for step in mirroring)])


def _score(first: np.ndarray, second: np.ndarray) -> float:
    """Detail correlation as they are, or after registration where that may tell."""
    score = detail_correlation(first, second)
    transform = None
    for smoothing, stride, least in ((2.0, 4, WORTH_REGISTERING), (1.0, 2, WORTH_REFINING)):
        if not least <= score < SAME_SCAN:
            break
        transform = align(first, second, smoothing, stride, transform)
        score = max(score, detail_correlation(_moved(first, transform, 1), second))
    return score


def people_of(
    subjects: Sequence[str], names: Sequence[str], duplicates: Sequence[Duplicate], allowed: bool
) -> dict[str, str]:
    """Subject -> person: all subjects who share a scan are one person (`one_person_each`).

    Args:
        subjects: of each scan.
        names: of each scan, for the message.
        duplicates: pairs of scans.
        allowed: whether two subjects may share a scan.

    Raises:
        ValueError: they may not and do; with subjects and scans.
    """
    across = [pair for pair in duplicates if subjects[pair.first] != subjects[pair.second]]
    if across and not allowed:
        named = [
            f"{subjects[pair.first]} ({names[pair.first]}) and {subjects[pair.second]} ({names[pair.second]}), "
            f"detail correlation {pair.score:.3f}"
            for pair in across
        ]
        raise ValueError(
            f"{len(across)} pair(s) of scans under two people's names are the same scan: {few(named, separator='; ')}. "
            "Remove one of each, or say --allow_duplicates to count both names as one person."
        )
    return dict(zip(subjects, one_person_each(subjects, duplicates), strict=True))


def one_person_each(people: Sequence[str], duplicates: Sequence[Duplicate]) -> list[str]:
    """The names of people, where those who share a scan all have the name of the first of them.

    Args:
        people: who each scan is of.
        duplicates: pairs of indices into ``people``.
    """
    group = {name: name for name in people}

    def first_of(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for pair in duplicates:
        low, high = sorted((first_of(people[pair.first]), first_of(people[pair.second])))
        group[high] = low
    return [first_of(name) for name in people]
