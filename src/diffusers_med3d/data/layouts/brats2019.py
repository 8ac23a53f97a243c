"""BraTS 2019 training data as it is distributed: ``HGG|LGG/BraTS19_*/BraTS19_*_{flair,t1,t1ce,t2,seg}.nii.gz``.

``name_mapping.csv`` states the grade once more; its other names (TCGA, earlier BraTS) are read to find one person under
two names and reach no output.
"""

from pathlib import Path

from .scans import Found, LeftOut, Options, Scan, below, nifti_files, stem
from .tables import column, find_table, read_rows

GRADES = ("HGG", "LGG")
MODALITIES = ("flair", "t1", "t1ce", "t2")


def find(folder: Path, options: Options) -> Found:
    """Cases with all wanted modalities (t1 alone if none are named) as channels, and the grade as class."""
    modalities = tuple(name.lower() for name in options.modalities) or ("t1",)
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown:
        raise ValueError(f"BraTS 2019 has the modalities {list(MODALITIES)}, got --modalities {list(modalities)}.")
    path = options.metadata or find_table(folder, "name_mapping")
    rows = read_rows(path) if path else []
    name, grade, other = (column(rows, c) for c in ("BraTS_2019_subject_ID", "Grade", "TCGA_TCIA_subject_ID"))
    stated = {row[name]: row[grade] for row in rows} if name and grade else {}
    seen: dict[str, str] = {}
    same_person = {}
    if name and other:
        for row in rows:
            if row[other]:
                same_person[row[name]] = seen.setdefault(row[other], row[name])
    scans, left_out = [], []
    cases = [case for case in folder.rglob("BraTS19_*") if case.is_dir() and case.parent.name in GRADES]
    for case in sorted(cases):
        files = {stem(file).rsplit("_", 1)[-1].lower(): file for file in nifti_files(case)}
        missing = [modality for modality in modalities if modality not in files]
        own = case.parent.name
        if missing:
            left_out.append(LeftOut(below(case, folder), f"no {', '.join(missing)}; there are {sorted(files)}"))
        elif path is not None and stated.get(case.name, own) != own:
            left_out.append(
                LeftOut(below(case, folder), f"the folder says {own}, name_mapping.csv says {stated[case.name]}")
            )
        else:
            person = same_person.get(case.name, case.name)
            chosen = tuple(files[modality] for modality in modalities)
            scans.append(Scan(chosen, person, {"grade": own}, session=case.name if person != case.name else ""))
    return Found(scans, left_out, modalities, "grade", GRADES)
