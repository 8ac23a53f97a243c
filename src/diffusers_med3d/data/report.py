"""Report of a prepared data set: Markdown, one self-contained HTML page, and a montage of orthogonal views."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import zoom

from ..utils.files import whole_file, write_whole

MONTAGE = "montage.png"
CELL = 160  # pixels
ROWS_SHOWN = 500
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
    "th{background:#f2f2f2}img{max-width:100%}"
)


@dataclass
class Section:
    """A heading with sentences and a table."""

    title: str
    sentences: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = field(default_factory=list)


def montage(paths: Sequence[Path], titles: Sequence[str], output: Path) -> None:
    """Three middle slices of each scan as one PNG; the person's right, front and top are right, right and up."""
    mosaic = np.concatenate([_views(path) for path in paths])
    figure = Figure(figsize=(mosaic.shape[1] / 80, mosaic.shape[0] / 80), facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
    for number, title in enumerate(titles):
        axes.text(4, number * CELL + 12, title, color="white", fontsize=8)
    with whole_file(output) as temporary:
        figure.savefig(temporary, format="png", dpi=80, metadata={"Software": None})


def _views(path: Path) -> np.ndarray:
    """Axial, coronal and sagittal middle slices side by side, (160, 480) in [0, 1], of one scale."""
    image = nibabel.Nifti1Image.from_filename(path)
    array = np.asarray(image.dataobj, dtype=np.float32)
    array = array[..., 0] if array.ndim == 4 else array
    inside = np.nonzero(array > 0)
    box = tuple(slice(where.min(), where.max() + 1) for where in inside)
    spacing = np.array(image.header.get_zooms()[:3])
    top = float(np.quantile(array[inside], 0.995))
    array = np.clip(array[box] / top, 0, 1)
    scale = (CELL - 20) / (np.array(array.shape) * spacing).max()  # pixels per mm
    row = np.zeros((CELL, 3 * CELL), np.float32)
    for number, axis in enumerate((2, 1, 0)):
        across, up = (one for one in range(3) if one != axis)
        plane = array.take(array.shape[axis] // 2, axis).T[::-1]
        view = zoom(plane, (spacing[up] * scale, spacing[across] * scale), order=1, grid_mode=True, mode="nearest")
        low, left = (CELL - view.shape[0]) // 2, number * CELL + (CELL - view.shape[1]) // 2
        row[low : low + view.shape[0], left : left + view.shape[1]] = view
    return row


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


def as_html(title: str, sections: Sequence[Section], picture: bytes | None) -> str:
    """The report as one HTML page that needs no other file."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>',
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences]
        if section.rows:
            head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in section.header)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
                for row in section.rows[:ROWS_SHOWN]
            )
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
            if len(section.rows) > ROWS_SHOWN:
                parts.append(f"<p>... and {len(section.rows) - ROWS_SHOWN} more</p>")
    if picture:
        encoded = base64.b64encode(picture).decode()
        parts.append(f'<h2>Some of the scans</h2><img alt="Middle slices" src="data:image/png;base64,{encoded}">')
    return "\n".join(parts) + "</html>\n"


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """Write ``report.md`` and ``report.html`` into a folder that may hold a montage."""
    picture = folder / MONTAGE
    there = picture.is_file()
    write_whole(folder / "report.md", as_markdown(title, sections, MONTAGE if there else None))
    write_whole(folder / "report.html", as_html(title, sections, picture.read_bytes() if there else None))
