"""Tables that come with data sets (csv, tsv, xlsx, xls) as rows of text: an id such as 001 stays what it is."""

from pathlib import Path

from ..labels import is_missing, number_of
from ..tables import list_files, read_table

ENDINGS = (".csv", ".tsv", ".xlsx", ".xls")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table by column name, all values text; a missing value is "".

    Of a workbook the first sheet is read; xlsx needs openpyxl, xls needs xlrd (``diffusers-med3d[layouts]``).

    Raises:
        ValueError: see ``data.tables.read_table``.
    """
    ending = path.suffix.lower()
    if ending in (".xlsx", ".xls"):
        lines = [[_cell(value) for value in row] for row in (_xlsx if ending == ".xlsx" else _xls)(path)]
        lines = [line for line in lines if any(line)]
        header = [name for name in lines[0] if name] if lines else []
        if lines and lines[0][: len(header)] != header or len(set(header)) < len(header):
            raise ValueError(f"{path.name} must name every column once, in its first row; got {lines[0]}.")
        columns = {name: [line[i] for line in lines[1:]] for i, name in enumerate(header)}
    else:
        columns = read_table(path)
    columns = {name: ["" if is_missing(value) else str(value) for value in values] for name, values in columns.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _xlsx(path: Path) -> list[tuple]:
    try:
        import openpyxl
    except ImportError as error:
        raise ImportError(f'{path.name} needs openpyxl: pip install "diffusers-med3d[layouts]"') from error
    return list(openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0].iter_rows(values_only=True))


def _xls(path: Path) -> list[list]:
    try:
        import xlrd
    except ImportError as error:
        raise ImportError(f'{path.name} needs xlrd: pip install "diffusers-med3d[layouts]"') from error
    sheet = xlrd.open_workbook(path).sheet_by_index(0)
    return [sheet.row_values(i) for i in range(sheet.nrows)]


def _cell(value: object) -> str:
    """Text of a workbook's cell; workbooks store 12 as 12.0."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def find_table(folder: Path, name: str) -> Path | None:
    """The table at or below a folder whose name begins with ``name``; of several, the one that lies highest."""
    found = [
        path
        for path in list_files(folder)
        if path.suffix.lower() in ENDINGS and path.name.lower().startswith(name.lower())
    ]
    return min(found, key=lambda path: (len(path.parts), path.as_posix()), default=None)


def column(rows: list[dict[str, str]], *names: str) -> str:
    """The column's name as written, for the first of ``names`` that is there in any case; "" if none is."""
    there = {name.lower(): name for name in rows[0]} if rows else {}
    return next((there[name.lower()] for name in names if name.lower() in there), "")


def number(rows: list[dict[str, str]], index: int, name: str, path: Path) -> float:
    """The number that a row says in a column.

    Raises:
        ValueError: it is none, with the file, the row (counted from 1, without the header) and the column.
    """
    try:
        return number_of(rows[index][name])
    except ValueError as error:
        raise ValueError(f"{path.name}, row {index + 1}, column {name}: {error}") from error


def cell(row: dict[str, str], name: str) -> str:
    """What a row says in a column; "" where there is no such column."""
    return row[name] if name else ""
