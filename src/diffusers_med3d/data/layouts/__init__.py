"""Data sets as they are distributed: which scans a folder holds, of whom, and what had to be left out."""

from pathlib import Path

import numpy as np

from ..nifti import decode_nifti
from . import analyze, bids, brats2019, dicom, ixi, niftifolder, oasis1
from .scans import Found, LeftOut, Options, Scan

LAYOUTS = ("niftifolder", "bids", "brats2019", "oasis1", "ixi", "dicom")

__all__ = ["LAYOUTS", "Found", "LeftOut", "Options", "Scan", "find_scans", "load_scan"]


def find_scans(layout: str, folder: str | Path, options: Options | None = None) -> Found:
    """Scans of a folder in one of ``LAYOUTS``, without reading voxels.

    Raises:
        FileNotFoundError: no such folder, or no scan in it.
        ValueError: an unknown layout, or a table that lacks a column.
    """
    finders = {
        "niftifolder": niftifolder.find,
        "bids": bids.find,
        "brats2019": brats2019.find,
        "oasis1": oasis1.find,
        "ixi": ixi.find,
        "dicom": dicom.find,
    }
    folder = Path(folder)
    if layout not in finders:
        raise ValueError(f"unknown layout {layout!r}, expected one of {list(LAYOUTS)}.")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return finders[layout](folder, options or Options())


def load_scan(scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) or (X, Y, Z, C) float32 as stored and the affine (4, 4) to RAS millimetres.

    Raises:
        ValueError: a file that cannot be read, or channels on different grids.
    """
    if scan.kind == "dicom":
        return dicom.read(scan.files)
    if scan.kind == "analyze":
        channels = [analyze.read(path) for path in scan.files]
    else:
        channels = [decode_nifti({"path": str(path), "bytes": None}, scan.participant_id) for path in scan.files]
    arrays, affines = zip(*channels, strict=True)
    if len(arrays) == 1:
        return channels[0]
    for path, array, affine in zip(scan.files, arrays, affines, strict=True):
        if array.ndim != 3 or array.shape != arrays[0].shape or not np.allclose(affine, affines[0], atol=1e-2):
            raise ValueError(
                f"{path.name} is not on the grid of {scan.files[0].name}: shape {array.shape} against "
                f"{arrays[0].shape}; channels must be registered to each other first."
            )
    return np.stack(arrays, axis=-1), affines[0]
