"""Notebooks of docs/tutorials: pages of the documentation, and the pictures on these pages.

MkDocs calls `on_files` (mkdocs.yml, `hooks`): every notebook becomes a page of its text, its code and the committed
pictures, without being run. So the documentation builds in seconds and loads nothing from elsewhere.

    python docs/hooks/notebooks.py          # runs all notebooks and makes the pictures anew (extra tutorials)
    python docs/hooks/notebooks.py --strip  # removes outputs from the notebooks

A cell whose metadata say `"picture": {"file": "name.png", "caption": "..."}` shows the picture of that name, which is
its first one when it runs.
"""

import base64
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parents[1] / "tutorials"
PICTURES = Path(__file__).parents[1] / "images" / "tutorials"
PICTURE_WIDTH = 900  # pixels


def notebooks() -> list[Path]:
    """The notebooks in the order in which they are read and run."""
    return sorted(TUTORIALS.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    """A notebook as JSON."""
    return json.loads(path.read_text())


def page(path: Path) -> str:
    """The Markdown page of a notebook: a note, its texts, its code and its pictures."""
    title, *rest = read(path)["cells"]
    parts = [
        "".join(title["source"]),
        '!!! note "A notebook"\n'
        f"    This page is the notebook [{path.name}]({path.name}). The build of this site does not run it: the "
        "pictures are from one earlier run, and yours will look a little different. "
        "[Tutorials](index.md) says how to run it.",
    ]
    for cell in rest:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = to_pages(source)
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        if picture := cell["metadata"].get("picture"):
            parts.append(f"![{picture['caption']}](../images/tutorials/{picture['file']})\n\n*{picture['caption']}*")
    return "\n\n".join(parts) + "\n"


def to_pages(markdown: str) -> str:
    """Markdown whose links to notebooks lead to their pages."""
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", markdown)


def on_page_markdown(markdown, page, **kwargs):
    """Let the links of the overview lead to pages; in the repository they lead to notebooks."""
    return to_pages(markdown) if page.file.src_uri == "tutorials/index.md" else markdown


def on_files(files, config):
    """Add a page per notebook; the notebook itself stays a file that can be downloaded."""
    from mkdocs.structure.files import File

    for path in notebooks():
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page(path)))
    return files


def strip(path: Path) -> None:
    """Remove outputs and counts from a notebook."""
    notebook = read(path)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "picture"}
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def run(path: Path, folder: Path, timeout: int = 1800) -> dict[str, Any]:
    """The notebook with the outputs of a run in a folder.

    Args:
        timeout: seconds that one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails, with its code and its error.
    """
    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()


def write_pictures(executed: dict[str, Any]) -> list[Path]:
    """Write the pictures that the cells of a notebook that was run announce."""
    from PIL import Image

    written = []
    for cell in executed["cells"]:
        if picture := cell["metadata"].get("picture"):
            data = [output.get("data", {}) for output in cell["outputs"]]
            (png, *_) = [one["image/png"] for one in data if "image/png" in one]
            image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            image.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH))
            PICTURES.mkdir(parents=True, exist_ok=True)
            image.quantize(64).save(PICTURES / picture["file"], optimize=True)
            written.append(PICTURES / picture["file"])
    return written


def main() -> None:
    """Strip the notebooks, or run them and write their pictures."""
    if sys.argv[1:] == ["--strip"]:
        for path in notebooks():
            strip(path)
        return
    with tempfile.TemporaryDirectory() as folder:  # one for all: tutorial 3 reads what tutorial 2 wrote
        for path in notebooks():
            print(path.name, *(f"-> {picture.name}" for picture in write_pictures(run(path, Path(folder)))))


if __name__ == "__main__":
    main()
