"""The notebooks of docs/tutorials: every one runs to its end, none holds outputs, all are pages of the site."""

import json
import re
import runpy
from pathlib import Path

import pytest

from conftest import REPOSITORY

hook = runpy.run_path(str(REPOSITORY / "docs" / "hooks" / "notebooks.py"))
NOTEBOOKS = hook["notebooks"]()


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all notebooks run: the third reads what the second wrote."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.mark.slow
@pytest.mark.long
def test_the_notebooks_run_to_their_end(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for path in NOTEBOOKS:
        executed = hook["run"](path, folder)
        for cell in executed["cells"]:
            if "picture" in cell["metadata"]:
                assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), cell["source"]


def test_there_are_four_notebooks():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_holds_no_outputs_and_no_absolute_paths(path, tmp_path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "python docs/hooks/notebooks.py --strip"
    assert not re.search(r"/(work|root|home|tmp|Users)/", path.read_text())
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    hook["strip"](copy)
    assert copy.read_text() == path.read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_warns_once_and_has_a_heading_for_every_step(path):
    texts = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown"]
    assert len(re.findall("clinical use", "\n".join(texts))) == 1
    assert sum(text.startswith("# ") for text in texts) == 1 and texts[0].startswith("# ")
    assert sum(text.startswith("## ") for text in texts) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_and_pictures_of_a_notebook_exist(path):
    text = hook["page"](path)
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert any(target.endswith(".png") for target in found)
    for target in found:
        file = path.parent / target.partition("#")[0]
        assert file.exists() or file.with_suffix(".ipynb").exists(), target


def test_code_is_formatted_for_the_width_of_a_page():
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell["cell_type"] == "code":
                assert max(map(len, "".join(cell["source"]).splitlines())) <= 120
