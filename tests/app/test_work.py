"""Generating, comparing and scoring, without the page."""

import gzip
from importlib.util import find_spec

import nibabel
import numpy as np
import pytest
import torch

from diffusers_med3d.app import Reward, Settings, compare, generate, prepare_scan, read_scan, score_volume, work
from diffusers_med3d.app.niivue import niivue_module
from diffusers_med3d.metrics import sharpness


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray, compress: bool = True) -> bytes:
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    return gzip.compress(content) if compress else content


@pytest.fixture
def scan_file(tiny_volumes) -> bytes:
    """The first tiny volume on the grid of the tiny pipeline, away from the origin."""
    affine = np.diag([12.0, 12.0, 12.0, 1.0])
    affine[:3, 3] = [-70, -95, -60]
    return nifti_bytes((1000 * tiny_volumes[0, 0].numpy()).astype(np.int16), affine)


def test_a_volume_depends_on_its_settings_alone(tiny_pipeline):
    settings = Settings("old", seed=3, num_inference_steps=2)
    first = generate(tiny_pipeline, settings)
    generate(tiny_pipeline, Settings("young", seed=4, num_inference_steps=3, sampler="UniPC"))
    assert torch.equal(generate(tiny_pipeline, settings).volumes, first.volumes)
    by_hand = tiny_pipeline(class_labels="old", num_inference_steps=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.volumes, by_hand.volumes)
    np.testing.assert_array_equal(first.affine, tiny_pipeline.affine())


@pytest.mark.parametrize("sampler", work.SAMPLERS)
def test_every_sampler_makes_a_volume_and_leaves_the_checkpoint_as_it_was(tiny_pipeline, sampler):
    before = dict(tiny_pipeline.scheduler.config)
    volumes = generate(tiny_pipeline, Settings("young", sampler=sampler, num_inference_steps=3)).volumes
    assert volumes.shape == (1, 1, 16, 16, 16) and torch.isfinite(volumes).all()
    assert dict(tiny_pipeline.scheduler.config) == before and sampler in work.sampler_choices(tiny_pipeline)


def test_progress_counts_the_steps_that_are_made(tiny_pipeline, scan_file):
    seen = []
    scan = prepare_scan(read_scan(scan_file, "a.nii.gz"), tiny_pipeline)
    settings = Settings("young", num_inference_steps=4, strength=0.5)
    compare([tiny_pipeline, tiny_pipeline], settings, [scan, scan], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two volumes, two of the four steps each


def test_a_volume_made_from_a_scan_lies_where_the_scan_lies(tiny_pipeline, scan_file):
    scan = prepare_scan(read_scan(scan_file, "a.nii.gz"), tiny_pipeline)
    output = generate(tiny_pipeline, Settings("young", strength=0.5, num_inference_steps=2), scan)
    np.testing.assert_allclose(output.affine, scan.affine.numpy())
    assert abs(output.affine[1, 3] + 95) <= 12  # the preparation may pad by a voxel


def test_two_checkpoints_start_from_the_same_noise(tiny_pipeline):
    left, right = compare([tiny_pipeline, tiny_pipeline], Settings("old", seed=1, num_inference_steps=2))
    assert torch.equal(left.volumes, right.volumes)


def test_classes_and_the_null_class(tiny_pipeline):
    assert work.class_choices(tiny_pipeline) == ["young", "middle", "old", work.NO_CLASS]
    without = generate(tiny_pipeline, Settings(work.NO_CLASS, num_inference_steps=2)).volumes
    by_hand = tiny_pipeline(class_labels=None, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(without, by_hand.volumes)


def test_scores_are_those_of_the_rewards_and_a_reward_that_fails_gives_its_reason(tiny_volumes):
    def refuses(volumes, **conditions):
        raise RuntimeError("only\nfor the moon")

    seen = {}

    def mean(volumes, **conditions):
        seen.update(conditions)
        return [float(volumes.mean())]

    rewards = [Reward("mean", mean), Reward("refuses", refuses), Reward("none", lambda volumes, **conditions: [None])]
    scores = score_volume(tiny_volumes[:1], rewards, Settings("old", conditions={"age": 0.5}))
    assert scores["mean"] == pytest.approx(float(tiny_volumes[0].mean()))
    assert "cannot score this volume" in scores["refuses"] and "only for the moon" in scores["refuses"]
    assert scores["none"] == "no score for this volume"
    assert scores["sharpness"] == pytest.approx(float(sharpness(tiny_volumes[:1])[0]))
    assert seen == {"class_label": ["old"], "age": [0.5]}


def headers(shape=(8, 8, 8)) -> bytes:
    return nifti_bytes(np.ones(shape, np.int16), np.eye(4), compress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as NIfTI"),
        (b"no scan at all", "cannot be read as NIfTI"),
        (b"\x1f\x8bno gzip", "^head.nii.gz cannot be read as NIfTI: it is damaged or no NIfTI file.$"),
        (gzip.compress(headers())[:40], "ends too early"),
        (headers()[:500], "^head.nii.gz cannot be read as NIfTI: it is damaged or no NIfTI file.$"),
        (headers(), "every voxel is 1"),
        (headers((8, 8, 1)), "^head.nii.gz is a flat picture"),
        (headers((4, 4, 4, 30)), "series of 30 volumes"),
    ],
    ids=["empty", "text", "damaged gzip", "cut gzip", "cut header", "constant", "flat", "series"],
)
def test_an_upload_that_is_no_scan_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_scan(content, "head.nii.gz")
    assert "head.nii.gz" in str(caught.value)


def test_an_upload_whose_header_promises_a_huge_image_is_refused_before_it_is_read():
    content = bytearray(headers())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    with pytest.raises(ValueError, match="27000000000000 voxels, more than the 134217728"):
        read_scan(bytes(content), "head.nii")


def test_an_upload_that_unpacks_to_a_huge_file_is_refused_while_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(work, "MAX_UNPACKED_BYTES", 2**16)
    with pytest.raises(ValueError, match="unpacks to more than 65536 bytes"):
        read_scan(gzip.compress(bytes(2**20)), "head.nii.gz")


def test_a_scan_that_is_larger_than_the_grid_is_refused_or_fitted(tiny_pipeline):
    voxels = np.zeros((40, 40, 40), np.float32)
    voxels[2:-2, 2:-2, 2:-2] = np.random.default_rng(0).uniform(0.3, 1, (36, 36, 36))
    scan = read_scan(nifti_bytes(voxels, np.diag([12.0, 12.0, 12.0, 1.0])), "head.nii.gz")
    with pytest.raises(ValueError, match="this scan: anatomy of .* would be cut off"):
        prepare_scan(scan, tiny_pipeline)
    assert prepare_scan(scan, tiny_pipeline, "crop").shape == (1, 16, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("young", seed=-1), "seed must be a whole number from 0"),
        (Settings("lion"), "unknown class 'lion'"),
        (Settings("young", sampler="magic"), "'magic' is no sampler of this checkpoint"),
        (Settings("young", num_inference_steps=0), "num_inference_steps must be"),
        (Settings("young", conditions={"age": 1}), "takes no conditions"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tiny_pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_pipeline, settings)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3"])
def test_conditions_that_are_no_object_are_refused(text):
    with pytest.raises(ValueError, match="the conditions"):
        work.parse_conditions(text)


def test_conditions_are_read_from_json():
    assert work.parse_conditions(' {"age": 0.5}') == {"age": 0.5} and work.parse_conditions(" ") is None


@pytest.mark.skipif(find_spec("ipyniivue") is None, reason="needs the extra app")
def test_the_viewer_comes_out_of_the_installed_package():
    module = niivue_module()
    assert len(module) > 10**6 and module.rstrip(";\n").endswith("}")
    assert "Niivue" in module.rpartition("export{")[2]
