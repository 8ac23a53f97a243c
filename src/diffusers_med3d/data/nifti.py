"""One NIfTI file to an array, its affine in millimetres, and what its header says before voxels are read."""

import gzip
import io
import math
import warnings
from pathlib import Path

import nibabel
import numpy as np
from datasets import Nifti

MAX_CHANNELS = 8
"""More volumes in one file are a time series, unless channels were asked for."""

MAX_VOXELS = 2**30
"""Voxels of a file, with its channels, beyond which its header is not believed: 4 GiB as float32."""

MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Of a header's unit of length (the low three bits of xyzt_units): unknown, metre, millimetre, micrometre."""

SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}
LARGEST_VOXEL = 100.0  # mm; a header that says more has a wrong unit


def scan_name(entry: dict, subject: str) -> str:
    """How messages call a scan: by its subject and file."""
    return f"scan of {subject} ({Path(entry['path']).name if entry['path'] else 'bytes'})"


def open_nifti(entry: dict, subject: str) -> nibabel.Nifti1Image:
    """Open an undecoded NIfTI cell without reading its voxels.

    Raises:
        ValueError: no NIfTI, naming the subject.
    """
    path, content = entry["path"], entry["bytes"]
    try:
        if content is None and not path.endswith((".nii", ".nii.gz", ".NII", ".NII.GZ")) and Path(path).is_file():
            content = Path(path).read_bytes()  # nibabel looks for a.Nii.gz under the name a.nii.gz
        return Nifti().decode_example({"path": path, "bytes": content})
    except Exception as error:  # a damaged header makes nibabel raise almost anything
        raise ValueError(f"{scan_name(entry, subject)} cannot be read as NIfTI: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_header(image: nibabel.Nifti1Image, name: str, num_channels: int | None = None) -> tuple[int, np.ndarray]:
    """Number of channels and affine (4, 4) in millimetres that a header promises.

    A fourth axis holds channels, as does a fifth behind a fourth of length 1 (vector images of SimpleITK).

    Args:
        image: not decoded yet.
        name: of the scan, for messages.
        num_channels: how many channels the scan must have; None takes up to ``MAX_CHANNELS``, if no time passes between
            them.

    Raises:
        ValueError: colours, a time series, a flat picture or a wrong rank; no affine or an unusable one.
    """
    shape, header = image.shape, image.header
    if image.get_data_dtype().fields is not None and image.get_data_dtype().kind == "V":
        raise ValueError(
            f"{name} holds colours (RGB), not intensities; write one channel, for example their mean, to a new file."
        )
    spatial, rest = shape[:3], [side for side in shape[3:] if side != 1]
    if len(shape) < 3 or len(rest) > 1:
        raise ValueError(f"{name} must have 3 or 4 axes, got shape {shape}.")
    if min(shape) < 1:
        raise ValueError(f"{name} cannot be read as NIfTI: its header says the shape {shape}.")
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"{name} has {math.prod(shape)} voxels by its header {shape}; at most {MAX_VOXELS} are read.")
    if min(spatial) < 2:
        raise ValueError(f"{name} is a flat picture of shape {shape}; volumes have three axes of 2 voxels and more.")
    channels = rest[0] if rest else 1
    if num_channels is not None and channels != num_channels:
        raise ValueError(f"{name} has {channels} channel(s), asked for are {num_channels}.")
    if num_channels is None and channels > 1 and len(shape) == 4:
        step = float(header["pixdim"][4]) * SECONDS.get(int(header["xyzt_units"]) & 0x38, 0.0)
        if channels > MAX_CHANNELS or step not in (0.0, 1.0):  # 1 s is what tools write that know no time
            raise ValueError(
                f"{name} is a series of {channels} volumes (time step {step:g} s). If they are channels, say how many "
                f"there are (num_channels={channels}); else write the one volume that is wanted to a new file."
            )
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise ValueError(
            f"{name} has no affine (sform_code and qform_code are 0); orientation and spacing are unknown."
        )
    return channels, check_affine(image.affine, name, int(header["xyzt_units"]) & 0x07)


def check_affine(affine: np.ndarray | None, name: str, unit: int = 2) -> np.ndarray:
    """Affine (4, 4) in millimetres, from one in a header's ``unit``.

    Raises:
        ValueError: an affine that is missing, not finite or singular, or voxels of an impossible size.
    """
    if affine is None or not np.isfinite(affine).all() or not _spans_space(affine):
        raise ValueError(f"{name} has an unusable affine: {None if affine is None else affine.tolist()}.")
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= MILLIMETRES.get(unit, 1.0)
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if sides.max() > LARGEST_VOXEL:
        raise ValueError(
            f"{name} has voxels of {sides.round(3).tolist()} mm; its header's unit of length (xyzt_units {unit}) is "
            "wrong, write 2 for millimetres."
        )
    return affine


def _spans_space(affine: np.ndarray) -> bool:
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    return sides.min() > 0 and abs(np.linalg.det(affine[:3, :3] / sides)) > 1e-6


def decode_nifti(entry: dict, subject: str, num_channels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decode one undecoded NIfTI cell to (array (X, Y, Z) or (X, Y, Z, C) float32, affine (4, 4) in millimetres).

    Complex voxels become their magnitude, with a warning.

    Raises:
        ValueError: see ``check_header``; a damaged file, NaN or an empty image, naming the subject and the value.
    """
    name = scan_name(entry, subject)
    image = open_nifti(entry, subject)
    channels, affine = check_header(image, name, num_channels)
    try:
        voxels = np.asanyarray(image.dataobj)
        _check_archive(entry, voxels.nbytes)
    except Exception as error:
        raise ValueError(f"{name} cannot be read as NIfTI: {_in_one_line(error)}") from error
    if np.iscomplexobj(voxels):
        warnings.warn(f"{name} holds complex numbers; their magnitude is taken.", stacklevel=2)
        voxels = np.abs(voxels)
    array = np.asarray(voxels, dtype=np.float32).reshape(*image.shape[:3], *([channels] if channels > 1 else []))
    check_voxels(array, name)
    return array, affine


def _check_archive(entry: dict, size: int) -> None:
    """Read a gzip archive to its end, where its checksum is: nibabel stops at the last voxel and would not notice a
    flipped bit. Archives that hold more than the voxels (by a megabyte) are not read further."""
    source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
    with open(source, "rb") if isinstance(source, str) else source as file:
        if file.read(2) != b"\x1f\x8b":
            return
        file.seek(0)
        with gzip.open(file) as archive:
            left = size + 2**20
            while left > 0 and (chunk := archive.read(2**20)):
                left -= len(chunk)


def check_voxels(array: np.ndarray, name: str) -> None:
    """Refuse (ValueError) voxels that are NaN, infinite or all the same."""
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} NaN or infinite voxels.")
    if array.max() <= array.min():
        raise ValueError(f"{name} is empty: every voxel is {array.flat[0]}.")
