"""Damaged DICOM files among sound ones: reported and left out, never fatal, and no message quotes a patient."""

import gzip
import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import trees
from conftest import run_example
from diffusers_med3d.data.layouts import find_scans
from diffusers_med3d.data.writing import write_scan

pydicom = pytest.importorskip("pydicom")

SECRETS = ("quagmire", "mrn-", "77881", trees.BIRTH, trees.SCANNED[:-1], "elsewhere", "acc4711", "1.2.826", "mprage")
PIXELS = 2 * 12 * 12  # bytes of the voxels at the end of a file


def series(folder: Path, number: int = 0, **tags: object) -> list[Path]:
    """Ten slices of one patient, in order."""
    array = trees.anatomy(number)[4:16, 6:18, 5:15].copy()
    trees.dicom_series(folder, f"MRN-77881{number}", array, **tags)
    return sorted(folder.iterdir(), reverse=True)


def flip_bits(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3))):
        content[rng.randrange(128, len(content) - PIXELS)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damage", [flip_bits, cut])
def test_a_damaged_file_stops_nothing_and_no_message_quotes_it(tmp_path, capfd, caplog, seed, damage):
    files, rng = series(tmp_path / "in"), random.Random(seed)
    said = []
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            path = rng.choice(files)
            sound = path.read_bytes()
            damage(path, rng)
            found = find_scans("dicom", tmp_path / "in")
            assert found.scans or found.left_out or found.notes
            records = [write_scan(scan, tmp_path / "a.nii.gz", tmp_path / "a.npy") for scan in found.scans]
            said += [str(found.left_out), str(found.notes), str(records), str([scan.columns for scan in found.scans])]
            path.write_bytes(sound)
    said += [caplog.text, *capfd.readouterr(), *(str(one.message) for one in caught)]
    for secret in (*SECRETS, str(tmp_path)):
        assert not [text for text in said if secret.lower() in text.lower()], secret


def without_its_ends(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def with_a_spacing_of_no_number(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"8.0\\8.0 ") == 1
    path.write_bytes(content.replace(b"8.0\\8.0 ", b"8.0\\8,0 "))


def with_an_unknown_type_of_value(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"\x08\x00\x60\x00CS")  # Modality
    path.write_bytes(content[: at + 4] + b"C\x13" + content[at + 6 :])


@pytest.mark.parametrize("harm", [without_its_ends, with_a_spacing_of_no_number, with_an_unknown_type_of_value])
@pytest.mark.parametrize("slice_number", [0, 4])
def test_a_file_that_cannot_be_read_is_counted_and_a_gap_in_its_series_is_named(
    tmp_path, harm: Callable[[Path], None], slice_number
):
    harm(series(tmp_path)[slice_number])
    found = find_scans("dicom", tmp_path)
    assert "1 DICOM files are damaged and were left out" in found.notes or "no DICOM images" in found.notes[0]
    if slice_number == 0:
        assert len(found.scans[0].files) == 9
    else:
        assert not found.scans and "a gap: slices 4 and 5 are 16.00 mm apart" in found.left_out[0].reason


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelSpacing": [0, 8]}, "a pixel spacing of [0.0, 8.0] mm"),
        ({"PixelSpacing": [-8, 8]}, "a pixel spacing of [-8.0, 8.0] mm"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "rows and columns that are not at right angles"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "rows and columns that are not at right angles"),
    ],
)
def test_a_geometry_that_spans_no_space_is_named(tmp_path, tags, reason):
    series(tmp_path, **tags)
    found = find_scans("dicom", tmp_path)
    assert not found.scans and found.left_out[0].reason == reason


def test_where_every_file_is_damaged_the_script_says_so_and_writes_nothing(tmp_path, monkeypatch, capfd):
    for path in series(tmp_path / "in"):
        with_a_spacing_of_no_number(path)
    with pytest.raises(SystemExit, match="no scan to prepare.*10 DICOM files are damaged") as ended:
        run_example(
            monkeypatch, "prepare_dataset.py", "--layout", "dicom", "--input", tmp_path / "in", "--output",
            tmp_path / "out",
        )  # fmt: skip
    said = str(ended.value.code) + "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret.lower() in said.lower()] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tree_with_damaged_files_is_prepared_from_the_others_and_nothing_tells_who_they_are(
    tmp_path, monkeypatch, capfd, caplog
):
    source, output, rng = tmp_path / "QUAGMIRE_JANE", tmp_path / "out", random.Random(0)
    for number in range(12):
        folder = source / f"quagmire^jane{number}" / trees.SCANNED
        trees.dicom_series(folder, f"MRN-77881{number}", trees.anatomy(number))
    for number, damage in ((0, cut), (1, flip_bits)):  # every slice of one person
        for path in (source / f"quagmire^jane{number}" / trees.SCANNED).iterdir():
            damage(path, rng)
    flags = ["--layout", "dicom", "--input", source, "--output", output, "--num_proc", 1, "--max_voxels", 32**3]
    with caplog.at_level(logging.DEBUG):
        run_example(monkeypatch, "prepare_dataset.py", *flags)
    report = (output / "report.md").read_text()
    assert "damaged and were left out" in report and "10 people" in report
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".gz"]) == 10 and len(files) == 16  # no half-written one
    said = {"log": caplog.text, "output": "".join(capfd.readouterr()).replace(str(output), "OUTPUT")}
    for path in files:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        said[path.relative_to(output).as_posix()] = content.decode("latin-1")
    for name, text in said.items():
        for secret in (*SECRETS, str(tmp_path), "/root"):
            assert secret.lower() not in text.lower() and secret.lower() not in name.lower(), (name, secret)
