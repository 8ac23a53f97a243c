"""OASIS-1 (cross-sectional) as it is distributed: discs of sessions with atlas-registered, masked Analyze 7.5 images.

``disc*/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.{hdr,img}`` and
``oasis_cross-sectional.csv`` or ``.xlsx`` (Marcus et al., J. Cogn. Neurosci. 2007). A Clinical Dementia Rating of 0 is
CN, above 0 is AD.
"""

import re
from pathlib import Path

from .scans import Found, LeftOut, Options, Scan, below
from .tables import column, find_table, number, read_rows

SESSION = re.compile(r"(OAS1_\d{4})_MR(\d+)$")


def find(folder: Path, options: Options) -> Found:
    """Sessions with a masked, bias-corrected image and their diagnosis; those without a rating only when asked."""
    if options.modalities not in ((), ("T1",), ("t1",)):
        raise ValueError(f"OASIS-1 has T1 alone, got --modalities {list(options.modalities)}.")
    path = options.metadata or find_table(folder, "oasis_cross-sectional")
    if path is None:
        raise FileNotFoundError(
            "no oasis_cross-sectional.csv or .xlsx at or below the input folder (or say --metadata PATH)."
        )
    rows = read_rows(path)
    names = {name: column(rows, name) for name in ("ID", "M/F", "Age", "CDR")}
    if not names["ID"] or not names["CDR"]:
        raise ValueError(f"{path.name} must have the columns ID and CDR, got {list(rows[0]) if rows else []}.")
    clinical = {row[names["ID"]]: index for index, row in enumerate(rows)}
    scans, left_out = [], []
    for session in sorted(path for path in folder.rglob("OAS1_*_MR*") if path.is_dir()):
        match = SESSION.match(session.name)
        if match is None:
            continue
        images = sorted((session / "PROCESSED" / "MPRAGE" / "T88_111").glob("*_t88_masked_gfc.hdr"))
        if not images:
            left_out.append(LeftOut(below(session, folder), "no PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr"))
            continue
        if not images[0].with_suffix(".img").is_file():
            left_out.append(LeftOut(below(images[0], folder), "no .img beside the .hdr"))
            continue
        index = clinical.get(session.name)
        row = None if index is None else rows[index]
        rating = row[names["CDR"]] if row else ""
        if not rating and not options.keep_unlabelled:
            reason = "no rating (CDR) in the table" if row else f"not in {path.name}"
            left_out.append(LeftOut(below(session, folder), f"{reason} (kept with --keep_unlabelled)"))
            continue
        diagnosis = ""
        if index is not None and rating:
            diagnosis = "AD" if number(rows, index, names["CDR"], path) > 0 else "CN"
        person, visit = match.groups()
        columns = {
            "diagnosis": diagnosis,
            "cdr": rating,
            "age": row[names["Age"]] if row and names["Age"] else "",
            "sex": row[names["M/F"]] if row and names["M/F"] else "",
        }
        scans.append(Scan((images[0],), person, columns, session=visit, kind="analyze"))
    return Found(scans, left_out, ("T1",), "diagnosis", ("CN", "AD"))
