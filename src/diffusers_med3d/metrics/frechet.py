"""Fréchet distance between two sets of features, where there are enough of them."""

import torch
from torch import Tensor

SAMPLES_PER_DIMENSION = 4
"""A Fréchet distance is given on as many dimensions as leave this many samples in each set for every one of them."""


def frechet_dimensions(num_a: int, num_b: int, dimensions: int) -> int:
    """On how many dimensions a Fréchet distance between sets of these sizes may be read; under 2 means none.

    A covariance of d dimensions from n samples is singular for n <= d and badly biased up to a few times d; the
    distance then measures n. Rule: d <= min(n, m) / 4. Where the features have more dimensions, `principal_components`
    takes as many as allowed.
    """
    return min(dimensions, min(num_a, num_b) // SAMPLES_PER_DIMENSION)


def principal_components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the `count` leading principal directions (D, count) of features (N, D), float64.

    Fit them on scans that are in neither set, such as training scans: directions fit on a set favour that set.

    Raises:
        ValueError: for more directions than N - 1 or D.
    """
    if not 1 <= count <= min(len(features) - 1, features.shape[1]):
        raise ValueError(f"{tuple(features.shape)} features have no {count} principal components.")
    features = features.detach().double()
    mean = features.mean(0)
    directions = torch.linalg.svd(features - mean, full_matrices=False).Vh[:count].T
    return mean, directions


def _moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means (R, D) and unbiased covariances (R, D, D) of features (N, D) that count as often as weights (R, N) say."""
    count = weights.sum(1)
    mean = weights @ features / count[:, None]
    second = torch.einsum("rn,nd,ne->rde", weights, features, features) / count[:, None, None]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    return mean, covariance * (count / (count - 1))[:, None, None]


def frechet(
    features_a: Tensor, features_b: Tensor, weights_a: Tensor | None = None, weights_b: Tensor | None = None
) -> Tensor:
    """Fréchet distance between Gaussians fitted to two sets: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    Dowson and Landau (J. Multivariate Analysis 12, 1982), eq. 4; Heusel et al. (NeurIPS 2017), eq. 6. tr (A B)^(1/2) is
    taken from the eigenvalues of A^(1/2) B A^(1/2), so all rows of weights go in one call (MONAI's `FIDMetric` takes
    one pair of sets at a time; the tests hold both equal). Not to be called FID unless the features are those of the
    canonical Inception network; see `frechet_dimensions` for when it may be read at all.

    Args:
        features_a, features_b: (N, D) and (M, D).
        weights_a, weights_b: (R, N) and (R, M), how often each sample counts; None = once.

    Returns:
        float64 (R,), or a scalar without weights. The square of a distance, as everywhere in the field.

    Raises:
        ValueError: other shapes, fewer than two samples, or features that are not finite.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"Expected (N, D) and (M, D), got {tuple(features_a.shape)} and {tuple(features_b.shape)}.")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"Fréchet needs at least 2 samples in each set, got {len(features_a)} and {len(features_b)}.")
    a, b = features_a.detach().double(), features_b.detach().double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("Features must be finite, got NaN or infinity.")
    centre = b.mean(0)  # keeps E[x x'] - E[x] E[x]' accurate far from the origin
    ones = [torch.ones(1, len(x), dtype=torch.float64) if w is None else w.double() for x, w in zip(
        (a, b), (weights_a, weights_b), strict=True)]  # fmt: skip
    mean_a, covariance_a = _moments(a - centre, ones[0])
    mean_b, covariance_b = _moments(b - centre, ones[1])
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :] @ vectors.mT
    between = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0).sqrt().sum(1)
    trace = covariance_a.diagonal(dim1=1, dim2=2).sum(1) + covariance_b.diagonal(dim1=1, dim2=2).sum(1)
    distance = (mean_a - mean_b).square().sum(1) + trace - 2 * between
    return distance[0] if weights_a is None and weights_b is None else distance
