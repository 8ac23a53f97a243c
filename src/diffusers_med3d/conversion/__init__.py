"""MONAI's published generators in and out: bundles (definitions and weights) to pipelines and back."""

from .convert import Conversion, convert_bundle, estimate_scale_factor
from .definitions import BundleConfig, Definition, read_bundle
from .to_monai import save_monai_bundle, to_monai_definition, to_monai_state_dict
from .weights import read_weights

__all__ = [
    "BundleConfig",
    "Conversion",
    "Definition",
    "convert_bundle",
    "estimate_scale_factor",
    "read_bundle",
    "read_weights",
    "save_monai_bundle",
    "to_monai_definition",
    "to_monai_state_dict",
]
