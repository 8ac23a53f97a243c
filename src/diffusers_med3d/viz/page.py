"""One HTML page that needs no other file: sections with sentences, tables and pictures."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from .style import png_bytes

ROWS_SHOWN = 500
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "h2{margin-top:2em;border-bottom:1px solid #ddd}div.wide{overflow-x:auto}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}"
    "th{background:#f2f2f2}img{max-width:100%}figure{margin:1em 0}figcaption{color:#555;font-size:13px}"
    "pre{background:#f6f6f6;padding:.8em;white-space:pre-wrap;overflow-wrap:anywhere}"
)


@dataclass
class Picture:
    """A picture with a line below it.

    Args:
        image: a matplotlib figure, or the bytes of a PNG or GIF file.
        caption: below it, and for readers who cannot see it.
    """

    image: Figure | bytes
    caption: str = ""


@dataclass
class Section:
    """A heading with sentences, a table, pictures and code.

    Args:
        title: the heading.
        sentences: one paragraph each.
        header, rows: of the table; no rows, no table.
        pictures: below the table.
        code: a command, as it is typed.
    """

    title: str
    sentences: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = field(default_factory=list)
    pictures: Sequence[Picture] = ()
    code: str = ""


def html_page(title: str, sections: Sequence[Section]) -> str:
    """One HTML page that needs no other file: pictures stand in it as data, and nothing is loaded from elsewhere.

    A table shows its first 500 rows and says how many it leaves out.
    """
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
            parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
            if len(section.rows) > ROWS_SHOWN:
                parts.append(f"<p>... and {len(section.rows) - ROWS_SHOWN} more</p>")
        parts += [_figure(picture) for picture in section.pictures]
        if section.code:
            parts.append(f"<pre>{html.escape(section.code)}</pre>")
    return "\n".join(parts) + "</html>\n"


def _figure(picture: Picture) -> str:
    content = picture.image if isinstance(picture.image, bytes) else png_bytes(picture.image)
    kind = "gif" if content.startswith(b"GIF8") else "png"
    caption = html.escape(picture.caption)
    encoded = base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/{kind};base64,{encoded}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )
