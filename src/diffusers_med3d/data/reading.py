"""From a folder of NIfTI files, or any ``datasets.Dataset`` with a NIfTI column, to rows of (scan, subject, label)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Nifti, load_dataset


@dataclass
class DataArguments:
    """Where the scans are and how they become volumes; shared by the scripts of all stages."""

    data_dir: str = field(metadata={"help": "Folder of NIfTI files with metadata.csv, as `datasets`' niftifolder."})
    split_file: str = field(metadata={"help": "JSON file with the split by subject (examples/make_split.py)."})
    volume_shape: list[int] = field(
        default_factory=lambda: [64, 64, 64], metadata={"help": "Size (X, Y, Z) in voxels after crop and pad."}
    )
    spacing: list[float] = field(
        default_factory=lambda: [3.0, 3.0, 3.0], metadata={"help": "Voxel size (X, Y, Z) in mm after resampling."}
    )
    subject_column: str = field(default="participant_id", metadata={"help": "Column that names the subject."})
    label_column: str = field(default="age", metadata={"help": "Column that the class is made from."})
    class_names: list[str] = field(
        default_factory=lambda: ["young", "middle", "old"],
        metadata={"help": "Names of the classes in order; the null class comes after them and is not named."},
    )
    class_edges: list[float] | None = field(
        default=None,
        metadata={
            "help": "For a number in label_column: class 0 is <= the first edge, the last class is >= the last edge; "
            "one edge alone belongs to class 0. 35 60 if no class_names are given either; class_names without edges "
            "are those in label_column."
        },
    )

    antialias: bool = field(
        default=False,
        metadata={
            "help": "Before resampling, smooth along every axis whose voxels get larger: else detail finer than the "
            "new voxels folds into coarser patterns. The bundled checkpoints (2 to 3 mm) are made without."
        },
    )

    registered: bool = field(
        default=False,
        metadata={
            "help": "The scans lie on one grid of volume_shape and spacing (examples/prepare_dataset.py): take them as "
            "they lie, without resampling and without moving each to the middle."
        },
    )

    def __post_init__(self) -> None:
        for name, values in (("volume_shape", self.volume_shape), ("spacing", self.spacing)):
            if len(values) != 3 or any(value <= 0 for value in values):
                raise ValueError(f"{name} must be three positive numbers (X, Y, Z), got {values}.")
        if self.class_edges is None:
            self.class_edges = [35.0, 60.0] if self.class_names == ["young", "middle", "old"] else []
        if self.class_edges and len(self.class_edges) != len(self.class_names) - 1:
            raise ValueError(
                f"{len(self.class_names)} classes need {len(self.class_names) - 1} class_edges, got {self.class_edges}."
            )
        if list(self.class_edges) != sorted(self.class_edges):
            raise ValueError(f"class_edges must rise, got {self.class_edges}.")


def read_scans(source: str | Path | Dataset) -> Dataset:
    """Open scans without decoding them.

    Args:
        source: folder that ``datasets.load_dataset("niftifolder", data_dir=...)`` reads, or a ``Dataset`` with exactly
            one NIfTI column (any name).

    Returns:
        Dataset whose NIfTI column is called ``nifti`` and is not decoded; all other columns are kept.

    Raises:
        FileNotFoundError: no such folder, or no NIfTI file in it.
        ValueError: no NIfTI column, or several.
    """
    if not isinstance(source, Dataset):
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder of scans: {folder}")
        if not any(path.name.endswith((".nii", ".nii.gz")) for path in folder.rglob("*")):
            raise FileNotFoundError(f"no NIfTI file (.nii, .nii.gz) in {folder} or below it.")
        source = load_dataset("niftifolder", data_dir=str(folder), split="train")
    columns = [name for name, feature in source.features.items() if isinstance(feature, Nifti)]
    if len(columns) != 1:
        raise ValueError(f"expected exactly one NIfTI column, found {columns} among {source.column_names}.")
    if columns[0] != "nifti":
        source = source.rename_column(columns[0], "nifti")
    return source.cast_column("nifti", Nifti(decode=False))


def check_columns(scans: Dataset, args: DataArguments) -> None:
    """Refuse scans without the columns that ``args`` names (ValueError with those there are) or without a subject."""
    for option, column in (("subject_column", args.subject_column), ("label_column", args.label_column)):
        if column not in scans.column_names:
            raise ValueError(f"the scans have no column {column!r} ({option}), only {scans.column_names}.")
    nameless = scans[args.subject_column][:].count(None)
    if nameless:
        raise ValueError(f"{nameless} scan(s) have no subject in the column {args.subject_column!r}.")


def decode_nifti(entry: dict, subject: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode one undecoded NIfTI cell to (array (X, Y, Z) or (X, Y, Z, C) float32, affine (4, 4)).

    Raises:
        ValueError: corrupt file, missing affine, NaN, wrong rank or an empty image, naming the subject and the value.
    """
    name = f"scan of {subject} ({Path(entry['path']).name if entry['path'] else 'bytes'})"
    try:
        image = Nifti().decode_example({"path": entry["path"], "bytes": entry["bytes"]})
        array = np.asarray(image.dataobj, dtype=np.float32)
    except Exception as error:  # a damaged header makes nibabel raise almost anything
        raise ValueError(f"{name} cannot be read as NIfTI: {error}") from error
    header, affine = image.header, image.affine
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise ValueError(
            f"{name} has no affine (sform_code and qform_code are 0); orientation and spacing are unknown."
        )
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError(f"{name} has an unusable affine: {None if affine is None else affine.tolist()}.")
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} must have 3 or 4 axes, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} NaN or infinite voxels.")
    if array.max() <= array.min():
        raise ValueError(f"{name} is empty: every voxel is {array.flat[0]}.")
    return array, affine


def class_of(value: object, class_names: Sequence[str], class_edges: Sequence[float]) -> int:
    """Class index of a label; a missing label is the null class, ``len(class_names)``.

    With ``class_edges`` (ascending, one fewer than classes) a number is class 0 when it is <= the first edge and the
    last class when it is >= the last edge; in between, class k lies above edge k-1 and up to edge k. One edge alone is
    the first: it belongs to class 0.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return len(class_names)
    if not class_edges:
        # A column of integers with gaps is read as floats
        if isinstance(value, float) and value.is_integer() and str(value) not in class_names:
            value = int(value)
        if str(value) not in class_names:
            raise ValueError(f"label {value!r} is none of the classes {list(class_names)}.")
        return list(class_names).index(str(value))
    number = float(value)
    if number > class_edges[0] and number >= class_edges[-1]:
        return len(class_names) - 1
    return sum(number > edge for edge in class_edges[:-1])
