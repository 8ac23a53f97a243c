"""From what stands in the label column to a class."""

import math
import re
import warnings
from collections.abc import Collection, Sequence

import numpy as np
import torch
from datasets import ClassLabel, Dataset

MISSING = ("", "na", "n/a", "#n/a", "nan", "none", "null", "nat", "<na>")
"""How tables write that a value is missing, in small letters."""

_AGE = re.compile(r"(\d{1,3})([YMWD])")  # DICOM's age string
_DAYS = {"Y": 365.25, "M": 365.25 / 12, "W": 7.0, "D": 1.0}


def is_missing(value: object) -> bool:
    """Whether a value says that there is none: None, NaN, NaT, empty text, or a word such as "n/a"."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.item()
    return value is None or str(value).strip().lower() in MISSING


def number_of(value: object) -> float:
    """A number from a number or its text; also DICOM's "034Y" and, with a warning, a capped age such as "90+".

    Raises:
        ValueError: with what was found and what is wanted.
    """
    text = str(value).strip()
    if match := _AGE.fullmatch(text):
        return int(match[1]) * _DAYS[match[2]] / _DAYS["Y"]
    if re.fullmatch(r"\d+(\.\d+)?\+", text):
        warnings.warn(f"{text!r} is read as {text[:-1]}.", stacklevel=2)
        text = text[:-1]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        hint = " (a decimal comma?)" if re.fullmatch(r"-?\d+,\d+", text) else ""
        raise ValueError(f"{value!r} is no number{hint}; wanted is one such as 22.5, or nothing where it is missing.")
    return number


def class_of(value: object, class_names: Sequence[str], class_edges: Sequence[float]) -> int:
    """Class index of a label; a missing label is the null class, ``len(class_names)``.

    Words for a missing value ("None", "NA", "null", ...) are classes where ``class_names`` lists them. With
    ``class_edges`` (ascending, one fewer than classes) a number is class 0 when it is <= the first edge and the last
    class when it is >= the last edge; in between, class k lies above edge k-1 and up to edge k. One edge alone is the
    first: it belongs to class 0.

    Raises:
        ValueError: a label that is none of the classes, or no number where there are edges.
    """
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        value = value.item()
    text, names = str(value).strip(), list(class_names)
    if not class_edges and isinstance(value, str) and text in names:
        return names.index(text)
    if not names or is_missing(value):
        return len(names)
    if not class_edges:
        if text not in names and re.fullmatch(r"-?\d+\.0+", text):
            text = text.partition(".")[0]  # a column of whole numbers with gaps is read as 1.0
        if text not in names:
            raise ValueError(f"label {value!r} is none of the classes {names}.")
        return names.index(text)
    number = number_of(value)
    if number > class_edges[0] and number >= class_edges[-1]:
        return len(names) - 1
    return sum(number > edge for edge in class_edges[:-1])


def classes_of(
    rows: Dataset,
    label_column: str | None,
    class_names: Sequence[str],
    class_edges: Sequence[float],
    used: Collection[int] | None = None,
) -> list[int]:
    """Class of every row by ``class_of``; without classes all are 0, the null class.

    Args:
        rows: of ``read_scans``.
        label_column, class_names, class_edges: see ``class_of``.
        used: numbers of the rows that are wanted, None for all; labels of others are not looked at (null class).

    Raises:
        ValueError: see ``class_of``, with the number of the row and its file.
    """
    classes = [len(class_names)] * len(rows)
    if not class_names:
        return classes
    values, feature = rows[label_column][:], rows.features[label_column]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    for row in range(len(rows)) if used is None else sorted(used):
        try:
            classes[row] = class_of(values[row], class_names, class_edges)
        except ValueError as error:
            name = file_of(rows, row)
            raise ValueError(f"row {row + 1} of the metadata{name}, column {label_column!r}: {error}") from error
    return classes


def file_of(rows: Dataset, row: int) -> str:
    """Name of a row's file in brackets for a message, empty for scans that are no files."""
    path = rows[row]["nifti"]["path"] if "nifti" in rows.column_names else None
    return f" ({path.replace(chr(92), '/').rpartition('/')[2]})" if path else ""
