"""A tiny pipeline of the format of brain-t1 (atlas, principal components, skip, gate, a schedule that ends in pure
noise) that version 0.1 wrote, under tests/frozen_modes: every later version gives equal outputs."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, MedDiffusion3DPipeline
from diffusers_med3d.trainers.diffusion import default_scheduler

TESTS = Path(__file__).parent
FOLDER = TESTS / "frozen_modes" / "0.1"

TOLERANCE = 1e-4  # absolute, in float32: what other kernels and thread counts may change

sys.path.insert(0, str(TESTS / "frozen"))
from make_frozen import random_weights  # noqa: E402


def make(folder: Path) -> None:
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
    save_file(inputs | outputs(folder, inputs), folder / "expected.safetensors")


@torch.no_grad()
def outputs(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pipeline = MedDiffusion3DPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": ["old", None], "latents": inputs["sample"], "guidance_scale": 1.5, "output_type": "latent"}
    return {
        "encode_latents": pipeline.vae.encode_latents(inputs["volumes"]),
        "decode_latents": pipeline.vae.decode_latents(inputs["sample"]),
        "latents": pipeline(**call, num_inference_steps=4).volumes,
    }


def test_a_frozen_pipeline_of_the_format_of_brain_t1_gives_the_outputs_it_gave_when_it_was_made():
    expected = load_file(FOLDER / "expected.safetensors")
    inputs = {name: expected.pop(name) for name in ("volumes", "sample")}
    for name, value in outputs(FOLDER, inputs).items():
        assert expected[name].std() > 20 * TOLERANCE, name
        assert_close(value, expected[name], rtol=0, atol=TOLERANCE)
