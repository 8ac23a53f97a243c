"""IXI as it is distributed: ``IXI012-HH-1211-T1.nii.gz`` and its siblings in one folder or several, and ``IXI.xls``."""

import re
from collections import defaultdict
from pathlib import Path

from .scans import Found, LeftOut, Options, Scan, below, nifti_files
from .tables import cell, column, find_table, number, read_rows

NAME = re.compile(r"(IXI\d+)-([A-Za-z]+)-(\d+)-(\w+?)(?:\.nii)?(?:\.gz)?$", re.IGNORECASE)
SEX = {"1": "M", "2": "F"}


def find(folder: Path, options: Options) -> Found:
    """Scans of IXI with ages; people without an age in the table are kept only with ``keep_unlabelled``."""
    modalities = options.modalities or ("T1",)
    scans, left_out = [], []
    people, table_notes = _demographics(folder, options)
    by_person: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for path in nifti_files(folder):
        match = NAME.match(path.name)
        if match is None:
            left_out.append(LeftOut(below(path, folder), "not named as IXI012-HH-1211-T1.nii.gz"))
            continue
        modality = match[4].upper()
        if modality not in [name.upper() for name in modalities]:
            left_out.append(LeftOut(below(path, folder), f"modality {modality} was not asked for"))
        elif modality in by_person[match[1].upper(), match[2]]:
            left_out.append(LeftOut(below(path, folder), f"a second {modality} of {match[1]}"))
        else:
            by_person[match[1].upper(), match[2]][modality] = path
    for (person, site), files in sorted(by_person.items()):
        missing = [name for name in modalities if name.upper() not in files]
        first = below(next(iter(files.values())), folder) if files else person
        columns = {"age": "", "sex": ""} | people.get(int(person[3:]), {}) | {"site": site}
        if missing:
            left_out.append(LeftOut(first, f"no {', '.join(missing)} of {person}"))
        elif not columns["age"] and not options.keep_unlabelled:
            left_out.append(LeftOut(first, "no age in the table (kept with --keep_unlabelled)"))
        else:
            chosen = tuple(files[name.upper()] for name in modalities)
            scans.append(Scan(chosen, f"sub-{person}", columns))
    return Found(
        scans, left_out, tuple(modalities), "age", ("young", "middle", "old"), (35.0, 60.0), tuple(table_notes)
    )


def _demographics(folder: Path, options: Options) -> tuple[dict[int, dict[str, str]], list[str]]:
    """Age and sex by number. Its dates of birth and of the study are not read; some people stand in it twice."""
    path = options.metadata or find_table(folder, "IXI")
    if path is None:
        raise FileNotFoundError("no IXI.xls at or below the input folder (or say --metadata PATH).")
    rows = read_rows(path)
    person_id, age = column(rows, "IXI_ID"), column(rows, "AGE")
    sex = column(rows, "SEX_ID (1=m, 2=f)", "SEX_ID")
    if not person_id or not age:
        raise ValueError(f"{path.name} must have the columns IXI_ID and AGE, got {list(rows[0]) if rows else []}.")
    people: dict[int, dict[str, str]] = {}
    contradicted = set()
    for index, row in enumerate(rows):
        if not row[person_id]:
            continue
        person = int(number(rows, index, person_id, path))
        years = f"{number(rows, index, age, path):.2f}" if row[age] else ""
        found = {"age": years, "sex": SEX.get(cell(row, sex), "")}
        if person in people and people[person]["age"] and found["age"] and people[person]["age"] != found["age"]:
            contradicted.add(person)
        if person not in people or not people[person]["age"]:
            people[person] = found
    for person in contradicted:
        people[person]["age"] = ""
    notes = (
        [f"{len(contradicted)} people stand in {path.name} with two ages; both are ignored."] if contradicted else []
    )
    return people, notes
