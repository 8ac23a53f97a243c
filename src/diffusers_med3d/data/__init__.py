"""Scans from files to volumes and latents, and the split of their subjects that every stage shares."""

from .arguments import DataArguments
from .labels import class_of, classes_of
from .nifti import decode_nifti
from .reading import check_columns, check_scans, read_scans
from .settings import DataSettings, check_same_settings, read_settings, settings_of, write_settings
from .split import load_split, make_split, save_split
from .transforms import FOREGROUND_THRESHOLD, to_meta_tensor, volume_transform
from .volumes import VolumeDataset, prepare

__all__ = [
    "FOREGROUND_THRESHOLD",
    "DataArguments",
    "DataSettings",
    "VolumeDataset",
    "check_columns",
    "check_same_settings",
    "check_scans",
    "class_of",
    "classes_of",
    "decode_nifti",
    "load_split",
    "make_split",
    "prepare",
    "read_scans",
    "read_settings",
    "save_split",
    "settings_of",
    "to_meta_tensor",
    "volume_transform",
    "write_settings",
]
