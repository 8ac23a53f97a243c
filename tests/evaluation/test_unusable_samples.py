"""Samples that cannot be judged are counted and named, and the rest is judged: docs/reliability.md."""

import json
import warnings

import numpy as np
import pytest
import torch

from conftest import SPLIT
from diffusers_med3d import evaluation
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.evaluation.breakdown import scan_versions
from diffusers_med3d.evaluation.evaluate import evaluate
from diffusers_med3d.evaluation.sampling import volume_file
from diffusers_med3d.evaluation.volume_set import LeftOut, VolumeSet
from diffusers_med3d.metrics.features import NamedExtractor

pytestmark = pytest.mark.slow

coarse = NamedExtractor(lambda volumes: torch.nn.functional.avg_pool3d(volumes, 4).flatten(1), "coarse")


@pytest.fixture
def data(brains_folder, tmp_path) -> DataArguments:
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    return DataArguments(brains_folder, str(tmp_path / "split.json"), [16] * 3, [12.0] * 3)


def sample(pipeline, data, folder, count=2, batch_size=8):
    labels = [0] * count + [1] * count + [2] * count
    return evaluation.sample_volumes(pipeline, labels, folder, data, num_inference_steps=1, batch_size=batch_size)


def test_a_sample_of_nan_is_left_out_now_and_at_every_later_try_and_the_rest_is_judged(data, tiny_pipeline, tmp_path):
    honest, calls = tiny_pipeline.decode_latents, []

    def broken(latents, chunk_size=4):
        volumes = honest(latents, chunk_size)
        calls.append(len(volumes))
        if len(calls) == 1:
            volumes[1] = torch.nan
            volumes[3] = 0.0
        return volumes

    tiny_pipeline.decode_latents = broken
    for _ in range(2):  # the second time all samples are read from the folder
        with pytest.warns(UserWarning, match="2 of 6 volumes of the folder samples cannot be judged and are left out"):
            found = sample(tiny_pipeline, data, tmp_path / "samples")
    assert calls == [6] and len(found) == 4 and found.labels == [0, 1, 2, 2]
    assert [(one.row, one.name, one.label) for one in found.left_out] == [
        (1, "seed0-class0-0001", 0),
        (3, "seed0-class1-0001", 1),
    ]
    assert "4096 NaN" in found.left_out[0].reason and "is empty" in found.left_out[1].reason
    reference = evaluation.volume_set(VolumeDataset.from_arguments(data, "validation"))
    train = evaluation.volume_set(VolumeDataset.from_arguments(data, "train"))
    report = evaluate({"mine": found}, reference, train, [coarse], (12.0,) * 3, num_resamples=20)
    assert report.counts["mine"]["volumes"] == 4 and report.counts["mine"]["left_out"] == 2
    assert any("2 of 6 volumes of mine cannot be judged" in note for note in report.notes)
    assert "left_out" not in report.counts["reference"]
    assert np.isfinite(report.figure("KID", "coarse").sets["mine"].value)


def test_a_version_of_a_scan_that_is_nan_is_counted_in_the_breakdown_and_bears_the_subject_of_its_scan(
    data, tiny_pipeline, tmp_path
):
    scans = evaluation.volume_set(VolumeDataset.from_arguments(data, "validation"))
    honest, calls = tiny_pipeline.decode_latents, []

    def broken(latents, chunk_size=4):
        volumes = honest(latents, chunk_size)
        if not calls:  # the round trips
            volumes[1] = torch.nan
        calls.append(len(volumes))
        return volumes

    tiny_pipeline.decode_latents = broken
    with pytest.warns(UserWarning, match="1 of 3 volumes of the folder round-trips cannot be judged"):
        versions = scan_versions(tiny_pipeline, scans, tmp_path / "versions", data, (0.5,), num_inference_steps=2)
    rounded = versions["round-trips"]
    assert rounded.subjects == [scans.subjects[0], scans.subjects[2]] and rounded.left_out[0].row == 1
    assert len(versions["noised-0.5"]) == 3 and rounded.volumes.isfinite().all()


@pytest.mark.parametrize("damage", ["cut off", "no NIfTI", "empty file"])
def test_a_damaged_file_among_the_samples_is_left_out(data, tiny_pipeline, tmp_path, damage):
    sample(tiny_pipeline, data, tmp_path)
    path = volume_file(tmp_path, "seed0-class0-0000")
    content = path.read_bytes()
    path.write_bytes({"cut off": content[: len(content) // 2], "no NIfTI": b"text", "empty file": b""}[damage])
    with pytest.warns(UserWarning, match="1 of 6 volumes"):
        found = sample(tiny_pipeline, data, tmp_path)
    assert len(found) == 5 and found.left_out[0].name == "seed0-class0-0000"


def test_where_no_sample_can_be_judged_the_first_reason_is_told(data, tiny_pipeline, tmp_path):
    torch.nn.init.constant_(next(tiny_pipeline.unet.parameters()), torch.nan)
    with pytest.raises(ValueError, match="none of 6 volumes can be judged, the first because .* 4096 NaN"):
        sample(tiny_pipeline, data, tmp_path)


def test_a_class_of_which_nothing_is_left_is_refused_with_the_reason():
    def scans(name, labels, **more):
        torch.manual_seed(len(name))
        volumes = torch.rand(len(labels), 1, 16, 16, 16)
        return VolumeSet(volumes, labels, [f"{name}{i}" for i in range(len(labels))], **more)

    lost = tuple(LeftOut(row, f"s{row}", 1, "it holds NaN.") for row in (2, 3))
    samples = scans("s", [0, 0], left_out=lost)
    with pytest.raises(ValueError, match=r"no volume of class \[1\] is left: 2 of 4 volumes .* s2: it holds NaN"):
        evaluate({"mine": samples}, scans("r", [0, 0, 1, 1]), scans("tr", [0, 0, 1, 1]), [coarse], (3.0,) * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scans("r", [0, 0]).note("mine") == ""
