"""Conversion of published MONAI and NVIDIA generators (definitions and weights) into pipelines."""

from .convert import Conversion, convert_bundle, estimate_scale_factor
from .definitions import BundleConfig, Definition, read_bundle
from .weights import read_weights

__all__ = [
    "BundleConfig",
    "Conversion",
    "Definition",
    "convert_bundle",
    "estimate_scale_factor",
    "read_bundle",
    "read_weights",
]
