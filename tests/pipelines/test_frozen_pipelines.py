"""A tiny MAISI pipeline that version 0.1 wrote, under tests/frozen_maisi: every later version gives equal outputs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from conftest import REPOSITORY
from diffusers_med3d import (
    AutoencoderKLMaisi3D,
    DiffusionUNetMaisi3D,
    MedDiffusion3DPipeline,
)
from diffusers_med3d.schedulers.flow import flow_scheduler
from make_frozen import random_weights

MAISI = REPOSITORY / "tests" / "frozen_maisi" / "0.1"
MAISI_CALL = {
    "class_labels": ["mri", None],
    "conditions": {"top_region": "head", "bottom_region": ["chest", "pelvis"], "age": [0.2, 0.9]},
    "spacing": (1.0, 1.5, 2.0),
    "num_inference_steps": 3,
}
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
    save_file(inputs | outputs(folder, inputs), folder / "expected.safetensors")


@torch.no_grad()
def outputs(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pipeline = MedDiffusion3DPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    call = MAISI_CALL | {"latents": inputs["sample"], "guidance_scale": 1.5, "output_type": "latent"}
    return {
        "encode_latents": pipeline.vae.encode_latents(inputs["volumes"]),
        "decode_latents": pipeline.vae.decode_latents(inputs["sample"]),
        "latents": pipeline(**call).volumes,
    }


def test_a_frozen_pipeline_gives_the_outputs_it_gave_when_it_was_made():
    expected = load_file(MAISI / "expected.safetensors")
    inputs = {name: expected.pop(name) for name in ("volumes", "sample")}
    found = outputs(MAISI, inputs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert expected[name].std() > 20 * TOLERANCE, name
        assert_close(value, expected[name], rtol=0, atol=TOLERANCE)


def test_the_frozen_maisi_pipeline_names_classes_not_modules():
    index = json.loads((MAISI / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers_med3d", "AutoencoderKLMaisi3D"]
    assert index["unet"] == ["diffusers_med3d", "DiffusionUNetMaisi3D"]
    assert index["class_names"] == {"ct": 1, "mri": 3}
