"""diffusers_med3d.data: from files to volumes, and the split by subject."""

import gzip
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Nifti, Value
from scipy import ndimage
from transformers import HfArgumentParser

from conftest import REPOSITORY, run_example
from diffusers_med3d.data import (
    DataArguments,
    VolumeDataset,
    class_of,
    decode_nifti,
    load_split,
    make_split,
    read_scans,
    save_split,
    to_meta_tensor,
    volume_transform,
)

FIRST_SCAN = "images/sub-01_T1w.nii.gz"


def arguments(folder: str, split_file: str = "unused.json", **changes) -> DataArguments:
    settings = {"volume_shape": [32, 32, 32], "spacing": [6.0, 6.0, 6.0], **changes}
    return DataArguments(data_dir=str(folder), split_file=str(split_file), **settings)


def dataset_of(array: np.ndarray, affine: np.ndarray, path: Path) -> Dataset:
    """A `datasets.Dataset` of one scan, its NIfTI column not called nifti."""
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    columns = {"scan": [str(path)], "participant_id": ["sub-x"], "age": [40.0]}
    features = Features({"scan": Nifti(), "participant_id": Value("string"), "age": Value("float64")})
    return Dataset.from_dict(columns, features=features)


def spot(volume: np.ndarray) -> np.ndarray:
    """Voxel (x, y, z) at the centre of the bright spot of `synthetic_brain`; smoothed, lest texture wins."""
    return np.array(np.unravel_index(ndimage.uniform_filter(volume, 5).argmax(), volume.shape))


# --- volumes ---


@pytest.fixture(scope="module")
def volumes(brains_folder) -> VolumeDataset:
    return VolumeDataset(brains_folder, ["sub-04", "sub-03", "sub-02"], **arguments(brains_folder).reading())


def test_scans_stored_in_any_orientation_come_out_right_anterior_superior(volumes):
    # sub-02 is stored LAS and sub-03 with swapped axes; the bright spot is right of, before and above the centre.
    for item in volumes:
        volume = item["volume"]
        assert nibabel.aff2axcodes(np.asarray(volume.affine)) == ("R", "A", "S")
        assert (spot(volume.numpy()[0]) >= 18).all(), (item["subject"], spot(volume.numpy()[0]))


def test_the_affine_still_says_where_in_the_scanner_a_voxel_lies(volumes, brains_folder):
    for item in volumes:
        scan = nibabel.load(f"{brains_folder}/images/{item['subject']}_T1w.nii.gz")
        before = nibabel.affines.apply_affine(scan.affine, spot(scan.get_fdata()))
        after = nibabel.affines.apply_affine(item["volume"].affine, spot(item["volume"].numpy()[0]))
        assert np.abs(before - after).max() <= 6, (item["subject"], before, after)


def test_every_volume_has_the_size_and_spacing_asked_for(brains_folder):
    args = arguments(brains_folder, volume_shape=[16, 20, 24], spacing=[12.0, 10.0, 8.0])
    volume = VolumeDataset(brains_folder, ["sub-01"], **args.reading())[0]["volume"]
    assert volume.shape == (1, 16, 20, 24)
    assert np.diag(volume.affine).tolist() == pytest.approx([12, 10, 8, 1])


def test_a_ball_in_anisotropic_voxels_is_a_ball_again(tmp_path):
    steps = np.array([2.0, 4.0, 5.0])
    grid = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip((60, 30, 24), steps, strict=True)), indexing="ij"))
    ball = (np.linalg.norm(grid - 60, axis=0) < 45).astype(np.int16) * 500
    rows = dataset_of(ball, np.diag([*steps, 1]), tmp_path / "ball.nii.gz")
    volume = (
        VolumeDataset(rows, ["sub-x"], **arguments("unused", spacing=[3.0, 3.0, 3.0]).reading())[0]["volume"][0] > 0.5
    )
    extents = [int((volume.any(dim=[d for d in range(3) if d != axis])).sum()) for axis in range(3)]
    assert all(abs(extent - 30) <= 2 for extent in extents), extents  # 90 mm / 3 mm


def test_the_brain_is_cropped_to_its_foreground_and_centred_on_a_background_of_exactly_zero(tmp_path):
    array = np.zeros((60, 50, 40), dtype=np.int16)
    array[40:58, 4:20, 2:12] = 700  # far off centre
    rows, args = dataset_of(array, np.eye(4), tmp_path / "a.nii"), arguments("", spacing=[1] * 3)
    volume = VolumeDataset(rows, ["sub-x"], **args.reading())
    filled = np.argwhere(volume[0]["volume"].numpy()[0] > 0)
    assert (filled.max(0) - filled.min(0) + 1).tolist() == [18, 16, 10]
    assert np.abs((filled.max(0) + filled.min(0)) / 2 - 15.5).max() <= 1
    assert (volume.stack() == 0).float().mean() == pytest.approx(1 - 18 * 16 * 10 / 32**3)


def stripes(period_mm: float) -> np.ndarray:
    """64^3 voxels of 1 mm: a wave along x in a box of anatomy."""
    wave = np.zeros((64, 64, 64), dtype=np.float32)
    wave[5:59, 5:59, 5:59] = 100 + 50 * np.sin(2 * np.pi * np.arange(5, 59) / period_mm)[:, None, None]
    return wave


def test_without_smoothing_detail_finer_than_the_new_voxels_folds_into_coarse_patterns_and_with_it_does_not():
    ripple = {}
    for period in (3.4, 20.0):
        for antialias in (False, True):
            transform = volume_transform((20, 20, 20), (3.0, 3.0, 3.0), antialias)
            volume = transform(to_meta_tensor(stripes(period), np.eye(4))).numpy()[0]
            assert (volume[0] == 0).all() and (volume[9, 9] > 0).sum() == 18, "the box has another size"
            ripple[period, antialias] = volume[3:-3, 5:-5, 5:-5].mean((1, 2)).std()
    assert ripple[3.4, False] > 0.1  # waves of 3.4 mm on voxels of 3 mm: what is seen there is no anatomy
    assert ripple[3.4, True] < 0.35 * ripple[3.4, False]
    assert ripple[20.0, True] > 0.8 * ripple[20.0, False]


def test_smoothing_is_off_by_default_and_leaves_axes_alone_that_get_no_coarser(brains_folder):
    scan = to_meta_tensor(*decode_nifti(read_scans(brains_folder)[0]["nifti"], "first"))  # 6 mm
    plain = volume_transform((32, 32, 32), (6.0, 6.0, 6.0))(scan)
    assert torch.equal(volume_transform((32, 32, 32), (6.0, 6.0, 6.0), antialias=True)(scan), plain)
    coarse, smooth = (volume_transform((16, 32, 32), (12.0, 6.0, 6.0), antialias)(scan) for antialias in (False, True))
    assert torch.equal(coarse.affine, smooth.affine)
    assert (coarse - smooth).abs().mean() > 1e-3
    assert not arguments(brains_folder).antialias
    for wanted in (coarse, smooth):
        args = arguments(brains_folder, volume_shape=[16, 32, 32], spacing=[12.0, 6.0, 6.0], antialias=wanted is smooth)
        subject = read_scans(brains_folder)[0]["participant_id"]
        assert torch.equal(
            VolumeDataset(brains_folder, [subject], **args.reading())[0]["volume"].as_tensor(), wanted.as_tensor()
        )


def test_a_few_glaring_voxels_and_the_scanners_gain_do_not_change_the_intensities():
    rng = np.random.default_rng(0)
    array = np.zeros((20, 20, 20), dtype=np.float32)
    array[2:18, 2:18, 2:18] = rng.uniform(100, 200, (16, 16, 16))
    glaring = array.copy()
    glaring[5, 5, 5:10] = 9000
    transform = volume_transform((20, 20, 20), (1.0, 1.0, 1.0))
    plain, hot, gain = (transform(to_meta_tensor(a, np.eye(4))).numpy() for a in (array, glaring, array * 37))
    assert (plain.min(), plain.max()) == (0, 1)
    assert np.sort(plain[plain > 0])[int(0.995 * 16**3) - 30] == pytest.approx(1, abs=0.01)
    keep = glaring < 9000
    assert np.abs(plain - hot)[0][keep].max() < 0.01
    assert np.abs(plain - gain).max() < 1e-5


def test_scans_of_one_subject_stand_together_with_their_label(brains_folder):
    dataset = VolumeDataset(brains_folder, ["sub-08", "sub-01"], **arguments(brains_folder).reading())
    assert [(item["subject"], item["class_label"]) for item in dataset] == [("sub-01", 0), ("sub-01", 0), ("sub-08", 3)]
    assert dataset.stack().shape == (3, 1, 32, 32, 32)
    assert type(dataset.stack()) is torch.Tensor


# --- labels ---


@pytest.mark.parametrize(
    "age, label", [(20, 0), (35, 0), ("35.0", 0), (35.1, 1), (59.9, 1), (60, 2), (86, 2), (None, 3), ("", 3)]
)
def test_young_is_up_to_35_and_old_from_60_and_no_age_is_the_null_class(age, label):
    assert class_of(age, ["young", "middle", "old"], [35.0, 60.0]) == label
    assert class_of(float("nan"), ["young", "middle", "old"], [35.0, 60.0]) == 3


@pytest.mark.parametrize("age, label", [(20, 0), (50, 0), (50.01, 1), (51, 1), (None, 2)])
def test_a_single_edge_belongs_to_the_lower_class(age, label):
    assert class_of(age, ["young", "old"], [50.0]) == label


def test_labels_that_are_class_names_need_no_edges():
    assert [class_of(name, ["LGG", "HGG"], []) for name in ("HGG", "LGG", None)] == [1, 0, 2]
    assert [class_of(number, ["0", "1"], []) for number in (1, 0, "1", 1.0)] == [
        1,
        0,
        1,
        1,
    ]  # float: a column with gaps
    assert class_of(1.0, ["0.5", "1.0"], []) == 1
    with pytest.raises(ValueError, match="'hgg' is none of the classes"):
        class_of("hgg", ["LGG", "HGG"], [])


@pytest.mark.parametrize(
    ("flags", "edges"),
    [([], [35, 60]), (["--class_names", "LGG", "HGG"], []), (["--class_names", "a", "b", "--class_edges", "50"], [50])],
)
def test_class_names_given_without_edges_are_those_in_the_label_column(flags, edges):
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--data_dir", "x", "--split_file", "y", *flags]
    )
    assert args.class_edges == edges


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match=r"volume_shape must be three positive numbers .* \[64, 64\]"):
        arguments("x", volume_shape=[64, 64])
    with pytest.raises(ValueError, match=r"3 classes need 2 class_edges, got \[35.0\]"):
        arguments("x", class_edges=[35.0])
    with pytest.raises(ValueError, match=r"class_edges must rise, got \[60.0, 35.0\]"):
        arguments("x", class_edges=[60.0, 35.0])


# --- bad input: one clear message each ---


@pytest.fixture
def copied_folder(brains_folder, tmp_path) -> Path:
    """The niftifolder again, to be damaged."""
    return Path(shutil.copytree(brains_folder, tmp_path / "copy"))


def read_first(folder: Path, **changes) -> VolumeDataset:
    return VolumeDataset(str(folder), ["sub-01"], **arguments(str(folder), **changes).reading())


def test_a_folder_that_is_not_there_or_holds_no_scan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of scans: .*absent"):
        read_scans(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match="no NIfTI file"):
        read_scans(tmp_path)


def corrupt_bytes(path: Path) -> None:
    path.write_bytes(b"this is no scan" * 100)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def flipped_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for position in range(2000, 2400):
        content[position] ^= 0xFF
    path.write_bytes(bytes(content))


def rewrite_header(path: Path, **fields) -> None:
    """Set header fields in the file itself; nibabel's own save would mend them."""
    header = nibabel.load(path).header.copy()
    for name, value in fields.items():
        header[name] = value
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(header.binaryblock + content[len(header.binaryblock) :]))


def no_affine(path: Path) -> None:
    rewrite_header(path, sform_code=0, qform_code=0)


def flat_affine(path: Path) -> None:
    rewrite_header(path, srow_z=0)


def unknown_voxels(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[70:72] = (999).to_bytes(2, "little")  # datatype
    path.write_bytes(gzip.compress(content))


def negative_side(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:44] = (-5).to_bytes(2, "little", signed=True)  # dim[1]
    path.write_bytes(gzip.compress(content))


def nothing_above_zero(path: Path) -> None:
    rewrite(path, nibabel.load(path).get_fdata().astype(np.float32) - 2000)


def hounsfield(path: Path) -> None:
    rewrite(path, nibabel.load(path).get_fdata().astype(np.float32) - 300)  # air far below 0, the rest above


def rewrite(path: Path, array: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(array, nibabel.load(path).affine), path)


def not_a_number(path: Path) -> None:
    array = nibabel.load(path).get_fdata().astype(np.float32)
    array[3, 3, 3:5] = np.nan
    rewrite(path, array)


def all_zero(path: Path) -> None:
    rewrite(path, np.zeros((8, 8, 8), np.float32))


def flat_picture(path: Path) -> None:
    rewrite(path, np.ones((8, 8), np.float32))


@pytest.mark.parametrize(
    "damage, message",
    [
        (corrupt_bytes, "cannot be read as NIfTI"),
        (cut_short, "cannot be read as NIfTI"),
        (flipped_bits, "cannot be read as NIfTI"),
        (no_affine, "has no affine"),
        (flat_affine, "unusable affine"),
        (unknown_voxels, "cannot be read as NIfTI"),
        (negative_side, "cannot be read as NIfTI"),
        (nothing_above_zero, "cannot be prepared: nothing in the scan is above 0"),
        (hounsfield, "cannot be prepared: intensities reach from -300 to [0-9.]+; they must be positive"),
        (not_a_number, "holds 2 NaN or infinite voxels"),
        (all_zero, "is empty: every voxel is 0.0"),
        (flat_picture, r"must have 3 or 4 axes, got shape \(8, 8\)"),
    ],
)
def test_a_damaged_scan_is_refused_with_its_subject_and_what_is_wrong(copied_folder, damage, message):
    damage(copied_folder / FIRST_SCAN)
    with pytest.raises(ValueError, match=f"sub-01.*{message}"):
        read_first(copied_folder)


def test_a_missing_column_is_named_beside_those_there_are(brains_folder):
    with pytest.raises(ValueError, match=r"no column 'subject' \(subject_column\), only .*participant_id"):
        read_first(brains_folder, subject_column="subject")
    with pytest.raises(ValueError, match="no column 'diagnosis'"):
        read_first(brains_folder, label_column="diagnosis")


def test_subjects_may_be_numbers_and_are_text_from_the_split_on(copied_folder, tmp_path, monkeypatch):
    metadata = copied_folder / "metadata.csv"
    metadata.write_text(re.sub(r",sub-0(\d),", r",\1,", metadata.read_text()))
    assert read_scans(copied_folder)["participant_id"][0] == "1"
    options = ["--data_dir", copied_folder, "--split_file", tmp_path / "split.json"]
    run_example(monkeypatch, "make_split.py", *options, "--test", 1, 1, 1, "--validation", 1, 0, 1)
    split = load_split(tmp_path / "split.json")
    assert sorted(split["train"] + split["validation"] + split["test"]) == list("12345678")
    numbers = {part: [int(s) for s in split[part]] for part in ("train", "validation", "test")}
    folds = {fold: [int(s) for s in subjects] for fold, subjects in split["folds"].items()}
    (tmp_path / "by-hand.json").write_text(json.dumps(numbers | {"folds": folds}))
    assert load_split(tmp_path / "by-hand.json") == split
    scans = VolumeDataset.from_arguments(arguments(copied_folder, tmp_path / "split.json"), "train")
    assert sorted({item["subject"] for item in scans}) == split["train"]


def test_scans_without_a_subject_are_refused(copied_folder):
    metadata = copied_folder / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("sub-03,", ","))
    with pytest.raises(ValueError, match=r"1 scan\(s\) have no subject in the column 'participant_id'"):
        read_first(copied_folder)


def test_a_subject_without_a_scan_is_named(brains_folder):
    with pytest.raises(ValueError, match="1 subject.* no scan, the first is 'sub-99'"):
        VolumeDataset(brains_folder, ["sub-01", "sub-99"], **arguments(brains_folder).reading())
    with pytest.raises(ValueError, match="no subjects were asked for"):
        VolumeDataset(brains_folder, [], **arguments(brains_folder).reading())


def test_none_or_two_columns_of_scans_are_refused():
    with pytest.raises(ValueError, match=r"exactly one NIfTI column, found \[\]"):
        read_scans(Dataset.from_dict({"participant_id": ["a"]}))
    two = Features({"t1": Nifti(), "t2": Nifti()})
    with pytest.raises(ValueError, match=r"found \['t1', 't2'\]"):
        read_scans(Dataset.from_dict({"t1": ["a.nii"], "t2": ["b.nii"]}, features=two))


def test_scans_are_not_decoded_before_they_are_wanted(copied_folder):
    corrupt_bytes(copied_folder / FIRST_SCAN)
    rows = read_scans(copied_folder)
    assert len(rows) == 9
    with pytest.raises(ValueError, match="sub-01"):
        decode_nifti(rows[sorted(rows["participant_id"]).index("sub-01")]["nifti"], "sub-01")


# --- split ---


CLASSES = {f"s{i:02d}": i % 3 for i in range(30)} | {"unlabelled-1": 3, "unlabelled-2": 3}


def test_the_script_that_splits_says_which_column_is_missing(brains_folder, tmp_path, monkeypatch):
    options = ["--data_dir", brains_folder, "--split_file", str(tmp_path / "split.json"), "--label_column", "diagnosis"]
    monkeypatch.setattr(
        sys, "argv", ["make_split.py", *options, "--test", "1", "1", "1", "--validation", "1", "0", "1"]
    )
    with pytest.raises(SystemExit, match=r"no column 'diagnosis' \(label_column\), only .*participant_id"):
        runpy.run_path(str(REPOSITORY / "examples" / "make_split.py"), run_name="__main__")
    assert not (tmp_path / "split.json").exists()


def test_the_script_that_splits_needs_a_count_for_every_class(brains_folder, tmp_path, monkeypatch):
    options = ["--data_dir", brains_folder, "--split_file", tmp_path / "split.json", "--validation", 1, 1]
    with pytest.raises(SystemExit, match=r"one count for each of \['young', 'middle', 'old'\], got \[1, 1\]"):
        run_example(monkeypatch, "make_split.py", *options, "--test", 1, 1)
    assert not (tmp_path / "split.json").exists()


def test_the_split_is_stratified_and_parts_no_subject():
    split = make_split(CLASSES, test=[4, 2, 4], validation=[1, 1, 1], seed=0)
    assert [sum(CLASSES[s] == label for s in split["test"]) for label in range(3)] == [4, 2, 4]
    assert [sum(CLASSES[s] == label for s in split["validation"]) for label in range(3)] == [1, 1, 1]
    everyone = split["train"] + split["validation"] + split["test"]
    assert sorted(everyone) == sorted(CLASSES)
    assert {"unlabelled-1", "unlabelled-2"} <= set(split["train"])
    a, b = split["folds"]["a"], split["folds"]["b"]
    assert sorted(a + b) == split["train"]
    for label in range(4):
        assert abs(sum(CLASSES[s] == label for s in a) - sum(CLASSES[s] == label for s in b)) <= 1


def test_the_split_depends_on_its_seed_and_not_on_the_order_of_the_rows():
    first = make_split(CLASSES, [4, 2, 4], [1, 1, 1], seed=0)
    assert make_split(dict(reversed(CLASSES.items())), [4, 2, 4], [1, 1, 1], seed=0) == first
    assert make_split(CLASSES, [4, 2, 4], [1, 1, 1], seed=1) != first


def test_more_subjects_than_there_are_cannot_be_set_apart():
    with pytest.raises(ValueError, match=r"class 1 has 10 subjects, 9 \+ 2 were asked for"):
        make_split(CLASSES, [4, 9, 4], [1, 2, 1])
    with pytest.raises(ValueError, match="one count per class"):
        make_split(CLASSES, [4, 4], [1, 1, 1])


def test_a_split_is_written_once_and_never_over_an_old_one(tmp_path):
    split = make_split(CLASSES, [4, 2, 4], [1, 1, 1])
    save_split(split, tmp_path / "deep" / "split.json")
    assert load_split(tmp_path / "deep" / "split.json") == split
    with pytest.raises(FileExistsError, match="made once for all stages"):
        save_split(make_split(CLASSES, [4, 2, 4], [1, 1, 1], seed=5), tmp_path / "deep" / "split.json")
    assert load_split(tmp_path / "deep" / "split.json") == split


def leak_into_training(split: dict) -> None:
    split["train"].append(split["test"][0])
    split["folds"]["a"].append(split["test"][0])


def leak_into_validation(split: dict) -> None:
    split["validation"].append(split["test"][0])


def leak_between_folds(split: dict) -> None:
    split["folds"]["a"].append(split["folds"]["b"][0])


def fold_of_test_subjects(split: dict) -> None:
    split["folds"]["a"].append(split["test"][0])


@pytest.mark.parametrize(
    "leak, message",
    [
        (leak_into_training, "two parts of the split"),
        (leak_into_validation, "two parts of the split"),
        (leak_between_folds, "without overlap"),
        (fold_of_test_subjects, "part the training subjects"),
        (lambda split: split.pop("folds"), r"has no \['folds'\]"),
        (lambda split: split["folds"].pop("b"), r"has no \['folds/b'\]"),
    ],
)
def test_a_split_with_a_leak_is_refused(tmp_path, leak, message):
    split = make_split(CLASSES, [4, 2, 4], [1, 1, 1])
    leak(split)
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path / "split.json")


def test_each_part_of_the_split_is_read_and_nothing_else(brains_folder, tmp_path):
    split = {
        "train": ["sub-01", "sub-04", "sub-06", "sub-08"],
        "validation": ["sub-02"],
        "test": ["sub-03"],
        "folds": {"a": ["sub-01", "sub-06"], "b": ["sub-04", "sub-08"]},
    }
    save_split(split, tmp_path / "split.json")
    args = arguments(brains_folder, tmp_path / "split.json")
    for part, subjects in {"validation": ["sub-02"], "a": ["sub-01", "sub-01", "sub-06"]}.items():
        assert [item["subject"] for item in VolumeDataset.from_arguments(args, part)] == subjects
    with pytest.raises(ValueError, match="unknown part 'training'"):
        VolumeDataset.from_arguments(args, "training")
    with pytest.raises(FileNotFoundError, match="make_split.py"):
        VolumeDataset.from_arguments(arguments(brains_folder, tmp_path / "no.json"), "train")


def test_the_committed_split_of_the_bundled_checkpoints_sets_forty_test_subjects_apart():
    split = load_split(REPOSITORY / "examples" / "ixi_t1_split.json")
    assert (len(split["test"]), len(split["validation"]), len(split["train"])) == (40, 12, 88)
    assert all(subject.startswith("sub-IXI") for part in ("train", "validation", "test") for subject in split[part])
