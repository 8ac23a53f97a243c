"""A folder of NIfTI files with a table that names file and person: metadata.csv with ``file_name, participant_id``."""

from pathlib import Path, PureWindowsPath

from .scans import Found, LeftOut, Options, Scan, below, nifti_files, stem
from .tables import cell, column, find_table, read_rows


def find(folder: Path, options: Options) -> Found:
    """The scans that the table names; without a table every file is another person and there are no labels."""
    if len(options.modalities) > 1:
        raise ValueError(
            "in a niftifolder the channels of a scan stand in one file (X, Y, Z, C); --modalities names them only."
        )
    files = {below(path, folder): path for path in nifti_files(folder)}
    path = options.metadata or find_table(folder, "metadata")
    channel_names = options.modalities or ("image",)
    if path is None:
        scans = [Scan((file,), stem(file)) for file in files.values()]
        notes = ("there is no metadata.csv: every file counts as another person, without a label",)
        return Found(scans, [], channel_names, notes=notes)
    rows = read_rows(path)
    names = {"file": column(rows, "file_name"), "person": column(rows, "participant_id", "subject_id", "subject")}
    if not all(names.values()):
        raise ValueError(
            f"{path.name} must have the columns file_name and participant_id, got {list(rows[0]) if rows else []}."
        )
    wanted = [name for name in (options.label_column, "age", "sex", *options.keep_columns) if name]
    label = options.label_column
    if label and not column(rows, label):
        raise ValueError(f"{path.name} has no column {label!r}, only {list(rows[0])}.")
    session = column(rows, "session")
    scans, left_out, used = [], [], set()
    for number, row in enumerate(rows, 2):
        name = PureWindowsPath(row[names["file"]]).as_posix().removeprefix("./")
        file = files.get(name) or files.get(
            below(path.parent, folder) + "/" + name if path.is_relative_to(folder) else ""
        )
        columns = {name: cell(row, column(rows, name)) for name in dict.fromkeys(wanted)}
        columns = {name: value for name, value in columns.items() if name == label or column(rows, name)}
        if file is None:
            left_out.append(LeftOut(PureWindowsPath(name).name or f"row {number}", f"row {number}: no such file"))
            continue
        used.add(file)
        if not row[names["person"]]:
            left_out.append(LeftOut(below(file, folder), f"row {number}: no {names['person']}"))
        elif label and not columns[label] and not options.keep_unlabelled:
            left_out.append(LeftOut(below(file, folder), f"no {label} (kept with --keep_unlabelled)"))
        else:
            where = f"row {number} of {path.name}"
            scans.append(Scan((file,), row[names["person"]], columns, cell(row, session), row=where))
    left_out += [LeftOut(name, f"not in {path.name}") for name, file in files.items() if file not in used]
    return Found(scans, left_out, channel_names, label)
