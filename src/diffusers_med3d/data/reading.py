"""From a folder of NIfTI files, or any ``datasets.Dataset`` with a NIfTI column, to rows of (scan, subject, label)."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Nifti
from tqdm.auto import tqdm

from ..utils.wording import few
from .grid import spacing_of
from .labels import is_missing
from .nifti import check_header, open_nifti, scan_name
from .tables import read_folder


def read_scans(source: str | Path | Dataset) -> Dataset:
    """Open scans without decoding them.

    Args:
        source: folder of NIfTI files with ``metadata.csv`` (``file_name`` and any columns; what ``datasets`` calls a
            niftifolder), or a ``Dataset`` with exactly one NIfTI column (any name).

    Returns:
        Dataset whose NIfTI column is called ``nifti`` and is not decoded; all other columns are kept. Those of a csv
        file are text exactly as written, empty where it is.

    Raises:
        FileNotFoundError: no such folder, no NIfTI file in it, or no table.
        ValueError: no NIfTI column, or several; a table that cannot be read or whose files are not there.
        TypeError: a source that is neither.
    """
    if isinstance(source, DatasetDict | IterableDatasetDict):
        raise TypeError(f"expected one Dataset, got one with the splits {list(source)}; pass one of them.")
    if isinstance(source, IterableDataset):
        raise TypeError("expected a Dataset, got an IterableDataset (streaming=True); load it without streaming.")
    if isinstance(source, Dataset):
        return _undecoded(source.with_format(None))  # else numpy, torch and pandas would each change what is missing
    if not isinstance(source, str | Path):
        raise TypeError(f"expected a folder or a datasets.Dataset, got {type(source).__name__}.")
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of scans: {folder}")
    paths, columns = read_folder(folder)
    if "nifti" in columns:
        raise ValueError(f"the metadata of {folder} must not name a column 'nifti'; that is where the scans go.")
    rows = Dataset.from_dict(columns) if columns else Dataset.from_dict({"": [None] * len(paths)}).remove_columns("")
    entries = [{"path": str(path), "bytes": None} for path in paths]
    return rows.add_column("nifti", entries).cast_column("nifti", Nifti(decode=False))


def _undecoded(source: Dataset) -> Dataset:
    columns = [name for name, feature in source.features.items() if isinstance(feature, Nifti)]
    if len(columns) != 1:
        raise ValueError(f"expected exactly one NIfTI column, found {columns} among {source.column_names}.")
    if columns[0] != "nifti":
        source = source.rename_column(columns[0], "nifti")
    return source.cast_column("nifti", Nifti(decode=False))


def check_columns(scans: Dataset, subject_column: str, label_column: str | None) -> None:
    """Refuse scans without these columns (ValueError with those there are) or without a subject."""
    for option, column in (("subject_column", subject_column), ("label_column", label_column)):
        if column is not None and column not in scans.column_names:
            raise ValueError(f"the scans have no column {column!r} ({option}), only {scans.column_names}.")
    nameless = sum(_no_name(subject) for subject in scans[subject_column][:])
    if nameless:
        raise ValueError(f"{nameless} scan(s) have no subject in the column {subject_column!r}.")


def _no_name(subject: object) -> bool:
    return not str(subject).strip() or (not isinstance(subject, str) and is_missing(subject))


def check_scans(
    rows: Dataset, subjects: list[str], num_channels: int | None = None
) -> tuple[int, list[tuple[float, ...]]]:
    """Number of channels of a set of scans, and the voxel size (right, anterior, superior) in mm of each, by their
    headers alone.

    Args:
        rows: of ``read_scans``.
        subjects: of each row, for messages.
        num_channels: how many every scan must have; None for what most of them have.

    Raises:
        ValueError: see ``nifti.check_header``; scans with another number of channels than most, all named.
    """
    channels, spacings, names = [], [], []
    for subject, entry in zip(tqdm(subjects, desc="reading headers", unit="scan"), rows["nifti"], strict=True):
        names.append(scan_name(entry, subject))
        count, affine = check_header(open_nifti(entry, subject), names[-1], num_channels)
        channels.append(count)
        spacings.append(spacing_of(affine))
    usual = max(sorted(set(channels)), key=channels.count)
    odd = [f"{name} {count}" for name, count in zip(names, channels, strict=True) if count != usual]
    if odd:
        raise ValueError(
            f"{channels.count(usual)} of {len(channels)} scans have {usual} channel(s), but {few(odd, separator='; ')}."
        )
    return usual, spacings
