"""data/registration.py and examples/prepare_dataset.py: scans brought into one frame, and their jittered copies."""

import csv
import json

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from conftest import run_example, synthetic_brain
from diffusers_med3d.data import DataArguments, VolumeDataset, volume_transform
from diffusers_med3d.evaluation.sampling import volume_set
from diffusers_med3d.utils.files import write_json

sitk = pytest.importorskip("SimpleITK")

from diffusers_med3d.data import registration as reg  # noqa: E402

GRID = reg.Grid((24, 24, 24), (6.0, 6.0, 6.0))
STILL = reg.Jitter(degrees=0, scale=0, shift=0, warp=0)


def brain(degrees: float = 0.0, scale: float = 1.0, shift: float = 0.0, seed: int = 0):
    """A synthetic brain of 96 x 144 x 120 mm whose header turns, scales and shifts it in space."""
    affine = np.eye(4)
    angle = np.deg2rad(degrees)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, :3] *= 6.0 * scale
    affine[:3, 3] = shift - affine[:3, :3] @ np.array([7.5, 11.5, 9.5])
    return reg.read_scan(1000 * synthetic_brain((16, 24, 20), seed), affine)


def test_registration_finds_the_pose_and_size_that_a_scan_was_given():
    template = reg.template_image(reg.normalised(brain(), reg.centred(brain()), GRID), GRID)
    moved = brain(degrees=8.0, scale=1.1, shift=12.0)
    before = reg.correlation(reg.normalised(moved, reg.centred(moved), GRID), sitk.GetArrayFromImage(template).T)
    transform = reg.register(moved, template)
    after = reg.correlation(reg.normalised(moved, transform, GRID), sitk.GetArrayFromImage(template).T)
    assert before < 0.93 < 0.97 < after  # the outline of an ellipsoid leaves turns open, the spot inside decides
    affine = reg.affine_of(transform)
    assert np.linalg.det(affine) == pytest.approx(1.1**3, rel=0.03)
    np.testing.assert_allclose(affine[:3, 3], 12.0, atol=1.0)
    assert reg.cut_share(moved, reg.transform_of(affine), GRID) == 0
    assert reg.cut_share(moved, reg.transform_of(affine), reg.Grid((6, 24, 24), (6.0, 6.0, 6.0))) > 0.2


def test_an_affine_survives_the_way_to_simpleitk_and_back():
    affine = np.eye(4)
    affine[:3] = np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(reg.affine_of(reg.transform_of(affine)), affine, atol=1e-12)


def test_a_scan_is_resampled_where_its_affine_says():
    scan = brain(degrees=20.0, shift=5.0)
    affine = np.eye(4)
    affine[:3, 3] = [3.0, -6.0, 9.0]
    found = reg.normalised(scan, reg.transform_of(affine), GRID)
    points = np.stack(np.meshgrid(*map(np.arange, GRID.shape), indexing="ij"), -1) @ GRID.affine[:3, :3]
    points = points + GRID.affine[:3, 3] + affine[:3, 3]  # RAS millimetres of the scan
    angle = np.deg2rad(20.0)
    to_world = 6.0 * np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    voxels = (points - 5.0) @ np.linalg.inv(to_world).T + [7.5, 11.5, 9.5]
    expected = map_coordinates(1000 * synthetic_brain((16, 24, 20), 0), voxels.transpose(3, 0, 1, 2), order=1)
    expected /= expected[expected > 0].mean()
    assert np.abs(found - expected)[4:-4, 4:-4, 4:-4].max() < 1e-3


def test_jitter_is_one_transform_over_the_registration_and_without_it_nothing_changes():
    scan = brain(degrees=10.0)
    transform = reg.register(scan, reg.template_image(reg.normalised(brain(), reg.centred(brain()), GRID), GRID))
    plain = reg.resample(scan, transform, GRID, smoothing=0.0)
    still = reg.jittered(transform, GRID, STILL, np.random.default_rng(0))
    np.testing.assert_allclose(reg.resample(scan, still, GRID, smoothing=0.0), plain, atol=0.1)
    shifted = reg.jittered(transform, GRID, reg.Jitter(0, 0, 6.0, 0), np.random.default_rng(1))
    expected = np.random.default_rng(1)
    expected.normal(size=6)  # angles and scales
    shift = reg.RAS_TO_LPS @ expected.normal(0, 6.0, 3)
    point = np.array([5.0, -7.0, 11.0])
    moved = reg.RAS_TO_LPS @ shifted.TransformPoint((reg.RAS_TO_LPS @ point).tolist())
    affine = reg.affine_of(transform)
    np.testing.assert_allclose(moved, affine[:3, :3] @ (point + shift) + affine[:3, 3], atol=1e-6)


def test_warps_have_the_asked_for_size_and_are_smooth():
    field = sitk.GetArrayFromImage(reg._warp(GRID, reg.Jitter(), np.random.default_rng(0)).GetDisplacementField())
    assert np.sqrt(np.mean(field**2)) == pytest.approx(1.6, rel=1e-3)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 3.0  # a voxel is 6 mm: no folding


def test_interpolation_by_splines_keeps_what_linear_interpolation_blurs_and_leaves_the_background_zero():
    scan = brain()
    transform = reg.transform_of(np.array([[1, 0, 0, 2.0], [0, 1, 0, 2.0], [0, 0, 1, 2.0], [0, 0, 0, 1]]))
    sharp = reg.resample(scan, transform, GRID, smoothing=0.0)
    linear = sitk.GetArrayFromImage(sitk.Resample(scan, GRID.blank(), transform, sitk.sitkLinear)).T
    inside = np.s_[8:16, 8:16, 8:16]
    assert sharp[inside].std() > 1.2 * linear[inside].std()
    assert sharp.min() == 0 and not sharp[linear == 0].any()
    assert reg.resample(scan, transform, GRID, smoothing=6.0)[inside].std() < sharp[inside].std()


def test_the_mean_is_symmetric_about_the_middle_of_the_grid():
    mean = reg.symmetric_mean([reg.normalised(scan, reg.centred(scan), GRID) for scan in (brain(), brain(seed=1))])
    np.testing.assert_allclose(mean, mean[::-1], atol=1e-6)
    with pytest.raises(ValueError, match=r"one channel \(X, Y, Z\), got shape \(4, 4, 4, 2\)"):
        reg.read_scan(np.ones((4, 4, 4, 2), np.float32), np.eye(4))


@pytest.fixture(scope="module")
def registered(brains_folder, tmp_path_factory):
    """The synthetic scans, registered, with two copies of every training scan."""
    folder = tmp_path_factory.mktemp("registered")
    split = {"train": ["sub-01", "sub-04", "sub-06"], "validation": ["sub-02"], "test": ["sub-03"]}
    write_json(folder / "split.json", split | {"folds": {"a": ["sub-01"], "b": ["sub-04", "sub-06"]}})
    options = "--volume_shape 24 28 24 --spacing 6 6 6 --rounds 1 --jittered_copies 2 --num_proc 1 --smoothing 0"
    classes = "--label_column age --class_names young middle old --class_edges 35 60 --keep_unlabelled true"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_example(
            monkeypatch, "prepare_dataset.py", "--register", "group", "--input", brains_folder, "--output",
            folder / "data", "--split_file", folder / "split.json", *options.split(), *classes.split(),
        )  # fmt: skip
    return folder


@pytest.mark.slow
def test_the_prepared_data_set_holds_scans_copies_and_the_grid(registered, brains_folder):
    rows = list(csv.DictReader((registered / "data" / "metadata.csv").open()))
    assert len(rows) == 9 + 2 * 4 and set(rows[0]) == {"file_name", "participant_id", "age", "jitter"}
    assert {row["participant_id"] for row in rows if row["jitter"] != "0"} == {"sub-01", "sub-04", "sub-06"}
    record = json.loads((registered / "data" / "registration.json").read_text())
    assert record["grid"]["volume_shape"] == [24, 28, 24] and len(record["scans"]) == 9
    assert min(scan["correlation"] for scan in record["scans"].values()) > 0.9
    images = {row["file_name"]: nibabel.load(registered / "data" / row["file_name"]) for row in rows}
    assert all(image.shape == (24, 28, 24) for image in images.values())
    volumes = {name: np.asarray(image.dataobj) for name, image in images.items()}
    assert all(volume.dtype == np.int16 and volume.min() == 0 for volume in volumes.values())
    first, second = (volumes[f"images/sub-04_jitter-{copy:02d}.nii.gz"] for copy in (1, 2))
    assert not np.array_equal(first, second) and np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.8
    x, y, z = np.argwhere(volumes["images/sub-03.nii.gz"] >= 950).mean(0) - [11.5, 13.5, 11.5]
    assert min(x, y, z) > 2  # the bright spot of a scan stored as ASR is to the right, in front and above


def test_only_training_reads_copies_and_registered_scans_stay_where_they_lie(registered):
    data = registered / "data"
    args = DataArguments(str(data), str(registered / "split.json"))  # dataset.json says the rest
    assert args.registration == "group"
    assert len(VolumeDataset.from_arguments(args, "train")) == 4
    with_copies = VolumeDataset.from_arguments(args, "train", jittered_copies=True)
    assert len(with_copies) == 12 and len({item["subject"] for item in with_copies}) == 3
    assert len(VolumeDataset(data, ["sub-04"])) == 1
    item = next(item["volume"] for item in with_copies if item["subject"] == "sub-04")
    written = nibabel.load(data / "images" / "sub-04.nii.gz")
    np.testing.assert_allclose(item.affine.numpy(), written.affine)
    voxels = np.asarray(written.dataobj)
    scale = np.quantile(voxels[voxels > 0], 0.995)
    np.testing.assert_allclose(item.as_tensor()[0].numpy(), (voxels / scale).clip(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match=r"must have \(24, 24, 24\) voxels .* got \(24, 28, 24\)"):
        volume_transform((24, 24, 24), (6.0, 6.0, 6.0), registered=True)(item)


def test_evaluation_leaves_registered_scans_where_they_lie(registered):
    dataset = VolumeDataset(registered / "data", ["sub-02", "sub-03"])
    found = volume_set(dataset).volumes
    torch.testing.assert_close(found, dataset.stack().where(dataset.stack() >= 0.02, 0), atol=0.02, rtol=0)
