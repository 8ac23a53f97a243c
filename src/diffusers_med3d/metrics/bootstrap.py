"""Intervals of figures taken over subjects and samples, stratified by class.

A figure is computed once on everything and once per resample, each time with a weight for every scan: row 0 of the
weights is all ones (the figure itself), the other rows are how often a bootstrap drew the scan's subject. Sets with the
same subjects (two models sampled from the same seeds, a scan and its round-trip) get the same rows, so a difference
between them is paired. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6, 8 and 13.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval and its standard error; NaN where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    stderr: float = float("nan")

    def __str__(self) -> str:
        value, low, high = (
            f"{0.0 if abs(number) <= 1e-12 else number:.3g}" for number in (self.value, self.low, self.high)
        )
        return value if np.isnan(self.low) else f"{value} [{low}, {high}]"


def bootstrap_interval(draws: ArrayLike) -> Interval:
    """Interval of a figure from (1 + R,) draws: the figure itself, then its resamples.

    The percentiles of the resamples are moved so that the resamples' mean lies on the figure: measures such as the
    Fréchet distance come out larger on every resample, and that bias is none of the figure's uncertainty. Resamples
    that are not finite (a class drawn as one subject only) are left out.
    """
    draws = np.asarray(draws, dtype=np.float64)
    value, resamples = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    if len(resamples) < 2 or not np.isfinite(value):
        return Interval(value)
    low, high = np.percentile(resamples - resamples.mean(), [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high), float(resamples.std(ddof=1)))


def bootstrap_weights(
    subjects: Sequence[str], labels: Labels, num_resamples: int, seed: int = 0
) -> NDArray[np.float64]:
    """Weights (1 + R, N): a row of ones, then how often each resample drew the scan's subject.

    Within every class, as many subjects are drawn with replacement as it has. A subject counts to the class of its
    first scan, and all its scans are drawn together. Draws depend on the seed, the subjects and their classes alone.

    Raises:
        ValueError: subjects and labels differ in number, or there are none.
    """
    if len(subjects) != len(labels) or not len(subjects):
        raise ValueError(f"Expected one label per scan, got {len(subjects)} subjects and {len(labels)} labels.")
    class_of: dict[str, int] = {}
    for subject, label in zip(subjects, labels, strict=True):
        class_of.setdefault(str(subject), int(label))
    rng = np.random.default_rng([seed, zlib.crc32(repr(sorted(class_of.items())).encode())])
    counts: dict[str, NDArray[np.int64]] = {}
    for label in sorted(set(class_of.values())):
        members = sorted(subject for subject, its_label in class_of.items() if its_label == label)
        drawn = rng.multinomial(len(members), [1 / len(members)] * len(members), size=num_resamples)  # (R, members)
        counts |= dict(zip(members, drawn.T, strict=True))
    resampled = np.stack([counts[str(subject)] for subject in subjects], axis=1).reshape(num_resamples, len(subjects))
    return np.concatenate([np.ones((1, len(subjects))), resampled])


def class_shares(labels: Labels) -> dict[int, float]:
    """Class -> its share of the scans."""
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    return {int(label): float(count / len(labels)) for label, count in zip(classes, counts, strict=True)}


def weighted_mean(
    values: ArrayLike, weights: NDArray, labels: Labels, shares: Mapping[int, float]
) -> NDArray[np.float64]:
    """Mean of per-volume values (N,) under each row of weights (R, N), every class counting its share: (R,).

    Values that are NaN are left out; a class without any value makes the mean NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    total = np.zeros(len(weights))
    for label, share in shares.items():
        keep = np.equal(labels, label) & np.isfinite(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            total += share * (weights[:, keep] @ values[keep]) / weights[:, keep].sum(1)
    return total


def weighted_pair_mean(
    pairs: NDArray,
    allowed: NDArray,
    weights_a: NDArray,
    labels_a: Labels,
    weights_b: NDArray,
    labels_b: Labels,
    shares: Mapping[int, float],
    within_class: bool = False,
) -> NDArray[np.float64]:
    """Mean over pairs (i of set a, j of set b) of ``pairs`` (N, M) under each row of weights: (R,).

    Pairs are averaged within each pair of classes, and these averages weighted by the classes' shares, so a stratified
    draw gives an unbiased answer: plain averaging sees too few pairs of one class, because nobody pairs with himself.

    Args:
        allowed: bool (N, M), False for pairs that do not count (one and the same subject).
        within_class: only pairs of one class, weighted by its share.
    """
    kept = np.where(allowed, pairs, 0.0)
    total = np.zeros(len(weights_a))
    for first, first_share in shares.items():
        for second, second_share in shares.items():
            if within_class and first != second:
                continue
            rows, columns = np.equal(labels_a, first), np.equal(labels_b, second)
            block = np.ix_(rows, columns)
            left, right = weights_a[:, rows], weights_b[:, columns]
            count = ((left @ allowed[block].astype(np.float64)) * right).sum(1)
            share = first_share * (1.0 if within_class else second_share)
            with np.errstate(invalid="ignore", divide="ignore"):
                total += share * ((left @ kept[block]) * right).sum(1) / count
    return total
