"""prepare_dataset.py: from each layout to a data set that a stage can read, and nothing that identifies a person."""

import csv
import gzip
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

import trees
from conftest import run_example
from diffusers_med3d.data import VolumeDataset, load_split
from diffusers_med3d.data.grid import choose_grid
from diffusers_med3d.data.layouts import Scan
from diffusers_med3d.data.settings import read_settings
from diffusers_med3d.data.writing import people_and_names, session_label

pytestmark = pytest.mark.slow


def prepare(monkeypatch, layout: str, source: Path, output: Path, *flags: object) -> list[dict[str, str]]:
    """Run the script; returns the rows of metadata.csv."""
    run_example(
        monkeypatch,
        "prepare_dataset.py",
        *("--layout", layout, "--input", source, "--output", output, "--num_proc", 1),
        *flags,
    )
    with (output / "metadata.csv").open() as file:
        return list(csv.DictReader(file))


def files_below(folder: Path) -> dict[str, bytes]:
    """Contents of all files, unpacked."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found[path.relative_to(folder).as_posix()] = gzip.decompress(content) if path.suffix == ".gz" else content
    return found


@pytest.mark.parametrize(
    ("layout", "flags", "label", "classes", "channels"),
    [
        ("brats2019", ["--modalities", "t1", "t2"], "grade", ["HGG", "LGG"], ["t1", "t2"]),
        ("oasis1", [], "diagnosis", ["CN", "AD"], ["T1"]),
        ("niftifolder", ["--label_column", "group"], "group", ["a", "b"], ["image"]),
    ],
)
def test_a_prepared_data_set_is_read_by_name_of_its_folder_alone(
    tmp_path, monkeypatch, layout, flags, label, classes, channels
):
    trees_by_layout = {"brats2019": trees.brats, "oasis1": trees.oasis1, "niftifolder": trees.niftifolder}
    source, output = trees_by_layout[layout](tmp_path / "in"), tmp_path / "out"
    rows = prepare(monkeypatch, layout, source, output, *flags)
    settings = read_settings(output)
    assert (settings.label_column, settings.class_names, settings.channel_names) == (label, classes, channels)
    assert settings.orientation == "RAS" and all(side % 16 == 0 for side in settings.volume_shape)
    split = load_split(output / "split.json")
    people = {row["participant_id"] for row in rows}
    assert {name for part in ("train", "validation", "test") for name in split[part]} == people
    label_of = {row["participant_id"]: row[label] for row in rows}
    for part in ("test", "validation"):
        counts = [sum(label_of[name] == one for name in split[part]) for one in classes]
        assert counts[0] == counts[1] > 0
    volumes = VolumeDataset(output, split["validation"])
    assert tuple(volumes[0]["volume"].shape) == (len(channels), *settings.volume_shape)
    assert volumes[0]["class_label"] == classes.index(label_of[volumes[0]["subject"]])
    bright = np.argwhere(volumes[0]["volume"][0].numpy() > 0.99).mean(0)
    assert (bright > (np.array(settings.volume_shape) - 1) / 2).all()  # right, front, top
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page and f"{len(rows)} scans of {len(people)} people" in page
    assert (output / "montage.png").read_bytes()[:4] == b"\x89PNG" and not (output / ".progress").exists()


@pytest.mark.slow
def test_ixi_ages_become_three_classes(tmp_path, monkeypatch):
    rows = prepare(monkeypatch, "ixi", trees.ixi(tmp_path / "in", people=12), tmp_path / "out")
    assert len(rows) == 12 and set(rows[0]) == {"file_name", "participant_id", "age", "sex", "site"}
    settings = read_settings(tmp_path / "out")
    assert settings.class_names == ["young", "middle", "old"] and settings.class_edges == [35.0, 60.0]


@pytest.mark.slow
def test_all_scans_of_a_person_are_in_one_part_and_named_after_session_and_run(tmp_path, monkeypatch):
    rows = prepare(
        monkeypatch, "bids", trees.bids(tmp_path / "in", people=12), tmp_path / "out", "--label_column", "group"
    )
    files = [row["file_name"] for row in rows if row["participant_id"] in ("sub-01", "sub-02")]
    assert files == [
        "images/sub-01_ses-1.nii.gz",  # 20050312 and 20061104 are dates
        "images/sub-01_ses-2.nii.gz",
        "images/sub-02_run-1.nii.gz",
        "images/sub-02_run-2.nii.gz",
        "images/sub-02_run-3.nii.gz",
    ]
    assert [row["session"] for row in rows][:3] == ["1", "2", ""]


@pytest.mark.slow
def test_nothing_that_identifies_a_dicom_patient_reaches_an_output(tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "QUAGMIRE_JANE", tmp_path / "out"
    table = [["participant_id", "finding", "born"]]
    for number in range(10):
        patient = f"MRN-77881{number}"
        trees.dicom_series(source / f"quagmire^jane{number}" / trees.SCANNED, patient, trees.anatomy(number))
        table.append([patient, ("clear", "tumour")[number % 2], trees.BIRTH])
    trees.dicom_series(source / "gap", "MRN-778819", trees.anatomy(30), study=2, drop=(5,))
    trees.dicom_series(source / "broken", "MRN-778820", trees.anatomy(31))
    for path in (source / "broken").iterdir():
        path.write_bytes(path.read_bytes()[:-400])  # pixel data too short: found when voxels are read
    trees.write_csv(tmp_path / "labels.csv", table)
    flags = ["--metadata", tmp_path / "labels.csv", "--label_column", "finding", "--keep_unlabelled"]
    rows = prepare(monkeypatch, "dicom", source, output, *flags)
    assert len(rows) == 10 and rows[0]["participant_id"] == "sub-0001" and rows[1]["finding"] == "tumour"
    report = (output / "report.md").read_text()
    assert "a gap: slices 5 and 6" in report and "its voxels cannot be read" in report
    secrets = ["quagmire", "MRN-7", "77881", trees.BIRTH, trees.SCANNED[:-2], "2005-11", "Elsewhere", "ACC4711"]
    secrets += ["1.2.826.0.1", "mprage", str(tmp_path), str(source.resolve()), "/root", "093011"]
    contents = files_below(output)
    assert len(contents) == 10 + len(["metadata.csv", "dataset.json", "split.json", "report.md", "report.html", "png"])
    for name, content in contents.items():
        for secret in secrets:
            assert secret.lower() not in name.lower()
            assert secret.lower().encode() not in content.lower(), (name, secret)


def test_headers_sidecars_other_columns_and_folders_reach_no_output(tmp_path, monkeypatch):
    source, output = trees.niftifolder(tmp_path / "in" / "smith"), tmp_path / "out"
    planted = {
        "descrip": b"John Smith 1957",
        "db_name": b"JohnSmith",
        "aux_file": b"/mnt/smith/a",
        "intent_name": b"smith",
    }
    for number in range(10):
        path = source / "images" / f"scan{number}.nii.gz"
        trees.save(path, trees.anatomy(number), **planted)
        image = nibabel.load(path)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"smith 1957-03-12"))
        nibabel.save(image, path)
        path.with_suffix("").with_suffix(".json").write_text('{"PatientName": "Smith"}')
    rows = [line.split(",") for line in (source / "metadata.csv").read_text().splitlines()]
    rows = [[*rows[0], "date_of_birth"], *([*row, "1957-03-12"] for row in rows[1:])]
    trees.write_csv(source / "metadata.csv", rows)
    (source / "images" / "scan3.nii.gz").write_bytes(b"no image")
    prepare(monkeypatch, "niftifolder", source, output, "--label_column", "group")
    for name, content in files_below(output).items():
        for secret in ("smith", "1957", str(tmp_path).lower()):
            assert secret.encode() not in content.lower() and secret not in name.lower(), (name, secret)
    header = nibabel.load(output / "images" / "sub-p00.nii.gz").header
    assert not header.extensions and all(not header[name].item() for name in planted)


@pytest.mark.slow
def test_damaged_scans_are_named_with_the_reason_and_the_others_prepared(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in", people=14)
    images = source / "images"
    whole = (images / "scan0.nii.gz").read_bytes()
    (images / "scan0.nii.gz").write_bytes(whole[: len(whole) // 2])
    trees.save(images / "scan1.nii.gz", np.zeros(trees.SHAPE, np.int16))
    trees.save(images / "scan2.nii.gz", np.full(trees.SHAPE, np.nan, np.float32))
    trees.save(images / "scan3.nii.gz", np.stack([trees.anatomy(3)] * 2, axis=-1))
    rows = prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    assert [row["participant_id"] for row in rows] == [f"p{number:02d}" for number in range(4, 14)]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir())[0] == "sub-p04.nii.gz"
    report = (tmp_path / "out" / "report.md").read_text()
    for pattern in (r"scan0.nii.gz \|.*cannot be read", r"scan1.nii.gz \|.*every voxel is 0", r"scan2.nii.gz \|.*NaN"):
        assert re.search(pattern, report), pattern
    assert "images/scan3.nii.gz | 2 channel(s), the others have 1" in report


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    from diffusers_med3d.data import preparation

    source = trees.niftifolder(tmp_path / "in")
    flags = ["--label_column", "group"]
    prepare(monkeypatch, "niftifolder", source, tmp_path / "whole", *flags)
    write, calls = preparation.write_scan, []

    def killed_at_the_fifth(scan, *rest):
        calls.append(scan.participant_id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return write(scan, *rest)

    monkeypatch.setattr(preparation, "write_scan", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "dataset.json").exists()
    calls.clear()
    monkeypatch.setattr(preparation, "write_scan", lambda scan, *rest: (calls.append(scan), write(scan, *rest))[1])
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags)
    assert [scan.participant_id for scan in calls] == [f"p{number:02d}" for number in range(4, 10)]
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


@pytest.mark.slow
def test_an_interrupted_run_refuses_an_input_that_changed_and_a_finished_one_is_not_overwritten(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in")
    copy = trees.anatomy(0)
    trees.save(source / "images" / "scan1.nii.gz", copy)  # refused, so the run stops half-way
    with pytest.raises(SystemExit, match="same scan"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    trees.save(source / "images" / "scan1.nii.gz", trees.anatomy(77))
    with pytest.raises(SystemExit, match="changed since"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    prepare(monkeypatch, "niftifolder", source, tmp_path / "new", "--label_column", "group")
    with pytest.raises(SystemExit, match="holds a prepared data set already"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "new", "--label_column", "group")


@pytest.mark.slow
def test_the_same_scan_under_two_names_is_refused_or_counts_as_one_person(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in", people=12)
    trees.save(source / "images" / "scan7.nii.gz", (3 * trees.anatomy(2))[::-1], axes="LPS")  # mirrored, scaled, turned
    with pytest.raises(SystemExit, match=r"p02 \(images/scan2.nii.gz\) and p07 \(images/scan7.nii.gz\).*--allow_dup"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group", "--allow_duplicates")
    split = load_split(tmp_path / "out" / "split.json")
    groups = [split["test"], split["validation"], split["folds"]["a"], split["folds"]["b"]]
    assert [("p02" in group, "p07" in group) for group in groups].count((True, True)) == 1
    assert "| sub-p02.nii.gz | sub-p07.nii.gz |" in (tmp_path / "out" / "report.md").read_text()


def test_dry_run_says_what_would_be_prepared_and_writes_nothing(tmp_path, monkeypatch, capsys):
    source, output = trees.oasis1(tmp_path / "in", people=8), tmp_path / "out"
    flags = ("--layout", "oasis1", "--input", source, "--output", output, "--dry_run")
    run_example(monkeypatch, "prepare_dataset.py", *flags)
    said = capsys.readouterr().out
    assert "8 scans of 8 people" in said and "CN: 4" in said and "1 x no rating (CDR) in the table" in said
    assert not output.exists()


def test_without_labels_the_data_set_is_unconditional(tmp_path, monkeypatch):
    rows = prepare(monkeypatch, "niftifolder", trees.niftifolder(tmp_path / "in"), tmp_path / "out")
    assert set(rows[0]) == {"file_name", "participant_id"}
    assert read_settings(tmp_path / "out").class_names == []
    assert len(load_split(tmp_path / "out" / "split.json")["test"]) == 2


@pytest.mark.slow
def test_people_without_a_label_are_kept_only_when_asked_for_and_only_train(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in", people=12)
    rows = [line.split(",") for line in (source / "metadata.csv").read_text().splitlines()]
    trees.write_csv(source / "metadata.csv", [*rows[:11], [*rows[11][:2], ""], [*rows[12][:2], "n/a"]])
    flags = ["--label_column", "group"]
    assert len(prepare(monkeypatch, "niftifolder", source, tmp_path / "ten", *flags)) == 10
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags, "--keep_unlabelled", "--test_share", 0.4)
    split = load_split(tmp_path / "out" / "split.json")
    assert {"p10", "p11"} <= set(split["train"]) and len(split["test"]) == 4


@pytest.mark.slow
def test_numbers_need_edges_and_too_few_people_are_refused(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in", people=12)
    rows = [line.split(",") for line in (source / "metadata.csv").read_text().splitlines()]
    trees.write_csv(source / "metadata.csv", [rows[0], *([*row[:2], 20 + 2.5 * i] for i, row in enumerate(rows[1:]))])
    with pytest.raises(SystemExit, match="numbers from 20 to 47.5; say --class_names and --class_edges"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    edges = ["--label_column", "group", "--class_names", "young", "old", "--class_edges"]
    with pytest.raises(SystemExit, match=r"2 people in the smallest class \(young\); at least 4 are needed"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *edges, 23)
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *edges, 35)
    assert read_settings(tmp_path / "out").class_edges == [35.0]


def test_a_split_that_is_there_is_kept(tmp_path, monkeypatch):
    source = trees.niftifolder(tmp_path / "in")
    split = {"train": ["p02", "p03"], "validation": ["p04"], "test": ["p05"], "folds": {"a": ["p02"], "b": ["p03"]}}
    (tmp_path / "split.json").write_text(json.dumps(split))
    prepare(
        monkeypatch,
        "niftifolder",
        source,
        tmp_path / "out",
        "--label_column",
        "group",
        "--split_file",
        tmp_path / "split.json",
    )
    assert {name: load_split(tmp_path / "out" / "split.json")[name] for name in split} == split


@pytest.mark.slow
def test_a_split_that_parts_two_names_of_one_scan_is_refused_and_people_in_no_part_are_named(
    tmp_path, monkeypatch, capsys
):
    source = trees.niftifolder(tmp_path / "in")
    trees.save(source / "images" / "scan3.nii.gz", trees.anatomy(5))
    split = {"train": ["p02", "p03"], "validation": ["p04"], "test": ["p05"], "folds": {"a": ["p02"], "b": ["p03"]}}
    (tmp_path / "split.json").write_text(json.dumps(split))
    flags = ["--label_column", "group", "--allow_duplicates", "--split_file", tmp_path / "split.json"]
    with pytest.raises(SystemExit, match=r"p03 \(train\) and p05 \(test\) of .*split.json have the same scan"):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags)
    (tmp_path / "split.json").write_text(json.dumps(split | {"test": ["p06"]}))
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags)
    for text in (capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()):
        assert "6 people are in no part of the split and are not used: p00, p01, p05, p07, p08 and 1 more." in text


@pytest.mark.slow
def test_odd_voxel_sizes_are_named_and_the_grid_that_is_chosen_is_said(tmp_path, monkeypatch, capsys):
    source = trees.niftifolder(tmp_path / "in")
    trees.save(source / "images" / "scan4.nii.gz", trees.anatomy(4)[:, :, ::2], step=8.0)
    image = nibabel.load(source / "images" / "scan4.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1, 1, 2, 1.0])),
        source / "images" / "scan4.nii.gz",
    )
    prepare(monkeypatch, "niftifolder", source, tmp_path / "out", "--label_column", "group")
    settings = read_settings(tmp_path / "out")
    odd = "1 of 10 scans have voxels of another size than the commonest, 8 x 8 x 8 mm: sub-p04.nii.gz (8 x 8 x 16 mm)."
    chosen = f"Grid {' x '.join(map(str, settings.volume_shape))} at 8 x 8 x 8 mm: the finest of at most"
    for text in (capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()):
        assert f"Warning: {odd}" in text and chosen in text


# --- what the table alone shows ---


def with_ages(folder: Path, *ages: object) -> Path:
    """A niftifolder with the ages of its people; its files hold no scans, so reading any of them would fail."""
    (folder / "images").mkdir(parents=True)
    for number in range(len(ages)):
        (folder / "images" / f"scan{number}.nii").touch()
    rows = [[f"images/scan{number}.nii", f"p{number}", age] for number, age in enumerate(ages)]
    trees.write_csv(folder / "metadata.csv", [["file_name", "participant_id", "age"], *rows])
    return folder


CLASSES_OF_AGES = ("--label_column", "age", "--class_names", "young", "old", "--class_edges", 50)
GOOD_AGES = (20, 30, 40, 45, 60, 70, 80, 90)


@pytest.mark.parametrize(
    ("age", "flags", "reason"),
    [
        ("24,76", CLASSES_OF_AGES, r"'24,76' is no number \(a decimal comma\?\)"),
        ("24,76", CLASSES_OF_AGES[:2], r"'24,76' is no number \(a decimal comma\?\)"),
        (-5, CLASSES_OF_AGES, "'-5' is nobody's age"),
        (430, (*CLASSES_OF_AGES, "--dry_run"), "'430' is nobody's age"),
    ],
)
def test_a_bad_label_is_refused_with_file_and_row_before_a_scan_is_read(tmp_path, monkeypatch, age, flags, reason):
    source = with_ages(tmp_path / "in", *GOOD_AGES, 21, 22, 23, age)
    where = r"row 13 of metadata.csv \(images/scan11.nii\), column 'age': "
    with pytest.raises(SystemExit, match=where + reason):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_too_few_people_of_a_class_are_refused_before_a_scan_is_read(tmp_path, monkeypatch):
    source = with_ages(tmp_path / "in", *GOOD_AGES[:7], "")
    few_old = r"3 people in the smallest class \(old\); .*1 of 8 files were left out: images/scan7.nii \(no age"
    with pytest.raises(SystemExit, match=few_old):
        prepare(monkeypatch, "niftifolder", source, tmp_path / "out", *CLASSES_OF_AGES)
    assert not (tmp_path / "out").exists()


def test_a_refusal_after_reading_names_what_was_left_out(tmp_path, monkeypatch):
    source, output = trees.niftifolder(tmp_path / "in", people=8), tmp_path / "out"
    for number in (0, 2):
        (source / "images" / f"scan{number}.nii.gz").write_bytes(b"no image")
    said = (
        r"2 people in the smallest class \(a\); .* 2 of 8 files were left out: images/scan0.nii.gz \(.*cannot be read.*"
        r"\); images/scan2.nii.gz \(.*\)\. All of them: .*report.html"
    )
    with pytest.raises(SystemExit, match=said):
        prepare(monkeypatch, "niftifolder", source, output, "--label_column", "group")
    report = (output / "report.md").read_text()
    assert report.startswith("# Refused") and "| images/scan2.nii.gz |" in report and str(tmp_path) not in report
    assert (output / "report.html").is_file() and not (output / "dataset.json").exists()


# --- names and grids ---


def test_ids_that_look_alike_as_file_names_stay_apart():
    scans = [Scan((), name) for name in ("01", "0 1", "0-1", "A", "a", "../x", "sub-7")]
    people, names = people_and_names(scans)
    assert people == [scan.participant_id for scan in scans] and len({name.lower() for name in names}) == len(scans)
    assert all(re.fullmatch(r"images/sub-[A-Za-z0-9-]+\.nii\.gz", name) for name in names)
    assert people_and_names(scans, renumber=True)[0][:2] == ["sub-0001", "sub-0002"]


def test_sessions_that_may_be_dates_are_counted():
    assert session_label("20051102", ["19990101", "20051102"]) == "2"
    assert session_label("M12", ["M00", "M12"]) == "M12"


@pytest.mark.parametrize(
    ("spacing", "expected_shape", "expected_spacing"),
    [
        ((1.0, 1.0, 1.0), [64, 80, 64], [2.5, 2.5, 2.5]),
        ((2.0, 2.0, 2.0), [64, 80, 64], [2.5, 2.5, 2.5]),
        ((1.0, 1.0, 6.0), [96, 112, 32], [1.75, 1.75, 10.5]),
    ],
)
def test_a_grid_is_chosen_that_holds_the_largest_scan(spacing, expected_shape, expected_spacing):
    shape, steps, sentence = choose_grid([(144, 190, 152), (120, 160, 130)], [spacing] * 2)
    assert (shape, steps) == (expected_shape, expected_spacing)
    assert (np.array(shape) * steps >= (144, 190, 152)).all() and "144 x 190 x 152 mm" in sentence


def test_a_grid_that_cuts_the_largest_scan_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match="foreground is 144 x 190 x 152 mm, the grid .* holds 128 x 128 x 128 mm"):
        choose_grid([(144, 190, 152)], [(2, 2, 2)], (2.0, 2.0, 2.0), (64, 64, 64))
    shape, steps, _ = choose_grid([(144, 190, 152)], [(2, 2, 2)], None, (64, 64, 64))
    assert shape == [64, 64, 64] and steps == [3.1, 3.1, 3.1]


def test_a_given_grid_is_not_measured_by_boxes_that_registration_changes():
    grid = ((3.0, 3.0, 3.0), (48, 64, 48))  # 144 x 192 x 144 mm: brain-t1's, for a largest box of 152 mm
    shape, steps, sentence = choose_grid([(144, 190, 152)], [(2, 2, 2)], *grid, registered=True)
    assert (shape, steps) == ([48, 64, 48], [3.0, 3.0, 3.0]) and "before registration" in sentence
    with pytest.raises(ValueError, match="holds 144 x 192 x 144 mm"):
        choose_grid([(144, 190, 152)], [(2, 2, 2)], *grid)
