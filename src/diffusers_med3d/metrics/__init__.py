"""Measures of volumes and of sets of volumes, which are never rewards."""

from .bootstrap import Interval, bootstrap_interval, bootstrap_weights, class_shares, weighted_mean, weighted_pair_mean
from .features import Extractor, NamedExtractor, PlanarFeatures, SliceFeatures, features_of
from .features3d import ScatteringFeatures
from .frechet import frechet, frechet_dimensions, principal_components
from .image import (
    high_frequency_ratio,
    interior_detail,
    interior_spectrum,
    noise_level,
    power_spectrum,
    psnr,
    sharpness,
)
from .kid import KernelDistance, kid, polynomial_kernel
from .manifold import Manifold, manifold
from .memorisation import Nearest, copy_threshold, nearest_training_scan, training_above_unseen
from .pretrained import EXTRACTORS, MedicalNetFeatures, extractor
from .similarity import Diversity, diversity, ms_ssim, ms_ssim_matrix
from .symmetry import left_right_symmetry
from .tissue import intensity_tissues, tissue_volumes

__all__ = [
    "EXTRACTORS",
    "Diversity",
    "Extractor",
    "Interval",
    "KernelDistance",
    "Manifold",
    "MedicalNetFeatures",
    "NamedExtractor",
    "Nearest",
    "PlanarFeatures",
    "ScatteringFeatures",
    "SliceFeatures",
    "bootstrap_interval",
    "bootstrap_weights",
    "class_shares",
    "copy_threshold",
    "diversity",
    "extractor",
    "features_of",
    "frechet",
    "frechet_dimensions",
    "high_frequency_ratio",
    "intensity_tissues",
    "interior_detail",
    "interior_spectrum",
    "kid",
    "left_right_symmetry",
    "manifold",
    "ms_ssim",
    "ms_ssim_matrix",
    "nearest_training_scan",
    "noise_level",
    "polynomial_kernel",
    "power_spectrum",
    "principal_components",
    "psnr",
    "sharpness",
    "tissue_volumes",
    "training_above_unseen",
    "weighted_mean",
    "weighted_pair_mean",
]
