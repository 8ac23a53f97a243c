"""How the frozen checkpoints were made. tests/test_frozen.py requires every later version to load them with equal
outputs, so they are never made again: this script refuses a folder that exists. A format that is new gets a folder of
its own, named after the version that brought it:

    python tests/frozen/make_frozen.py 0.2

0.1: made on 2026-11-22 by version 0.1.0 with torch 2.13, diffusers 0.42.1, MONAI 1.6.1, peft 0.21.2, on a CPU; the
script is in git at commit 9bca24f. Its flow-pipeline has a sample_skip, which later versions refuse.
0.2: made on 2026-11-30 with the same libraries: a preconditioned flow with position maps and an atlas, and a witness
reward.

Weights are random: they stand for no training. Pipelines are stored in fp16, as bundled checkpoints are, and computed
in fp32; single models are fp32.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_med3d import (
    AutoencoderKL3D,
    DiffusionUNet3D,
    MedDiffusion3DPipeline,
    SliceRewardModel,
    VolumeRewardModel,
    VQModel3D,
    WitnessRewardModel,
)
from diffusers_med3d.schedulers.flow import flow_scheduler

REWARDS = {"volume-reward": VolumeRewardModel, "slice-reward": SliceRewardModel, "witness-reward": WitnessRewardModel}


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


def make(folder: Path) -> None:
    """What version 0.2 brought, with inputs and outputs."""
    folder.mkdir()
    vae = random_weights(AutoencoderKL3D(channels=(4, 4, 4), latent_channels=4, norm_num_groups=2), 31)
    vae.set_latent_statistics(torch.zeros(4), torch.full((4,), 0.8), torch.randn(4, 4, 4, 4))
    unet = DiffusionUNet3D(
        4, 4, (4, 8), 1, (False, True), 4, 4, num_class_embeds=4, position_shape=(4, 4, 4), precondition=True
    )
    random_weights(unet, 32).set_data_variance(torch.rand(4, 4, 4, 4) * 2)
    pipeline = MedDiffusion3DPipeline(
        vae, unet, flow_scheduler(), volume_shape=(16, 16, 16), spacing=(12.0, 12.0, 12.0),
        class_names=("young", "middle", "old"), channel_names=("t1",), intensity="random",
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "flow-pipeline")
    extractor = random_weights(SliceRewardModel(channels=(4, 4), norm_num_groups=2), 33)
    scans, samples = torch.rand(5, 1, 16, 16, 16), 0.5 * torch.rand(3, 1, 16, 16, 16)
    WitnessRewardModel.of_scans(extractor, scans, samples, buffer_size=4).save_pretrained(folder / "witness-reward")

    torch.manual_seed(34)
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
    result = {}
    kl = folder / ("pipeline" if (folder / "pipeline").is_dir() else "flow-pipeline") / "vae"
    for path, model_class in ((kl, AutoencoderKL3D), (folder / "vq-model", VQModel3D)):
        if path.is_dir():
            model = model_class.from_pretrained(path)
            result[f"{model_class.__name__}/encode_latents"] = model.encode_latents(inputs["volumes"])
            result[f"{model_class.__name__}/decode_latents"] = model.decode_latents(inputs["sample"])
    for name in pipelines(folder):
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
    for name, model_class in REWARDS.items():
        if (folder / name).is_dir():
            result[model_class.__name__] = model_class.from_pretrained(folder / name)(inputs["volumes"])
    return {name: value.contiguous() for name, value in result.items()}


def pipelines(folder: Path) -> list[str]:
    """The pipelines in the folder of a version that this version loads."""
    names = ("pipeline", "flow-pipeline")
    return [name for name in names if (folder / name).is_dir() and (folder.name, name) != ("0.1", "flow-pipeline")]


def main(version: str) -> None:
    """Make the folder of a version, or stop when there is one."""
    target = Path(__file__).parent / version
    if target.exists():
        sys.exit(f"{version} is frozen and is never made again; give a new version.")
    make(target)


if __name__ == "__main__":
    main(sys.argv[1])
