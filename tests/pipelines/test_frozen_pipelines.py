"""Tiny pipelines that version 0.1 wrote: every later version gives equal outputs. Under tests/frozen_maisi a MAISI
pipeline, under tests/frozen_modes one of the format of brain-t1 (atlas, principal components, skip, gate, a schedule
that ends in pure noise)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import REPOSITORY
from diffusers_med3d import (
    AutoencoderKL3D,
    AutoencoderKLMaisi3D,
    DiffusionUNet3D,
    DiffusionUNetMaisi3D,
    MedDiffusion3DPipeline,
)
from diffusers_med3d.schedulers.flow import flow_scheduler
from diffusers_med3d.trainers.diffusion import default_scheduler
from make_frozen import random_weights

MAISI, MODES = (REPOSITORY / "tests" / name / "0.1" for name in ("frozen_maisi", "frozen_modes"))
MAISI_CALL = {
    "class_labels": ["mri", None],
    "conditions": {"top_region": "head", "bottom_region": ["chest", "pelvis"], "age": [0.2, 0.9]},
    "spacing": (1.0, 1.5, 2.0),
    "num_inference_steps": 3,
}
MODES_CALL = {"class_labels": ["old", None], "num_inference_steps": 4}

TOLERANCE = 1e-4  # absolute, in float32: what other kernels and thread counts may change


def make_maisi(folder: Path) -> None:
    """How it was made, on 2026-11-22: fp16 files, random weights."""
    vae = AutoencoderKLMaisi3D(
        channels=(4, 4, 4), latent_channels=4, num_res_blocks=(1, 1, 1), norm_num_groups=2, num_splits=2,
        latents_mean=[0.0] * 4, latents_std=[0.9] * 4,
    )  # fmt: skip
    unet = DiffusionUNetMaisi3D(
        channels=(4, 8), num_res_blocks=1, attention_levels=(False, True), num_head_channels=4, norm_num_groups=2,
        resblock_updown=True, num_class_embeds=4, include_region=True, context_names=["age"], concat_context=True,
    )  # fmt: skip
    pipeline = MedDiffusion3DPipeline(
        random_weights(vae, 11), random_weights(unet, 12), flow_scheduler(shift=1.5), volume_shape=(16, 32, 16),
        class_names={"ct": 1, "mri": 3}, intensity="random",
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "pipeline")
    inputs = {"volumes": torch.rand(1, 1, 16, 32, 16), "sample": torch.randn(2, 4, 4, 8, 4)}
    save_file(inputs | outputs(folder, inputs, MAISI_CALL), folder / "expected.safetensors")


def make_modes(folder: Path) -> None:
    """How it was made, on 2026-11-23: fp16 files, random weights."""
    vae = random_weights(AutoencoderKL3D(channels=(4, 4, 4), latent_channels=4, norm_num_groups=2), 21)
    vae.set_latent_statistics(torch.zeros(4), torch.full((4,), 0.8), torch.randn(4, 4, 4, 4))
    unet = DiffusionUNet3D(
        4, 4, (4, 8), 1, (False, True), 4, 4, num_class_embeds=4, sample_skip=True, sample_gate=True, num_modes=2,
        mode_shape=(4, 4, 4),
    )  # fmt: skip
    random_weights(unet, 22).set_modes(torch.randn(5, 4, 4, 4, 4))
    pipeline = MedDiffusion3DPipeline(
        vae, unet, default_scheduler(), volume_shape=(16, 16, 16), class_names=("young", "middle", "old"),
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "pipeline")
    inputs = {"volumes": torch.rand(1, 1, 16, 16, 16), "sample": torch.randn(2, 4, 4, 4, 4)}
    save_file(inputs | outputs(folder, inputs, MODES_CALL), folder / "expected.safetensors")


@torch.no_grad()
def outputs(folder: Path, inputs: dict[str, torch.Tensor], call: dict[str, Any]) -> dict[str, torch.Tensor]:
    pipeline = MedDiffusion3DPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    call = call | {"latents": inputs["sample"], "guidance_scale": 1.5, "output_type": "latent"}
    return {
        "encode_latents": pipeline.vae.encode_latents(inputs["volumes"]),
        "decode_latents": pipeline.vae.decode_latents(inputs["sample"]),
        "latents": pipeline(**call).volumes,
    }


@pytest.mark.parametrize(("folder", "call"), [(MAISI, MAISI_CALL), (MODES, MODES_CALL)], ids=["maisi", "brain-t1"])
def test_a_frozen_pipeline_gives_the_outputs_it_gave_when_it_was_made(folder, call):
    expected = load_file(folder / "expected.safetensors")
    inputs = {name: expected.pop(name) for name in ("volumes", "sample")}
    found = outputs(folder, inputs, call)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert expected[name].std() > 20 * TOLERANCE, name
        assert_close(value, expected[name], rtol=0, atol=TOLERANCE)


def test_the_frozen_maisi_pipeline_names_classes_not_modules():
    index = json.loads((MAISI / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers_med3d", "AutoencoderKLMaisi3D"]
    assert index["unet"] == ["diffusers_med3d", "DiffusionUNetMaisi3D"]
    assert index["class_names"] == {"ct": 1, "mri": 3}
