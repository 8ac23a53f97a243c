"""What the folders of the package import of each other, and what their ``__init__.py`` hold."""

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "diffusers_med3d"
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def test_imports_between_folders_run_one_way(capsys, monkeypatch):
    """The contract stands in pyproject.toml, under ``tool.importlinter``."""
    monkeypatch.chdir(REPOSITORY)
    failed = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_init_says_in_one_sentence_what_its_folder_is_for_and_exports_what_it_imports(folder: Path):
    tree = ast.parse((folder / "__init__.py").read_text())
    sentence = ast.get_docstring(tree)
    assert sentence.endswith(".") and sentence.count(". ") == 0, sentence
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    (exported,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert sorted(exported) == sorted(imported)


def test_every_folder_has_tests_of_its_own():
    assert FOLDERS
    for folder in FOLDERS:
        assert list((REPOSITORY / "tests" / folder.name).glob("test_*.py")), folder.name
