"""prepare_dataset.py --register: one pose and grid for all, copies of the training scans alone, one interpolation."""

import csv
import json
import warnings

import nibabel
import numpy as np
import pytest

import trees
from conftest import run_example
from diffusers_med3d.data import VolumeDataset, load_split
from diffusers_med3d.data.settings import read_settings

pytest.importorskip("SimpleITK", reason="registration needs the extra register")


def shifted(folder):
    """Five people per group whose heads lie at different places."""
    trees.niftifolder(folder)
    for number in range(10):
        array = np.pad(trees.anatomy(number), ((number % 3, 2 - number % 3), (1, 1), (number % 2, 1 - number % 2)))
        trees.save(folder / "images" / f"scan{number}.nii.gz", array, axes="LPS")
    return folder


@pytest.mark.parametrize("template", ["group", "scan"])
def test_registered_scans_lie_on_the_grid_with_copies_of_training_scans_alone(tmp_path, monkeypatch, template):
    source, output = shifted(tmp_path / "in"), tmp_path / "out"
    register = "group" if template == "group" else source / "images" / "scan0.nii.gz"
    flags = ["--label_column", "group", "--volume_shape", 32, 32, 32, "--spacing", 8, 8, 8, "--rounds", 1]
    run_example(
        monkeypatch,
        "prepare_dataset.py",
        *("--layout", "niftifolder", "--input", source, "--output", output, "--num_proc", 1),
        *("--register", register, "--jittered_copies", 2, *flags),
    )
    settings = read_settings(output)
    assert settings.registration == ("group" if template == "group" else "scan0.nii.gz")
    with (output / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    split = load_split(output / "split.json")
    train = set(split["train"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of files without a row
        volumes = VolumeDataset(output, split["validation"])
    assert len(volumes) == 2 and tuple(volumes[0]["volume"].shape) == (1, 32, 32, 32)
    copies = {row["participant_id"]: 0 for row in rows}
    for row in rows:
        image = nibabel.load(output / row["file_name"])
        assert image.shape == (32, 32, 32) and nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        assert row["group"] in "ab"
        copies[row["participant_id"]] += row["jitter"] != "0"
    assert copies == {name: 2 * (name in train) for name in copies}
    record = json.loads((output / "registration.json").read_text())
    assert len(record["scans"]) == 10 and min(scan["correlation"] for scan in record["scans"].values()) > 0.8
    middles = [np.argwhere(np.asarray(nibabel.load(output / row["file_name"]).dataobj) > 0).mean(0) for row in rows]
    assert np.std(middles, axis=0).max() < 0.6  # voxels; they began up to two apart
    assert {path.name for path in output.iterdir()} == {
        *("images", "metadata.csv", "dataset.json", "split.json", "registration.json", ".registration"),
        *("report.md", "report.html", "montage.png"),
    }
