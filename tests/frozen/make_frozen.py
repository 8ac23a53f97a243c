"""How the frozen checkpoints were made. tests/test_frozen.py requires every later version to load them with equal
outputs, so they are never made again: this script refuses a folder that exists. A format that is new gets a folder of
its own, named after the version that brought it:

    python tests/frozen/make_frozen.py 0.1

(0.1: made on 2026-11-22 by version 0.1.0 with torch 2.13, diffusers 0.42.1, MONAI 1.6.1, peft 0.21.2, on a CPU.)

Weights are random: they stand for no training. Pipelines are stored in fp16, as bundled checkpoints are, and computed
in fp32; single models are fp32.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from safetensors.torch import save_file

from diffusers_med3d import (
    AutoencoderKL3D,
    DiffusionUNet3D,
    MedDiffusion3DPipeline,
    SliceRewardModel,
    VolumeRewardModel,
    VQModel3D,
)
from diffusers_med3d.pipelines.lora import write_lora
from diffusers_med3d.schedulers.flow import flow_scheduler
from diffusers_med3d.trainers.lora import add_lora

STATISTICS = {"latents_mean": [-0.2, 0.0, 0.1, 0.3], "latents_std": [0.5, 1.0, 0.7, 0.8]}


def random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Small weights everywhere, also where MONAI starts at zero, so that outputs depend on every layer."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_unet(seed: int, sample_skip: bool) -> DiffusionUNet3D:
    unet = DiffusionUNet3D(
        4, 4, (4, 8), 1, (False, True), 4, 4, num_class_embeds=4, sample_skip=sample_skip,
    )  # fmt: skip
    return random_weights(unet, seed)


def make_pipeline(folder: Path, unet: DiffusionUNet3D, scheduler: object) -> None:
    vae = AutoencoderKL3D(channels=(4, 4, 4), latent_channels=4, norm_num_groups=2, **STATISTICS)
    pipeline = MedDiffusion3DPipeline(
        random_weights(vae, 1), unet, scheduler, volume_shape=(16, 16, 16), spacing=(12.0, 12.0, 12.0),
        class_names=("young", "middle", "old"), channel_names=("t1",), intensity="random",
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def make(folder: Path) -> None:
    """Every class of version 0.1 with inputs and outputs."""
    folder.mkdir()
    ddim = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    make_pipeline(folder / "pipeline", make_unet(2, sample_skip=False), ddim)
    make_pipeline(folder / "flow-pipeline", make_unet(3, sample_skip=True), flow_scheduler(shift=3.0))
    vq = VQModel3D(
        channels=(4, 4), num_res_layers=1, num_res_channels=(4, 4), num_embeddings=16, embedding_dim=4, **STATISTICS
    )
    random_weights(vq, 4).save_pretrained(folder / "vq-model")
    random_weights(VolumeRewardModel(channels=(4, 4), norm_num_groups=2), 5).save_pretrained(folder / "volume-reward")
    random_weights(SliceRewardModel(channels=(4, 4), norm_num_groups=2), 6).save_pretrained(folder / "slice-reward")
    unet = DiffusionUNet3D.from_pretrained(folder / "pipeline", subfolder="unet")
    add_lora(unet, LoraConfig(r=1, lora_alpha=2, target_modules=r".*(to_q|to_v|conv1\.conv)"))
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    write_lora(unet, folder / "lora", "default")

    torch.manual_seed(7)
    inputs = {
        "volumes": torch.rand(2, 1, 16, 16, 16) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1, 1),
        "sample": torch.randn(2, 4, 4, 4, 4),
        "timestep": torch.tensor([17, 801]),
        "class_labels": torch.tensor([0, 3]),
    }
    save_file(inputs | outputs(folder, inputs), folder / "expected.safetensors")


@torch.no_grad()
def outputs(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the checkpoints in `folder` give for `inputs`, by name of class; tests/test_frozen.py compares."""
    kl = AutoencoderKL3D.from_pretrained(folder / "pipeline", subfolder="vae")
    vq = VQModel3D.from_pretrained(folder / "vq-model")
    result = {}
    for name, model in (("AutoencoderKL3D", kl), ("VQModel3D", vq)):
        result[f"{name}/encode_latents"] = model.encode_latents(inputs["volumes"])
        result[f"{name}/decode_latents"] = model.decode_latents(inputs["sample"])
    for name in ("pipeline", "flow-pipeline"):
        unet = DiffusionUNet3D.from_pretrained(folder / name, subfolder="unet")
        prediction = unet(inputs["sample"], inputs["timestep"], inputs["class_labels"]).sample
        result[f"DiffusionUNet3D/{name}"] = prediction
        pipeline = MedDiffusion3DPipeline.from_pretrained(folder / name)
        pipeline.set_progress_bar_config(disable=True)
        call = {"class_labels": [0, None], "latents": inputs["sample"], "num_inference_steps": 4, "guidance_scale": 1.5}
        result[f"MedDiffusion3DPipeline/{name}"] = pipeline(**call).volumes
        result[f"MedDiffusion3DPipeline/{name}/latents"] = pipeline(**call, output_type="latent").volumes
        if name == "pipeline":
            pipeline.load_lora_weights(folder / "lora")
            result["MedDiffusion3DPipeline/lora/latents"] = pipeline(**call, output_type="latent").volumes
    for model_class, name in ((VolumeRewardModel, "volume-reward"), (SliceRewardModel, "slice-reward")):
        result[model_class.__name__] = model_class.from_pretrained(folder / name)(inputs["volumes"])
    return {name: value.contiguous() for name, value in result.items()}


def main(version: str) -> None:
    """Make the folder of a version, or stop when there is one."""
    target = Path(__file__).parent / version
    if target.exists():
        sys.exit(f"{version} is frozen and is never made again; give a new version.")
    make(target)


if __name__ == "__main__":
    main(sys.argv[1])
