"""What a layout finds in a folder: scans with the person each is of, and what was left out with the reason."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..tables import is_nifti, list_files


@dataclass(frozen=True)
class Scan:
    """One scan of one person, not read yet."""

    files: tuple[Path, ...]  # one per channel; of DICOM, one per slice
    participant_id: str
    columns: dict[str, str] = field(default_factory=dict)  # of metadata.csv, values as text, "" is missing
    session: str = ""
    run: str = ""
    kind: Literal["nifti", "analyze", "dicom"] = "nifti"
    row: str = ""  # "row 4 of metadata.csv", where the layout knows it


class LeftOut(NamedTuple):
    """A file or folder that is not used."""

    path: str  # below the input folder; of DICOM a made-up name, since folders are often called after patients
    reason: str


@dataclass(frozen=True)
class Options:
    """What a user may choose; each layout reads those that it knows."""

    modalities: tuple[str, ...] = ()
    label_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    keep_unlabelled: bool = False
    metadata: Path | None = None


@dataclass(frozen=True)
class Found:
    """Everything that a layout found."""

    scans: list[Scan]
    left_out: list[LeftOut]
    channel_names: tuple[str, ...]
    label_column: str | None = None
    class_names: tuple[str, ...] = ()
    class_edges: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files in and below a folder, also behind symbolic links, in natural order (run-2 before run-10)."""
    return sorted(filter(is_nifti, list_files(folder)), key=lambda path: natural(path.as_posix()))


def stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def below(path: Path, folder: Path) -> str:
    """The path as it reads from the input folder, with forward slashes: absolute paths name people's machines."""
    return path.relative_to(folder).as_posix()


def natural(text: str) -> list[str | int]:
    """Sorting key by which run-2 comes before run-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
