"""Scans from files to volumes and latents, and the split of their subjects that every stage shares."""

from .reading import DataArguments, check_columns, class_of, decode_nifti, read_scans
from .split import load_split, make_split, save_split
from .transforms import FOREGROUND_THRESHOLD, to_meta_tensor, volume_transform
from .volumes import VolumeDataset

__all__ = [
    "FOREGROUND_THRESHOLD",
    "DataArguments",
    "VolumeDataset",
    "check_columns",
    "class_of",
    "decode_nifti",
    "load_split",
    "make_split",
    "read_scans",
    "save_split",
    "to_meta_tensor",
    "volume_transform",
]
