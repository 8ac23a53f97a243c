"""Files and their table: NIfTI files of a folder, and the text of ``metadata.csv`` or BIDS's ``participants.tsv``."""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

NIFTI_SUFFIXES = (".nii", ".nii.gz")
METADATA_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
PARTICIPANTS = "participants.tsv"


def is_nifti(path: str | Path) -> bool:
    """Whether a file is a NIfTI by its name, in any case; hidden files (``._scan.nii`` of macOS) are none."""
    name = Path(path).name
    return name.lower().endswith(NIFTI_SUFFIXES) and not name.startswith(".")


def list_files(folder: str | Path) -> list[Path]:
    """All files in and below a folder, sorted, through symbolic links; each directory once, hidden ones left out."""
    files, seen = [], set()
    for root, directories, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        directories.sort()
        # In place: os.walk goes into what is left. A link to a directory that was seen would go round for ever.
        directories[:] = [
            name
            for name in directories
            if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) not in seen
        ]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in directories)
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files)


def decode_text(path: Path) -> str:
    """Text of a table: UTF-8, UTF-16 with its mark, or else Latin-1 (Windows-1252) with a warning."""
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} begins as UTF-16, but is none; save it as CSV in UTF-8.") from error
    if b"\0" in content:
        raise ValueError(f"{path} holds zero bytes, so it is no text in UTF-8; save it as CSV in UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        warnings.warn(f"{path} is not UTF-8; it is read as Latin-1 (Windows-1252).", stacklevel=2)
        return content.decode("cp1252", errors="replace")


def read_table(path: Path) -> dict[str, list]:
    """Columns of a csv or tsv file as text exactly as written, or of a jsonl file with the types of JSON.

    The separator is the one of comma, semicolon and tab that the first line has most of. Spaces around values go.

    Raises:
        ValueError: no rows, two columns of one name, a row with another number of values than the first line, or what
            is no table at all.
    """
    text = decode_text(path)
    if path.suffix == ".jsonl":
        rows = [_json_row(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = {name: [row.get(name) for row in rows] for name in names}
    else:
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
        stripped = ((reader.line_num, [value.strip() for value in row]) for row in reader)
        try:
            lines = [(number, row) for number, row in stripped if any(row)]
        except csv.Error as error:
            raise ValueError(f"{path} is no table: {error}.") from error
        names = lines[0][1] if lines else []
        for number, row in lines[1:]:
            if len(row) != len(names):
                raise ValueError(
                    f"{path} line {number} has {len(row)} values, the first line names {len(names)} columns; a value "
                    f"that holds {separator!r} must stand in quotes."
                )
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a column twice: {names}.")
        table = {name: [row[i] for _, row in lines[1:]] for i, name in enumerate(names)}
    if not table or not next(iter(table.values())):
        raise ValueError(f"{path} has no rows.")
    return table


def _json_row(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} line {number} is no JSON: {error}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number} must be a JSON object, got {row!r:.60}.")
    return row


def _file_column(path: Path, columns: Iterable[str]) -> str:
    """The column that names the files: ``file_name``, or one that ends so (as ``datasets``' niftifolder has it)."""
    found = [name for name in columns if name == "file_name" or name.endswith("_file_name")]
    if len(found) != 1:
        raise ValueError(f"{path} needs one column file_name that names the scans; its columns are {list(columns)}.")
    return found[0]


def _resolve(name: str, folder: Path) -> Path | None:
    """The file that a row names, relative to the folder of its table or absolute; None where there is none."""
    for candidate in (name, name.replace("\\", "/")):
        path = folder / candidate  # an absolute name stays as it is
        if path.is_file():
            return path
    return None


def _missing_files(path: Path, names: list[str]) -> ValueError:
    first = names[0]
    elsewhere = Path(first).is_absolute() or PureWindowsPath(first).is_absolute()
    cause = (
        "an absolute path of another machine? Write it relative to the folder of the table"
        if elsewhere
        else f"looked for in {path.parent}"
    )
    return ValueError(f"{path}: {len(names)} row(s) name a file that is not there, the first is {first!r} ({cause}).")


def read_folder(folder: Path) -> tuple[list[Path], dict[str, list]]:
    """Scans of a folder and their columns, in the order of the rows.

    Every row of every ``metadata.csv`` (``.tsv``, ``.jsonl``) in or below the folder names one file, relative to the
    table. No name of a file or folder means anything. Without such a table, BIDS's ``participants.tsv`` is read.

    Raises:
        FileNotFoundError: no NIfTI file, or no table.
        ValueError: a row without a file, a file that is no NIfTI, or one that two rows name.
    """
    files = list_files(folder)
    scans = [path for path in files if is_nifti(path)]
    if not scans:
        raise FileNotFoundError(f"no NIfTI file (.nii, .nii.gz) in {folder} or below it.")
    tables = [path for path in files if path.name in METADATA_NAMES]
    if not tables:
        return _read_bids(folder, scans)
    paths: list[Path] = []
    columns: dict[str, list] = {}
    for table in tables:
        found = read_table(table)
        names = found.pop(_file_column(table, found))
        odd = [name for name in names if name is not None and not isinstance(name, str)]
        if odd:
            raise ValueError(f"{table}: file_name must be text in every row, got {odd[0]!r:.60}.")
        if any(not name for name in names):
            raise ValueError(f"{table}: {sum(not name for name in names)} row(s) have no file_name.")
        resolved = {name: _resolve(name, table.parent) for name in names}
        missing = [name for name in names if resolved[name] is None]
        if missing:
            raise _missing_files(table, missing)
        for name in names:
            if not is_nifti(name.replace("\\", "/")):
                raise ValueError(f"{table} names {name!r}, which is no NIfTI file (.nii, .nii.gz).")
        for name in dict.fromkeys([*columns, *found]):
            columns[name] = columns.get(name, [None] * len(paths)) + found.get(name, [None] * len(names))
        paths += [path for name in names if (path := resolved[name]) is not None]
    real = [os.path.realpath(path) for path in paths]
    if len(set(real)) < len(real):
        twice = next(path for path in real if real.count(path) > 1)
        raise ValueError(f"two rows of the metadata name the same file, {twice}.")
    unlisted = [path for path in scans if os.path.realpath(path) not in set(real)]
    if unlisted:
        warnings.warn(
            f"{len(unlisted)} NIfTI file(s) in {folder} have no row in the metadata and are left out, the first is "
            f"{unlisted[0].relative_to(folder)}.",
            stacklevel=3,
        )
    return paths, columns


def _read_bids(folder: Path, scans: list[Path]) -> tuple[list[Path], dict[str, list]]:
    """Rows of the nearest ``participants.tsv`` for files that are named ``sub-<label>_..._<suffix>``."""
    where = folder.resolve()
    table = next((one / PARTICIPANTS for one in (where, *where.parents[:3]) if (one / PARTICIPANTS).is_file()), None)
    if table is None:
        raise FileNotFoundError(
            f"no metadata.csv in {folder} or below it (columns file_name, participant_id and a label), and no BIDS "
            f"{PARTICIPANTS} in it or above it; examples/prepare_dataset.py writes one from the usual layouts."
        )
    participants = read_table(table)
    if "participant_id" not in participants:
        raise ValueError(f"{table} has no column participant_id, only {list(participants)}.")
    rows = {name.removeprefix("sub-"): row for row, name in enumerate(participants["participant_id"])}
    subjects = [match and match[1] for match in (re.match(r"sub-([^_]+)_", path.name) for path in scans)]
    suffixes = sorted({path.name.lower().removesuffix(".gz").removesuffix(".nii").rpartition("_")[2] for path in scans})
    strangers = [path.name for path, name in zip(scans, subjects, strict=True) if name not in rows]
    if strangers or len(suffixes) > 1:
        why = f"{strangers[0]} belongs to none of its participants" if strangers else f"the files are {suffixes}"
        raise ValueError(
            f"{folder} has no metadata.csv, and {table} alone does not say which files are the scans ({why}); write a "
            "metadata.csv with: python examples/prepare_dataset.py --layout bids --input DIR --output DIR"
        )
    return scans, {column: [values[rows[name]] for name in subjects] for column, values in participants.items()}


def as_numbers(values: list) -> list:
    """A column of text as numbers where every value is one (empty ones become None), else as it is.

    Text that begins with a zero, such as "007", is a name.
    """
    if not any(values) or any(value and (not isinstance(value, str) or re.match(r"0\d", value)) for value in values):
        return values
    try:
        numbers = [float(value) if value else None for value in values]
    except ValueError:
        return values
    whole = all(value is None or re.fullmatch(r"[+-]?\d+", text) for value, text in zip(numbers, values, strict=True))
    return [int(value) if whole and value is not None else value for value in numbers]
