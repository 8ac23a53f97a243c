"""Two modalities as channels through every script: prepare, all four stages, evaluation, pictures and NIfTI files."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import trees
from conftest import run_example
from diffusers_med3d import MedDiffusion3DPipeline, SliceReward, VolumeReward
from diffusers_med3d.data import prepare, settings_of

pytestmark = pytest.mark.slow

QUIET = ("--report_to", "none", "--bf16", "false")
ONE_STEP = (*QUIET, "--max_steps", 1, "--save_steps", 1, "--per_device_train_batch_size", 2)
GENERATOR = ("--channels", 8, 16, "--num_head_channels", 8, "--copies", 1, "--norm_num_groups", 4)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *flags: object) -> None:
    run_example(monkeypatch, f"{name}.py", *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data, autoencoder, generators, both rewards and the fine-tuned generator, all of one step."""
    folder = tmp_path_factory.mktemp("two-channels")
    data = folder / "data"
    source = trees.brats(folder / "brats", people=6)
    scans = ("--data_dir", data, "--split_file", data / "split.json")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "prepare_dataset", "--layout", "brats2019", "--input", source, "--output", data,
            "--modalities", "t1", "t2", "--volume_shape", 16, 16, 16, "--validation_share", 0.34,
            "--num_proc", 1)  # fmt: skip
        run(patch, "train_autoencoder", *scans, "--output_dir", folder / "autoencoder", *ONE_STEP,
            "--channels", 8, 8, "--latent_channels", 4, "--crop_size", 16, "--adversarial_start", 0)  # fmt: skip
        for part in ("train", "a", "b"):
            run(patch, "train_diffusion", *scans, "--output_dir", folder / f"generator-{part}", *ONE_STEP, *GENERATOR,
                "--autoencoder", folder / "autoencoder", "--part", part, "--eval_inference_steps", 2,
                "--eval_samples", 3 if part == "train" else 0)  # fmt: skip
        for architecture in ("3d", "2d"):
            run(patch, "train_reward", *scans, "--output_dir", folder / f"reward-{architecture}", *ONE_STEP,
                "--architecture", architecture, "--spectrum_dir", folder / "spectrum", "--spectrum_steps", 2,
                "--strengths", 0, 0.5, 1, "--channels", 8, 16, "--norm_num_groups", 4, "--num_members", 1,
                "--fold_a_model", folder / "generator-a", "--fold_b_model", folder / "generator-b",
                "--model_name_or_path", folder / "generator-train")  # fmt: skip
        run(patch, "ppo_finetune", "--model_name_or_path", folder / "generator-train", "--output_dir", folder / "tuned",
            "--reward_funcs", folder / "reward-3d", folder / "reward-2d", *QUIET, "--max_steps", 1, "--save_steps", 1,
            "--per_device_train_batch_size", 4, "--steps_per_generation", 1, "--num_generations", 2,
            "--num_inference_steps", 4, "--sde_window_size", 2, "--eval_num_inference_steps", 2,
            "--eval_volumes", 2)  # fmt: skip
    return folder


def test_every_model_knows_both_channels_and_how_they_were_made(trained):
    known = json.loads((trained / "data" / "dataset.json").read_text())
    assert known["channel_names"] == ["t1", "t2"]
    for name in ("generator-train", "tuned"):
        pipeline = MedDiffusion3DPipeline.from_pretrained(trained / name)
        assert pipeline.vae.config.in_channels == pipeline.vae.config.out_channels == 2
        assert {one: settings_of(pipeline).to_dict()[one] for one in known} == known
        volumes = pipeline(class_labels=["HGG"], num_inference_steps=2).volumes
        assert volumes.shape == (1, 2, 16, 16, 16) and not torch.equal(volumes[:, 0], volumes[:, 1])


@pytest.mark.parametrize(("name", "kind"), [("reward-3d", VolumeReward), ("reward-2d", SliceReward)])
def test_a_reward_sees_both_channels_and_refuses_one(trained, name, kind):
    reward = kind.from_pretrained(str(trained / name))
    assert {one: settings_of(reward.model).to_dict()[one] for one in ("channel_names", "label_column")} == {
        "channel_names": ["t1", "t2"],
        "label_column": "grade",
    }
    volumes = torch.rand(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    score = float(reward(volumes)[0])
    for channel in range(2):
        other = volumes.clone()
        other[:, channel] = 0.5 * other[:, channel].flip(2)
        assert float(reward(other)[0]) != score
    with pytest.raises(ValueError, match="channel"):
        reward(volumes[:, :1])


def test_a_scan_of_two_channels_comes_back_as_a_file_of_four_axes_that_overlays_it(trained, tmp_path):
    pipeline = MedDiffusion3DPipeline.from_pretrained(trained / "tuned")
    path = sorted((trained / "data" / "images").iterdir())[0]
    scan = prepare(path, like=pipeline)
    (saved,) = pipeline(volumes=scan, strength=0.5, num_inference_steps=2).save_nifti(tmp_path)
    image = nibabel.load(saved)
    assert image.shape == (16, 16, 16, 2)
    np.testing.assert_allclose(image.affine, scan.affine)
    assert prepare(saved, like=pipeline).shape == scan.shape == (2, 16, 16, 16)


@pytest.mark.long
def test_generators_of_two_channels_are_compared_and_drawn(trained, tmp_path, monkeypatch):
    scans = ("--data_dir", trained / "data", "--split_file", trained / "data" / "split.json")
    models = ("--model_name_or_path", trained / "generator-train", trained / "tuned")
    run(monkeypatch, "evaluate", *scans, *models, "--output_dir", tmp_path / "report", "--num_samples", 4,
        "--num_inference_steps", 2, "--num_resamples", 10, "--extractors", "efficientnet-lite0",
        "--segmenter", "intensity")  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    text = (tmp_path / "report" / "report.md").read_text()
    assert report["models"] == ["generator-train", "tuned"]
    for row in ("KID tri-planar", "MS-SSIM, closest pair", "sharpness", "left-right symmetry", "copies flagged"):
        assert row in text
    assert len(list((tmp_path / "report").glob("*.png"))) >= 4
    run(monkeypatch, "generate", *models, *scans, "--output_dir", tmp_path / "made", "--num_samples", 1,
        "--num_inference_steps", 2)  # fmt: skip
    assert (tmp_path / "made" / "samples.png").stat().st_size > 1000
    files = sorted((tmp_path / "made").rglob("*.nii.gz"))
    assert len(files) == 4 and all(nibabel.load(path).shape == (16, 16, 16, 2) for path in files)
