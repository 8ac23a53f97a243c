"""Report of a prepared data set: Markdown, one self-contained HTML page, and a montage of orthogonal views."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from ..utils.files import write_whole
from ..viz import Picture, Placed, Section, html_page, place, save, volume_rows
from ..viz.page import ROWS_SHOWN

MONTAGE = "montage.png"


def montage(paths: Sequence[Path], titles: Sequence[str], output: Path) -> None:
    """Three middle slices of each scan as one PNG, cut to what is brighter than 0."""
    rows: dict[str, list[Placed]] = {}
    for title, path in zip(titles, paths, strict=True):
        rows.setdefault(title, []).append(_foreground(path))
    save(volume_rows(rows, cell_width=4.5), output)


def _foreground(path: Path) -> Placed:
    """The scan in RAS axes, without the empty space around it, in [0, 1]."""
    image = nibabel.Nifti1Image.from_filename(path)
    image = image if image.ndim == 3 else image.slicer[..., 0]
    array = np.asarray(image.dataobj, dtype=np.float32)
    inside = np.nonzero(array > 0)
    box = tuple(slice(int(where.min()), int(where.max()) + 1) for where in inside)
    return place(array[box] / np.quantile(array[inside], 0.995), image.slicer[box].affine)


def as_markdown(title: str, sections: Sequence[Section], picture: str | None) -> str:
    """The report as Markdown."""
    lines = [f"# {title}", ""]
    if picture:
        lines += [f"![Middle slices of some scans]({picture})", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *(f"{sentence}  " for sentence in section.sentences)]
        if section.rows:
            lines += ["", _line(section.header), _line(["---"] * len(section.header))]
            lines += [_line(row) for row in section.rows[:ROWS_SHOWN]]
            if len(section.rows) > ROWS_SHOWN:
                lines += ["", f"... and {len(section.rows) - ROWS_SHOWN} more"]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write ``report.md`` and ``report.html`` into a folder that may hold a montage."""
    picture = folder / MONTAGE
    there = picture.is_file()
    write_whole(folder / "report.md", as_markdown(title, sections, MONTAGE if there else None))
    shown = [Section("Some of the scans", pictures=[Picture(picture.read_bytes(), "Middle slices")])] if there else []
    write_whole(folder / "report.html", html_page(title, [*sections, *shown]))
