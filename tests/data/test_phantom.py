"""The phantom: brains that differ, of two classes, the same for the same seed, and never called real."""

import json

import nibabel
import numpy as np
import pytest

pytest.importorskip("nilearn", reason="the phantom needs the extra phantom")

from diffusers_med3d.data import VolumeDataset
from diffusers_med3d.data.duplicates import find_duplicates
from diffusers_med3d.data.phantom import make_phantom, phantom_brain, tissue_maps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantom(tmp_path_factory.mktemp("phantom"), num_subjects=6, spacing=5.0)


@pytest.mark.slow
def test_half_of_the_phantoms_have_lesions_and_all_say_that_they_are_phantoms(folder):
    lines = (folder / "metadata.csv").read_text().splitlines()
    assert lines[0] == "file_name,participant_id,class,phantom"
    assert [line.split(",")[2] for line in lines[1:]] == ["plain", "lesion"] * 3
    assert all("phantom" in name and line.endswith(",yes") for line in lines[1:] for name in line.split(",")[:2])
    assert "show nobody" in json.loads((folder / "phantom.json").read_text())["note"]


def test_phantoms_are_read_as_scans_and_differ_as_people_do(folder):
    volumes = VolumeDataset(
        folder, volume_shape=(48, 48, 48), spacing=(5, 5, 5), label_column="class", class_names=["plain", "lesion"]
    )
    assert [item["class_label"] for item in volumes] == [0, 1] * 3
    assert find_duplicates([item["volume"] for item in volumes], progress=False) == []


def test_a_phantom_depends_on_its_seed_and_number_alone(folder, tmp_path):
    again = make_phantom(tmp_path, num_subjects=2, spacing=5.0)
    for name in ("sub-phantom001", "sub-phantom002"):
        path = f"images/{name}.nii.gz"
        assert (again / path).read_bytes() == (folder / path).read_bytes()


def test_lesions_are_dark_spots_in_white_matter():
    maps, affine = tissue_maps(spacing=4.0)
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    total = sum(maps.values())
    assert total.max() <= 1.0 + 1e-5 and (total.max(axis=(0, 1)) > 0.9).sum() > 30
    quiet = {"deformation": 0.0, "noise": 0.0, "bias": 0.0}
    plain, lesion = (phantom_brain(maps, 4.0, has, np.random.default_rng(1), **quiet) for has in (False, True))
    changed = np.abs(plain - lesion) > 0.1
    assert 5 < changed.sum() < 2000 and (lesion[changed] < plain[changed]).mean() > 0.95
    assert (plain[plain > 0] > 0).all() and (plain == 0).mean() > 0.5  # background exactly 0


def test_senseless_wishes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got 0, 2.0 and 0.5"):
        make_phantom(tmp_path, num_subjects=0)
