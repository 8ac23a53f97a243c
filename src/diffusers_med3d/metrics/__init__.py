"""Measures of volumes and of sets of volumes. They import nothing else of this package and are never rewards."""

from .features import SliceFeatures
from .image import high_frequency_power, high_frequency_ratio, noise_level, power_spectrum, psnr, sharpness
from .kid import KernelDistance, kid
from .similarity import Diversity, diversity, ms_ssim

__all__ = [
    "Diversity",
    "KernelDistance",
    "SliceFeatures",
    "diversity",
    "high_frequency_power",
    "high_frequency_ratio",
    "kid",
    "ms_ssim",
    "noise_level",
    "power_spectrum",
    "psnr",
    "sharpness",
]
