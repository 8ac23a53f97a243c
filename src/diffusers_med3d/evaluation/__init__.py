"""Samples drawn like the scans, measures of them with their floors, reports, classifiers and pictures."""

from .evaluate import evaluate
from .feature_cache import FeatureCache
from .report import Figure, Report, write_report
from .sampling import check_pipeline, check_unseen, sample_volumes, volume_set
from .sets import check_mix, check_scans
from .volume_set import VolumeSet

__all__ = [
    "FeatureCache",
    "Figure",
    "Report",
    "VolumeSet",
    "check_mix",
    "check_pipeline",
    "check_scans",
    "check_unseen",
    "evaluate",
    "sample_volumes",
    "volume_set",
    "write_report",
]
