"""Judging a generator: samples drawn like the scans, every measure beside its floor, reports, classifiers, pictures."""

from .evaluate import evaluate
from .report import Figure, Report, write_report
from .sets import check_mix, check_scans
from .volume_set import VolumeSet

__all__ = ["Figure", "Report", "VolumeSet", "check_mix", "check_scans", "evaluate", "write_report"]
