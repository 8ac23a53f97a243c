"""BIDS: ``sub-*/[ses-*/]anat/sub-*_..._T1w.nii.gz`` with ``participants.tsv`` and, per person, ``sub-*_sessions.tsv``.

The rules of the standard that matter here are few, so they are followed by hand (BIDS 1.10, "Magnetic resonance
imaging" and "Modality agnostic files"): entities are ``key-value`` pairs parted by underscores, the last part is the
suffix, ``n/a`` is a missing value, what stands in ``derivatives``, ``sourcedata`` and ``code`` is not raw data.
"""

from collections import defaultdict
from pathlib import Path

from .scans import Found, LeftOut, Options, Scan, below, nifti_files, stem
from .tables import column, read_rows

NOT_RAW = ("derivatives", "sourcedata", "code")


def find(folder: Path, options: Options) -> Found:
    """All runs of the wanted suffixes (T1w if none are named); several suffixes become channels of one scan."""
    modalities = options.modalities or ("T1w",)
    participants = _rows(options.metadata or folder / "participants.tsv", "participant_id")
    by_scan: dict[tuple[str, str, str], dict[str, Path]] = defaultdict(dict)
    left_out = []
    for path in nifti_files(folder):
        name = below(path, folder)
        if name.split("/")[0] in NOT_RAW:
            continue
        *pairs, suffix = stem(path).split("_")
        entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
        if "sub" not in entities or len(entities) != len(pairs):
            left_out.append(LeftOut(name, "not named as sub-01_ses-1_T1w.nii.gz"))
        elif suffix not in modalities:
            left_out.append(LeftOut(name, f"suffix {suffix} was not asked for"))
        else:
            rest = "_".join(pair for pair in pairs if pair.split("-")[0] not in ("sub", "ses"))
            by_scan[entities["sub"], entities.get("ses", ""), rest][suffix] = path
    scans = []
    runs: dict[tuple[str, str], int] = defaultdict(int)
    wanted = [name for name in (options.label_column, "age", "sex", *options.keep_columns) if name]
    for (subject, session, _), files in by_scan.items():
        first = below(next(iter(files.values())), folder)
        missing = [name for name in modalities if name not in files]
        if missing:
            left_out.append(LeftOut(first, f"no {', '.join(missing)} beside it"))
            continue
        own = dict(participants.get(f"sub-{subject}", {}))
        if session:
            table = folder / f"sub-{subject}" / f"sub-{subject}_sessions.tsv"
            later = _rows(table, "session_id").get(f"ses-{session}", {})
            own.update({name: value for name, value in later.items() if value})
        columns = {name: own.get(name, "") for name in dict.fromkeys(wanted)}
        if options.label_column and not columns[options.label_column] and not options.keep_unlabelled:
            left_out.append(LeftOut(first, f"no {options.label_column} (kept with --keep_unlabelled)"))
            continue
        runs[subject, session] += 1
        chosen = tuple(files[name] for name in modalities)
        scans.append(Scan(chosen, f"sub-{subject}", columns, session, str(runs[subject, session])))
    _check_label(options, participants, scans)
    return Found(scans, left_out, tuple(modalities), options.label_column)


def _rows(path: Path, key: str) -> dict[str, dict[str, str]]:
    """Rows of a table by their id; no table is an empty one."""
    if not path.is_file():
        return {}
    rows = read_rows(path)
    name = column(rows, key)
    if rows and not name:
        raise ValueError(f"{path.name} has no column {key}, only {list(rows[0])}.")
    return {row[name]: row for row in rows}


def _check_label(options: Options, participants: dict[str, dict[str, str]], scans: list[Scan]) -> None:
    label = options.label_column
    if label and not any(scan.columns[label] for scan in scans):
        there = list(next(iter(participants.values()), {}))
        raise ValueError(f"no scan has a value of the column {label!r}; participants.tsv has {there}.")
