"""Scans as files of a niftifolder: named after people, in RAS, with a header that holds nothing but the geometry."""

import csv
import gzip
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ..utils.files import whole_file
from .duplicates import fingerprint
from .layouts import Scan, load_scan

FOREGROUND = 0.0
"""Voxels above this count as foreground, as in ``transforms.volume_transform``."""


def people_and_names(scans: Sequence[Scan], renumber: bool = False) -> tuple[list[str], list[str]]:
    """Participant ids and file names, one of each per scan, in the order of the scans.

    File names are made of the id, a session where a person has several, and a run where a session has several. Sessions
    whose label holds six digits in a row may be dates, so they are counted instead.

    Args:
        scans: of one data set.
        renumber: call people sub-0001, sub-0002, ... in the order of the scans.
    """
    ids = list(dict.fromkeys(scan.participant_id for scan in scans))
    person = {name: f"sub-{number:04d}" if renumber else name for number, name in enumerate(ids, 1)}
    safe: dict[str, str] = {}
    for name in person.values():
        plain = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-") or "person"
        plain = plain if plain.startswith("sub-") else f"sub-{plain}"
        taken = {other.lower() for other in safe.values()}  # some disks take A and a for one
        number = next(n for n in range(1, len(person) + 2) if (f"{plain}-{n}" if n > 1 else plain).lower() not in taken)
        safe[name] = f"{plain}-{number}" if number > 1 else plain
    sessions: dict[str, list[str]] = defaultdict(list)
    for scan in scans:
        if scan.session not in sessions[scan.participant_id]:
            sessions[scan.participant_id].append(scan.session)
    of_session = Counter((scan.participant_id, scan.session) for scan in scans)
    seen: Counter = Counter()
    names = []
    for scan in scans:
        name = safe[person[scan.participant_id]]
        if len(sessions[scan.participant_id]) > 1:
            name += f"_ses-{session_label(scan.session, sessions[scan.participant_id])}"
        seen[scan.participant_id, scan.session] += 1
        if of_session[scan.participant_id, scan.session] > 1:
            name += f"_run-{seen[scan.participant_id, scan.session]}"
        names.append(f"images/{name}.nii.gz")
    return [person[scan.participant_id] for scan in scans], names


def session_label(session: str, sessions: Sequence[str]) -> str:
    """A session's own label, or its place among the person's sessions if that may be a date or is no plain word."""
    plain = [re.fullmatch(r"[A-Za-z0-9]+", one) and not re.search(r"\d{6}", one) for one in sessions]
    return session if all(plain) else str(list(sessions).index(session) + 1)


def write_scan(scan: Scan, path: Path, print_path: Path) -> dict[str, Any]:
    """Read a scan, write it as NIfTI and its fingerprint (`duplicates.fingerprint`) as .npy, and describe it.

    Whole numbers are written as int16, everything else as float32, in the axes nearest to RAS without interpolation.
    The header is new: no description, file names, extensions or other fields of the input reach it.

    Returns:
        ``shape``, ``spacing`` (mm), ``channels``, ``stored`` (axes of the input), ``foreground`` (mm, box of what is
        above 0), ``minimum`` and ``maximum``, ``notes``; or ``reason`` alone if the scan cannot be used.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            array, affine = load_scan(scan)
        stored = "".join(nibabel.aff2axcodes(affine))
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
    except Exception as error:  # a damaged file makes readers raise almost anything; one of them must not stop the rest
        return {"reason": _public(error, scan)}
    array = np.asarray(image.dataobj)
    if not np.isfinite(array).all():
        return {"reason": f"{int((~np.isfinite(array)).sum())} NaN or infinite voxels"}
    if array.max() <= FOREGROUND:
        return {"reason": f"nothing is above 0: the largest value is {array.max():g}"}
    if array.max() <= array.min():
        return {"reason": f"empty: every voxel is {array.flat[0]:g}"}
    whole = np.array_equal(array, array.round()) and np.abs(array).max() < 32767
    clean = nibabel.Nifti1Image(array.astype(np.int16 if whole else np.float32), image.affine)
    clean.header.set_xyzt_units("mm")
    with whole_file(path) as temporary:
        temporary.write_bytes(gzip.compress(clean.to_bytes(), 6, mtime=0))
    with whole_file(print_path) as temporary, temporary.open("wb") as file:
        np.save(file, fingerprint(array, image.affine))
    inside = (array if array.ndim == 3 else array.max(-1)) > FOREGROUND
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    box = [int(where.max() - where.min()) + 1 for where in np.nonzero(inside)]
    return {
        "shape": list(array.shape[:3]),
        "channels": 1 if array.ndim == 3 else array.shape[3],
        "spacing": [round(float(side), 4) for side in spacing],
        "stored": stored,
        "foreground": [round(side * float(step), 2) for side, step in zip(box, spacing, strict=True)],
        "minimum": float(array.min()),
        "maximum": float(array.max()),
        "notes": sorted({_public(one.message, scan) for one in caught if issubclass(one.category, UserWarning)}),
    }


def _public(message: Exception | str, scan: Scan) -> str:
    """A reason that may stand in a report: without folders, and of DICOM without what the file itself says."""
    if scan.kind == "dicom":
        return f"its voxels cannot be read ({type(message).__name__})"
    text = " ".join(str(message).split())
    for path in scan.files:
        for folder in (path.parent, path.parent.resolve()):
            text = text.replace(f"{folder}/", "").replace(str(folder), "")
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text) or type(message).__name__


def write_metadata(rows: Sequence[dict[str, str]], path: Path) -> None:
    """``metadata.csv`` with the columns of all rows, in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
