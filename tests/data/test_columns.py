"""Tables as people write them: ids are text, missing is missing, and what cannot be read is named in one line."""

import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Nifti, Value

from diffusers_med3d.data import (
    DataArguments,
    VolumeDataset,
    class_of,
    classes_of,
    load_split,
    make_split,
    read_scans,
    save_split,
)
from diffusers_med3d.data.labels import is_missing, number_of

HEADER = ("file_name", "participant_id", "age")


def files(folder: Path, names: list[str]) -> Path:
    """Empty files: these tests read no voxels."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def folder_of(folder: Path, rows: list[tuple], header=HEADER, separator=",", encoding="utf-8") -> Path:
    files(folder, [row[0].replace("\\", "/") for row in rows if not Path(row[0]).is_absolute()])
    lines = [separator.join(map(str, row)) for row in (header, *rows)]
    (folder / "metadata.csv").write_bytes("\n".join(lines).encode(encoding))
    return folder


def column(folder: Path, name: str) -> list:
    return read_scans(folder)[name][:]


# --- ids ---


@pytest.mark.parametrize(
    "ids", [["001", "002"], ["01", "1"], ["1E5", "2E5"], ["1.10", "1.1"], ["True", "nan"], ["-", "٣"]]
)
def test_ids_are_text_exactly_as_written(tmp_path, ids):
    folder_of(tmp_path, [(f"{i}.nii", name, 30) for i, name in enumerate(ids)])
    assert column(tmp_path, "participant_id") == ids


def test_ids_of_the_split_are_found_again(tmp_path):
    ids = [f"{i:03d}" for i in range(1, 7)]
    split = make_split(dict.fromkeys(ids, 0), [1], [1])
    save_split(split, tmp_path / "split.json")
    assert sorted(sum((load_split(tmp_path / "split.json")[p] for p in ("train", "validation", "test")), [])) == ids


# --- missing values and words that look like them ---


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), torch.tensor(float("nan")), pandas.NA, pandas.NaT, "",
     "  ", "NaN", "nan", "NA", "n/a", "None", "null", "<NA>", "#N/A"],
)  # fmt: skip
def test_a_missing_value_is_the_null_class(value):
    assert is_missing(value)
    assert class_of(value, ["young", "old"], [50.0]) == 2
    assert class_of(value, ["a", "b"], []) == 2


@pytest.mark.parametrize("name", ["None", "NA", "null", "nan", "n/a"])
def test_a_word_for_missing_is_a_class_where_it_is_listed(tmp_path, name):
    folder_of(tmp_path, [("a.nii", "p", name), ("b.nii", "q", "glioma"), ("c.nii", "r", "")])
    rows = read_scans(tmp_path)
    assert classes_of(rows, "age", [name, "glioma"], []) == [0, 1, 2]
    assert class_of(None, [name, "glioma"], []) == 2


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas", "arrow"])
def test_a_missing_age_is_missing_in_every_format_of_a_dataset(form):
    features = Features({"scan": Nifti(), "participant_id": Value("string"), "age": Value("float64")})
    columns = {
        "scan": ["a.nii", "b.nii", "c.nii"],
        "participant_id": ["p", "q", "r"],
        "age": [20.0, None, float("nan")],
    }
    rows = read_scans(Dataset.from_dict(columns, features=features).with_format(form))
    assert classes_of(rows, "age", ["young", "old"], [50.0]) == [0, 2, 2]
    assert rows["participant_id"][:] == ["p", "q", "r"]


def test_class_labels_of_a_dataset_are_their_names():
    features = Features({"scan": Nifti(), "grade": ClassLabel(names=["LGG", "HGG"])})
    rows = read_scans(Dataset.from_dict({"scan": ["a.nii", "b.nii"], "grade": [1, None]}, features=features))
    assert classes_of(rows, "grade", ["HGG", "LGG"], []) == [0, 2]


# --- numbers ---


def test_an_age_string_of_dicom_and_a_capped_age_are_numbers():
    assert number_of("034Y") == 34
    assert number_of("018M") == 1.5
    with pytest.warns(UserWarning, match=r"'90\+' is read as 90"):
        assert number_of("90+") == 90
    assert [number_of(value) for value in ("22.5", 22.5, " 22.5 ", "-3")] == [22.5, 22.5, 22.5, -3]


@pytest.mark.parametrize(
    ("age", "message"),
    [
        ('"22,5"', r"'22,5' is no number \(a decimal comma\?\); wanted is one such as 22.5"),
        ("old", "'old' is no number; wanted"),
        ("inf", "'inf' is no number"),
        ("3O", "'3O' is no number"),
    ],
)
def test_a_label_that_is_no_number_is_refused_with_file_row_and_what_is_wanted(tmp_path, age, message):
    folder_of(tmp_path, [("a.nii", "p", 30), ("b.nii", "q", age)])
    with pytest.raises(ValueError, match=rf"row 2 of the metadata \(b.nii\), column 'age': {message}"):
        classes_of(read_scans(tmp_path), "age", ["young", "old"], [50.0])


def test_labels_of_rows_that_nobody_asked_for_are_not_looked_at(tmp_path):
    folder_of(tmp_path, [("a.nii", "p", "LGG"), ("b.nii", "q", "unclear")])
    assert classes_of(read_scans(tmp_path), "age", ["HGG", "LGG"], [], used=[0]) == [1, 2]


def test_a_label_that_is_no_class_is_refused_with_file_and_row(tmp_path):
    folder_of(tmp_path, [("a.nii", "p", "LGG"), ("b.nii", "q", "lgg")])
    with pytest.raises(ValueError, match=r"row 2 of the metadata \(b.nii\).*'lgg' is none of the classes"):
        classes_of(read_scans(tmp_path), "age", ["LGG", "HGG"], [])


# --- the file ---


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_are_read(tmp_path, separator, encoding):
    folder_of(tmp_path, [("a.nii", "Müller", "30")], separator=separator, encoding=encoding)
    assert column(tmp_path, "participant_id") == ["Müller"]


def test_latin_1_is_read_with_a_warning(tmp_path):
    folder_of(tmp_path, [("a.nii", "Müller", "30")], encoding="latin-1")
    with pytest.warns(UserWarning, match="metadata.csv is not UTF-8"):
        assert column(tmp_path, "participant_id") == ["Müller"]


def test_other_bytes_are_refused_in_one_line(tmp_path):
    folder_of(tmp_path, [("a.nii", "p", "30")], encoding="utf-16-le")
    with pytest.raises(ValueError, match="metadata.csv holds zero bytes, so it is no text in UTF-8"):
        read_scans(tmp_path)


def test_spaces_after_commas_and_backslashes_mean_nothing(tmp_path):
    folder_of(tmp_path, [("images\\a.nii", ' "p, the first"', " 30")], header=("file_name", " participant_id", " age "))
    rows = read_scans(tmp_path)
    assert rows["participant_id"][:] == ["p, the first"] and rows["age"][:] == ["30"]


def test_absolute_paths_are_read_where_they_are_there_and_named_where_not(tmp_path):
    files(tmp_path, ["set/a.nii", "elsewhere/b.nii"])
    folder_of(tmp_path / "set", [(str(tmp_path / "elsewhere" / "b.nii"), "p", 30)])
    with pytest.warns(UserWarning, match=r"1 NIfTI file\(s\) in .* have no row .*a.nii"):
        assert len(read_scans(tmp_path / "set")) == 1
    for path in ("/data/of/another/machine/b.nii", "C:\\\\scans\\\\b.nii"):
        (tmp_path / "set" / "metadata.csv").write_text(f"file_name,participant_id\n{path},p\n")
        with pytest.raises(
            ValueError, match=r"1 row\(s\) name a file that is not there.*absolute path of another mach"
        ):
            read_scans(tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,participant_id\na.nii,p\nabsent.nii,q\n", r"1 row\(s\) name a file that is not there.*absent.nii"),
        ("file_name,participant_id,age\na.nii,p,22,5\n", "line 2 has 4 values, the first line names 3 columns"),
        ("scan,participant_id\na.nii,p\n", r"needs one column file_name.*\['scan', 'participant_id'\]"),
        ("file_name,age,age\na.nii,1,2\n", "names a column twice"),
        ("file_name,age\na.nii,1\na.nii,2\n", "two rows of the metadata name the same file"),
        ("file_name,age\nnotes.txt,1\n", "'notes.txt', which is no NIfTI file"),
        ("file_name,age\n", "has no rows"),
        ("", "has no rows"),
        ("file_name,age\n,1\n", r"1 row\(s\) have no file_name"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(tmp_path, text, message):
    files(tmp_path, ["a.nii", "notes.txt"])
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        read_scans(tmp_path)
    assert "\n" not in str(refused.value)


def test_tables_of_several_folders_are_read_together(tmp_path):
    folder_of(tmp_path / "train", [("a.nii", "p", "30")])
    folder_of(tmp_path / "test", [("a.nii", "q", "x")], header=("file_name", "participant_id", "site"))
    rows = read_scans(tmp_path)
    assert rows["participant_id"][:] == ["q", "p"]
    assert rows["age"][:] == [None, "30"]


def test_lines_of_json_keep_their_types(tmp_path):
    files(tmp_path, ["a.nii"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.nii", "participant_id": "01", "age": 30.5}))
    assert read_scans(tmp_path)["age"][:] == [30.5]


def test_participants_of_bids_are_read_where_they_say_enough(tmp_path):
    files(tmp_path, [f"rawdata/sub-{i}/ses-{s}/anat/sub-{i}_ses-{s}_T1w.nii.gz" for i in "12" for s in ("test", "dev")])
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-1\t30\nsub-2\tn/a\n")
    rows = read_scans(tmp_path / "rawdata")
    assert rows["participant_id"][:] == ["sub-1", "sub-1", "sub-2", "sub-2"]
    assert classes_of(rows, "age", ["young", "old"], [50.0]) == [0, 0, 2, 2]
    files(tmp_path, ["rawdata/sub-1/anat/sub-1_T2w.nii.gz"])
    with pytest.raises(ValueError, match=r"does not say which files are the scans.*--layout bids"):
        read_scans(tmp_path / "rawdata")


def test_no_table_at_all_is_said_in_one_line(tmp_path):
    files(tmp_path, ["a.nii"])
    with pytest.raises(FileNotFoundError, match=r"no metadata.csv in .* and no BIDS participants.tsv"):
        read_scans(tmp_path)


def test_a_stream_or_several_splits_are_refused():
    rows = Dataset.from_dict({"scan": ["a.nii"]}, features=Features({"scan": Nifti()}))
    with pytest.raises(TypeError, match="IterableDataset .*without streaming"):
        read_scans(rows.to_iterable_dataset())
    with pytest.raises(TypeError, match=r"splits \['train'\]; pass one of them"):
        read_scans(DatasetDict(train=rows))


# --- no labels ---


def test_a_table_without_labels_makes_a_data_set_without_classes(tmp_path, brains_folder, capsys):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(Path(brains_folder) / "images")
    lines = (Path(brains_folder) / "metadata.csv").read_text().splitlines()
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(",".join(line.split(",")[:2]) for line in lines))
    args = DataArguments(str(tmp_path / "set"), "", volume_shape=[16] * 3, spacing=[12.0] * 3)
    assert (args.class_names, args.class_edges, args.label_column) == ([], [], None)
    args.say_defaults()
    assert "no classes (unconditional)" in capsys.readouterr().out
    dataset = VolumeDataset(tmp_path / "set", ["sub-01"], volume_shape=[16] * 3, spacing=[12.0] * 3)
    assert (dataset.class_names, dataset[0]["class_label"]) == ([], 0)
    with pytest.raises(ValueError, match=r"no column 'age' \(label_column\)"):
        VolumeDataset(tmp_path / "set", ["sub-01"], label_column="age")
