"""Results on disk are whole or absent."""

import json

import pytest

from diffusers_med3d.files import once, whole_file, write_json, write_whole


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


def test_what_was_made_once_is_not_made_again(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": len(calls)}

    assert once(tmp_path / "a.json", make) == once(tmp_path / "a.json", make) == {"value": 1}
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1} and calls == [1]
