"""Results on disk are whole or absent."""

import json

import pytest

from diffusers_med3d.utils.files import once, whole_file, whole_folder, write_json, write_whole


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    path = tmp_path / "deep" / "result.txt"
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["result.txt"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "result.txt"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.txt"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "result"
    with pytest.raises(KeyError), whole_folder(folder) as written:
        written.mkdir()
        (written / "half.txt").write_text("half")
        raise KeyError
    assert list(folder.parent.iterdir()) == []
    with whole_folder(folder) as written:
        written.mkdir()
        (written / "a.txt").write_text("a")
        assert not folder.exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "deep",
        "deep/result",
        "deep/result/a.txt",
    ]
    # what is there is never overwritten
    with pytest.raises(OSError, match="not empty"), whole_folder(folder) as written:
        written.mkdir()
    assert (folder / "a.txt").read_text() == "a"


def test_what_was_made_once_is_not_made_again(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": len(calls)}

    assert once(tmp_path / "a.json", make) == once(tmp_path / "a.json", make) == {"value": 1}
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1} and calls == [1]
