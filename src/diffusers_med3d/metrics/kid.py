"""Kernel distance between two sets of features."""

from typing import NamedTuple

import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    value: float  # unbiased, so it may be negative where the sets do not differ
    stderr: float


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x.y / d + 1)**3 of every pair of feature vectors: (N, D) and (M, D) to float64 (N, M)."""
    return (a.detach().double() @ b.detach().double().T / a.shape[1] + 1) ** 3


def _leave_one_out(kernel_sum: Tensor, row_sums: Tensor, n: int) -> Tensor:
    """Mean of the off-diagonal kernel after dropping each sample in turn, from the sum and the row sums of all."""
    return (kernel_sum - 2 * row_sums) / ((n - 1) * (n - 2))


def kid(features_a: Tensor, features_b: Tensor) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x.y / d + 1)**3 between two sets of feature vectors.

    Binkowski et al., Demystifying MMD GANs (ICLR 2018), section 4; the estimator is eq. 3 of Gretton et al. (JMLR
    2012). All samples are used at once: sets here are far smaller than the subsets of 1000 that the paper averages. The
    standard error is a jackknife over the samples of each set (variances added). State the extractor and both sample
    counts with the figure, and the distance between two halves of the real scans as its floor.

    Args:
        features_a, features_b: (N, D) and (M, D), N and M >= 3.

    Raises:
        ValueError: for other shapes, too few samples or features that are not finite.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"Expected (N, D) and (M, D), got {tuple(features_a.shape)} and {tuple(features_b.shape)}.")
    n, m = len(features_a), len(features_b)
    if min(n, m) < 3:
        raise ValueError(f"KID needs at least 3 samples in each set, got {n} and {m}.")
    a, b = features_a.detach().double(), features_b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("Features must be finite, got NaN or infinity.")

    within_a, within_b = polynomial_kernel(a, a).fill_diagonal_(0), polynomial_kernel(b, b).fill_diagonal_(0)
    between = polynomial_kernel(a, b)
    rows_a, rows_b, sum_ab = within_a.sum(1), within_b.sum(1), between.sum()
    mean_a, mean_b, mean_ab = rows_a.sum() / (n * (n - 1)), rows_b.sum() / (m * (m - 1)), sum_ab / (n * m)
    without_a = _leave_one_out(rows_a.sum(), rows_a, n) + mean_b - 2 * (sum_ab - between.sum(1)) / ((n - 1) * m)
    without_b = _leave_one_out(rows_b.sum(), rows_b, m) + mean_a - 2 * (sum_ab - between.sum(0)) / (n * (m - 1))
    variance = sum((len(x) - 1) * x.var(correction=0) for x in (without_a, without_b))
    return KernelDistance((mean_a + mean_b - 2 * mean_ab).item(), torch.as_tensor(variance).sqrt().item())
