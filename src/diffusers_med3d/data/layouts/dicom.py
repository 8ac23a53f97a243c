"""Trees of DICOM files in any arrangement: series that make one regular volume, and the reason where one does not.

Nothing that identifies a person leaves this module: people become sub-0001, sub-0002, ... in the order of their ids,
and no list of which is which is kept; dates, names, descriptions, UIDs and folder names are used and dropped.
"""

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..tables import list_files
from .scans import Found, LeftOut, Options, Scan, natural
from .tables import column, read_rows

MIN_SLICES = 8
TOLERANCE = 0.05  # of the slice distance: how far positions may lie from even steps
TILT = 0.02  # radians between the slices' normal and the line through their positions
OLDEST = 90  # ages from here on identify people (HIPAA's Safe Harbor), so they are written as 90
TEXTS = (
    "PatientID", "PatientName", "PatientAge", "PatientSex", "StudyInstanceUID", "SeriesInstanceUID",
    "SeriesDescription", "ProtocolName", "Modality", "StudyDate", "StudyTime",
)  # fmt: skip
WHOLE_NUMBERS = ("NumberOfFrames", "SamplesPerPixel", "Rows", "Columns", "SeriesNumber")
GEOMETRY = {"PixelSpacing": 2, "ImageOrientationPatient": 6, "ImagePositionPatient": 3}  # how many numbers each has
TAGS = [*TEXTS, *WHOLE_NUMBERS, *GEOMETRY, "ImageType"]


@dataclass(frozen=True)
class _Slice:
    path: Path
    tags: dict


def find(folder: Path, options: Options) -> Found:
    """Series of regular slices; of several in one study, those whose description holds the one of ``modalities``.

    Labels come from ``options.metadata``, a table with the patients' ids (``participant_id`` or ``PatientID``).
    """
    if len(options.modalities) > 1:
        raise ValueError(
            f"DICOM series are read one per scan; say one of --modalities, got {list(options.modalities)}."
        )
    pydicom = _pydicom()
    slices, left_out, other, damaged = defaultdict(list), [], 0, 0
    for path in list_files(folder):
        try:
            with _silent():
                tags = _tags(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS))
        except Exception:  # damage makes pydicom raise almost anything
            if _begins_as_dicom(path):
                damaged += 1
            else:
                other += 1
            continue
        if not tags["SeriesInstanceUID"]:
            other += 1
            continue
        person = tags["PatientID"] or tags["PatientName"]
        slices[person, tags["StudyInstanceUID"], tags["SeriesInstanceUID"]].append(_Slice(path, tags))
    labels, label_columns = _labels(options)
    people = sorted({person for person, _, _ in slices}, key=natural)
    studies = defaultdict(list)
    for (person, study, _), members in slices.items():
        studies[person, study].append(members)
    scans = []
    sessions: dict[str, int] = defaultdict(int)
    ordered = sorted(studies.items(), key=lambda item: (natural(item[0][0]), _when(item[1]), item[0][1]))
    for (person, _), series in ordered:
        name = f"sub-{people.index(person) + 1:04d}"
        sessions[name] += 1
        where = f"{name}, study {sessions[name]}"
        usable = []
        for number, members in enumerate(sorted(series, key=lambda one: one[0].tags["SeriesNumber"] or 0), 1):
            reason = _reason_against(members) if person else "no patient id, so people cannot be told apart"
            if not reason and options.modalities and not _described(members[0], options.modalities[0]):
                reason = "its description does not hold what --modalities asks for"
            if reason:
                left_out.append(LeftOut(f"{where}, series {number}", reason))
            else:
                usable.append((number, members))
        if len(usable) > 1:
            counts = ", ".join(str(len(members)) for _, members in usable)
            reason = f"{len(usable)} series ({counts} slices) could be meant; name one by --modalities TEXT"
            left_out += [LeftOut(f"{where}, series {number}", reason) for number, _ in usable]
            continue
        for _, members in usable:
            sex = members[0].tags["PatientSex"].strip()
            columns = {"age": _age(members[0].tags["PatientAge"]), "sex": sex if sex in ("F", "M", "O") else ""}
            columns |= {name: "" for name in label_columns} | labels.get(person, {})
            label = options.label_column
            if label and not columns.get(label) and not options.keep_unlabelled:
                left_out.append(LeftOut(where, f"no {label} (kept with --keep_unlabelled)"))
                continue
            paths = tuple(one.path for one in _in_order(members))
            scans.append(Scan(paths, name, columns, str(sessions[name]), kind="dicom"))
    notes = [f"{other} files are no DICOM images"] if other else []
    notes += [f"{damaged} DICOM files are damaged and were left out"] if damaged else []
    if not labels and options.label_column not in (None, "age", "sex"):
        raise ValueError(f"the column {options.label_column!r} needs --metadata TABLE with the patients' ids.")
    channels = tuple(options.modalities) or ("image",)
    return Found(scans, left_out, channels, options.label_column, notes=tuple(notes))


def read(paths: tuple[Path, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) float32 of a series in order, after its rescale slope, and the affine to RAS millimetres (4, 4).

    Computed tomography is moved by 1024 and cut at 0, so that air is 0.
    """
    pydicom = _pydicom()
    planes, tags = [], []
    with _silent():
        for path in paths:
            file = pydicom.dcmread(path)
            plane = file.pixel_array.astype(np.float32)
            slope, intercept = float(file.get("RescaleSlope", 1) or 1), float(file.get("RescaleIntercept", 0) or 0)
            planes.append((plane * slope + intercept).T)  # rows run down: (row, column) to (X, Y)
            tags.append(_tags(file))
    array = np.stack(planes, axis=-1)
    if tags[0]["Modality"] == "CT":
        array = (array + 1024).clip(min=0)
    along_row, along_column = np.array(tags[0]["ImageOrientationPatient"]).reshape(2, 3)
    between_rows, between_columns = tags[0]["PixelSpacing"]
    first, last = (np.array(one["ImagePositionPatient"]) for one in (tags[0], tags[-1]))
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = (last - first) / (len(paths) - 1)
    affine[:3, 3] = first
    return array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts towards left and posterior


def _pydicom():
    try:
        import pydicom
    except ImportError as error:
        raise ImportError('DICOM needs pydicom: pip install "diffusers-med3d[layouts]"') from error
    return pydicom


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what pydicom logs and warns of: its messages quote the file, names and ids included."""
    logger = logging.getLogger("pydicom")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def _tags(header) -> dict:
    """What is needed of a file, as plain values: texts ("" if missing), whole numbers and tuples of numbers (None).

    Raises:
        Exception: of any kind, where a value is damaged; pydicom reads a value only when it is asked for.
    """
    tags: dict = {name: str(header.get(name) or "") for name in TEXTS}
    tags |= {name: None if (value := header.get(name)) is None else int(value) for name in WHOLE_NUMBERS}
    tags["ImageType"] = [str(kind).upper() for kind in header.get("ImageType") or []]
    for name, count in GEOMETRY.items():
        value = header.get(name)
        tags[name] = tuple(float(number) for number in value) if value else None
        if value and (len(value) != count or not np.isfinite(tags[name]).all()):
            raise ValueError(f"{name} must be {count} numbers, got {value}.")
    return tags


def _begins_as_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _reason_against(members: list[_Slice]) -> str:
    """Why the files of a series are no regular volume; "" if they are."""
    tags = [one.tags for one in members]
    if any((one["NumberOfFrames"] or 1) > 1 for one in tags):
        return "a multi-frame (enhanced) file, which is not read; convert it with dcm2niix"
    if any("LOCALIZER" in one["ImageType"] for one in tags):
        return "a localizer"
    if any((one["SamplesPerPixel"] or 1) != 1 for one in tags):
        return "colour pictures"
    if any(one["ImageOrientationPatient"] is None or one["ImagePositionPatient"] is None for one in tags):
        return "no orientation or position (a derived picture or a report)"
    if any(one["PixelSpacing"] is None for one in tags):
        return "no pixel spacing"
    if len(members) < MIN_SLICES:
        return f"{len(members)} slices, at least {MIN_SLICES} are wanted"
    sizes = {(one["Rows"], one["Columns"], *one["PixelSpacing"]) for one in tags}
    if len(sizes) > 1:
        return f"slices of {len(sizes)} sizes or pixel spacings"
    if min(tags[0]["PixelSpacing"]) <= 0:
        return f"a pixel spacing of {list(tags[0]['PixelSpacing'])} mm"
    orientations = np.array([one["ImageOrientationPatient"] for one in tags])
    row, column = orientations[0].reshape(2, 3)
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2):
        return "rows and columns that are not at right angles"
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        return f"mixed orientations: {len(np.unique(orientations.round(2), axis=0))} in one series"
    ordered = _in_order(members)
    positions = np.array([one.tags["ImagePositionPatient"] for one in ordered])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    usual = float(np.median(steps))
    if (steps < TOLERANCE * max(usual, 1e-6)).any() or usual == 0:
        doubled = int((steps < max(TOLERANCE * usual, 1e-6)).sum())
        return f"{doubled} slices lie where another one does (several echoes, times or reconstructions)"
    if np.abs(steps - usual).max() > TOLERANCE * usual:
        gap = int(np.abs(steps - usual).argmax())
        return f"a gap: slices {gap + 1} and {gap + 2} are {steps[gap]:.2f} mm apart, the others {usual:.2f} mm"
    along = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    if abs(float(along @ _normal(members[0]))) < np.cos(TILT):
        return "slices are sheared against each other (a tilted gantry)"
    return ""


def _normal(one: _Slice) -> np.ndarray:
    return np.cross(*np.array(one.tags["ImageOrientationPatient"]).reshape(2, 3))


def _in_order(members: list[_Slice]) -> list[_Slice]:
    normal = _normal(members[0])
    return sorted(members, key=lambda one: float(np.array(one.tags["ImagePositionPatient"]) @ normal))


def _when(series: list[list[_Slice]]) -> str:
    """Date and time of a study, for its place among a person's studies alone."""
    tags = series[0][0].tags
    return f"{tags['StudyDate']}{tags['StudyTime']}"


def _described(one: _Slice, text: str) -> bool:
    return any(text.lower() in one.tags[name].lower() for name in ("SeriesDescription", "ProtocolName"))


def _age(text: str) -> str:
    """Years from DICOM's "034Y" ("" if missing, 0 below one year); 90 and above become 90."""
    match = re.fullmatch(r"(\d+)([YMWD])", text.strip())
    if match is None:
        return ""
    return str(min(int(match[1]), OLDEST)) if match[2] == "Y" else "0"


def _labels(options: Options) -> tuple[dict[str, dict[str, str]], list[str]]:
    if options.metadata is None:
        return {}, []
    rows = read_rows(options.metadata)
    person = column(rows, "participant_id", "PatientID", "patient_id")
    if not person:
        raise ValueError(f"{options.metadata.name} has no column participant_id, only {list(rows[0]) if rows else []}.")
    wanted = [name for name in (options.label_column, *options.keep_columns) if name]
    absent = [name for name in wanted if name not in rows[0] and name not in ("age", "sex")]
    if absent:
        raise ValueError(f"{options.metadata.name} has no column {absent[0]!r}, only {list(rows[0])}.")
    wanted = [name for name in wanted if name in rows[0]]
    return {row[person]: {name: row[name] for name in wanted} for row in rows}, wanted
