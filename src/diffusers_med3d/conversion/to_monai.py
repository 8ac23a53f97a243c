"""A pipeline to definitions and weights that MONAI's classes take."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_folder
from ..models import AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D, VQModel3D
from ..pipeline import MedDiffusion3DPipeline
from .convert import LAST_LAYER
from .networks import BETA_SCHEDULES, Autoencoder, Scheduler, UNet

MAISI_NETWORKS = "monai.apps.generation.maisi.networks"

ZERO_TERMINAL_SNR = (
    "a = scheduler.alphas_cumprod.sqrt(); scheduler.alphas_cumprod = ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2"
)
"""How MONAI's DDIMScheduler gets a schedule that ends in pure noise: Lin et al. 2023, arXiv 2305.08891, algorithm 1."""

TIMESTEPS = {
    "trailing": "scheduler.timesteps = (T - torch.arange(N) * T / N).round().long() - 1",
    "leading": "scheduler.timesteps = torch.arange(N).flip(0) * (T // N) + scheduler.steps_offset",
}
"""How it gets N of T timesteps as diffusers spaces them, after `set_timesteps(N)`."""

UNKNOWN_TO_MONAI = (
    "trained_betas", "thresholding",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "shift_terminal", "stochastic_sampling",
)  # fmt: skip
"""Options of diffusers' schedulers for a diffusion (first line) and a flow (second)."""


def to_monai_state_dict(model: Autoencoder | UNet, flow: bool = False) -> dict[str, Tensor]:
    """State dict for the MONAI class and arguments of `to_monai_definition`.

    Args:
        model: one of our networks. Latent statistics are config, not weights: `save_monai_bundle` takes care of them.
        flow: the UNet is that of a rectified flow, whose velocity has the other sign in MONAI.

    Raises:
        ValueError: a network that MONAI does not have (``sample_skip``, ``sample_gate``, atlas), or one with LoRA.
    """
    for name in ("sample_skip", "sample_gate", "num_modes", "position_shape", "precondition"):
        if isinstance(model, DiffusionUNet3D) and model.config[name]:
            raise ValueError(f"MONAI's DiffusionModelUNet has no {name}, so these weights mean nothing to it.")
    if model.config.get("atlas_shape") is not None:
        raise ValueError("MONAI has no atlas of latents, so its classes would not know these latents.")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the network carries LoRA adapters; fuse or unload them first.")
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    if flow:
        for key in LAST_LAYER:
            state[key] = -state[key]
    return state


def to_monai_definition(model: Autoencoder | UNet) -> dict[str, Any]:
    """MONAI's class as ``_target_`` and its arguments, as they stand in a bundle's config."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    ours = {"latents_mean", "latents_std", "atlas_shape", "sample_skip", "sample_gate", "num_modes", "mode_shape"}
    for name in ours | {"position_shape", "precondition"}:
        config.pop(name, None)
    definition: dict[str, Any] = {"spatial_dims": 3, **config}
    if isinstance(model, VQModel3D):
        levels = len(config["channels"])
        definition["downsample_parameters"] = [[2, 4, 1, 1]] * levels
        definition["upsample_parameters"] = [[2, 4, 1, 1, 0]] * levels
        target = "monai.networks.nets.VQVAE"
    elif isinstance(model, AutoencoderKLMaisi3D):
        target = f"{MAISI_NETWORKS}.autoencoderkl_maisi.AutoencoderKlMaisi"
    elif isinstance(model, DiffusionUNetMaisi3D):
        names = definition.pop("context_names") or []
        definition["in_channels"] += len(names) if definition.pop("concat_context") else 0
        definition["with_conditioning"] = bool(names)
        definition["cross_attention_dim"] = len(names) or None
        for name in ("top_region_index", "bottom_region_index"):
            definition[f"include_{name}_input"] = config["include_region"]
        definition["include_spacing_input"] = config["include_spacing"]
        del definition["include_region"], definition["include_spacing"]
        target = f"{MAISI_NETWORKS}.diffusion_model_unet_maisi.DiffusionModelUNetMaisi"
    elif isinstance(model, DiffusionUNet3D):
        target = "monai.networks.nets.DiffusionModelUNet"
    else:
        target = "monai.networks.nets.AutoencoderKL"
    if target.startswith(MAISI_NETWORKS):
        definition["num_channels"] = definition.pop("channels")
    return {"_target_": target, **{key: _plain(value) for key, value in definition.items()}}


def scheduler_definition(scheduler: Scheduler, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """MONAI's scheduler for a pipeline's, with the same noise schedule, prediction type and clipping, but for what
    `scheduler_lines` says.

    Raises:
        ValueError: a scheduler or an option that MONAI does not have.
    """
    config = scheduler.config
    unknown = {name: config[name] for name in UNKNOWN_TO_MONAI if config.get(name)}
    if unknown:
        raise ValueError(f"MONAI's schedulers have nothing like {unknown} of {type(scheduler).__name__}.")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        definition = {"num_train_timesteps": config.num_train_timesteps, "use_discrete_timesteps": False}
        if config.shift != 1:  # for MONAI the shift is a ratio of sides, here to those of this base size
            base = math.prod(latent_shape) / config.shift**3
            definition |= {"use_timestep_transform": True, "base_img_size_numel": base}
        return {"_target_": "monai.networks.schedulers.RFlowScheduler", **definition}
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        raise ValueError(f"{type(scheduler).__name__} has no counterpart in MONAI; set DDIM, DDPM or flow matching.")
    names = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}
    if config.beta_schedule not in names:
        raise ValueError(f"the noise schedule {config.beta_schedule!r} has no counterpart in MONAI's configs.")
    definition = {
        "num_train_timesteps": config.num_train_timesteps,
        "schedule": names[config.beta_schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": config.prediction_type,
        "clip_sample": config.clip_sample,
        "clip_sample_min": -config.clip_sample_range,
        "clip_sample_max": config.clip_sample_range,
    }
    if isinstance(scheduler, DDIMScheduler):
        offset = config.steps_offset if config.timestep_spacing == "leading" else 0  # else diffusers does not use it
        definition |= {"set_alpha_to_one": config.set_alpha_to_one, "steps_offset": offset}
        return {"_target_": "monai.networks.schedulers.DDIMScheduler", **definition}
    if config.variance_type not in ("fixed_small", "fixed_large") or config.rescale_betas_zero_snr:
        raise ValueError(
            f"a DDPMScheduler with variance_type={config.variance_type!r}, rescale_betas_zero_snr="
            f"{config.rescale_betas_zero_snr} has no counterpart in MONAI; set a DDIMScheduler."
        )
    return {"_target_": "monai.networks.schedulers.DDPMScheduler", **definition, "variance_type": config.variance_type}


def scheduler_lines(scheduler: Scheduler) -> list[str]:
    """Python that makes of MONAI's DDIMScheduler what a config cannot say: schedule and timesteps of this one."""
    if not isinstance(scheduler, DDIMScheduler):
        return []
    schedule = [ZERO_TERMINAL_SNR] if scheduler.config.rescale_betas_zero_snr else []
    spacing = scheduler.config.timestep_spacing
    return schedule + ([TIMESTEPS[spacing]] if spacing in TIMESTEPS else [])


def save_monai_bundle(pipeline: MedDiffusion3DPipeline, folder: str | os.PathLike) -> Path:
    """Write ``configs/inference.json`` and ``models/*.safetensors``, which `read_bundle` and MONAI's classes take.

    MONAI multiplies latents by one ``scale_factor``. Where the pipeline has statistics per channel they go into the
    first and last 1x1x1 convolutions around the latent, which changes no volume, and the factor becomes 1. Warns where
    MONAI's scheduler, as a config makes it, would give other volumes.

    Raises:
        ValueError: something that MONAI does not have.
        FileExistsError: the folder is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already.")
    flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    latent_shape = pipeline.vae.latent_shape(pipeline.config.volume_shape)
    vae_state = to_monai_state_dict(pipeline.vae)
    unet_state = to_monai_state_dict(pipeline.unet, flow)
    mean, std = pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std
    if any(mean) or len(set(std)) > 1:
        _fold_statistics(pipeline.vae, vae_state)
        std = [1.0]
    config = {
        "spacing": list(pipeline.config.spacing),
        "latent_shape": [pipeline.vae.latent_channels, *latent_shape],
        "scale_factor": 1 / std[0],
        "autoencoder_def": to_monai_definition(pipeline.vae),
        "network_def": to_monai_definition(pipeline.unet),
        "noise_scheduler": scheduler_definition(pipeline.scheduler, latent_shape),
        "load_autoencoder_path": "models/autoencoder.safetensors",
        "load_diffusion_path": "models/diffusion.safetensors",
    }
    if pipeline.unet.config.get("context_names"):
        config["conditioning"] = ", ".join(f"@{name}" for name in pipeline.unet.config.context_names)
    if not flow:
        for name in ("timestep_spacing", "rescale_betas_zero_snr"):
            config[name] = pipeline.scheduler.config[name]
    lines = scheduler_lines(pipeline.scheduler)
    if lines:
        config["scheduler_lines"] = lines
        warnings.warn(
            "MONAI's configs cannot say all of this pipeline's scheduler, so that it would give other volumes. After "
            "scheduler.set_timesteps(N), T being scheduler.num_train_timesteps, write: " + "; ".join(lines),
            stacklevel=2,
        )
    with whole_folder(folder) as written:
        (written / "configs").mkdir(parents=True)
        (written / "models").mkdir()
        (written / "configs" / "inference.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(vae_state, written / config["load_autoencoder_path"])
        save_file(unet_state, written / config["load_diffusion_path"])
    return folder


def _fold_statistics(vae: Autoencoder, state: dict[str, Tensor]) -> None:
    """Make the weights encode to and decode from normalised latents."""
    if isinstance(vae, VQModel3D):
        raise ValueError(
            "MONAI knows one scale factor for the whole latent; this VQModel3D has a mean or standard deviations per "
            "channel, which cannot go into its codebook."
        )
    for name in ("quant_conv_mu", "quant_conv_log_sigma", "post_quant_conv"):
        for part in ("weight", "bias"):
            state[f"{name}.conv.{part}"] = state[f"{name}.conv.{part}"].float()  # of a half precision pipeline
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    rows = std.view(-1, 1, 1, 1, 1)
    state["quant_conv_mu.conv.weight"] /= rows
    state["quant_conv_mu.conv.bias"] = (state["quant_conv_mu.conv.bias"] - mean) / std
    state["quant_conv_log_sigma.conv.bias"] -= 2 * std.log()
    weight = state["post_quant_conv.conv.weight"]  # (out, in, 1, 1, 1)
    state["post_quant_conv.conv.bias"] += weight.flatten(1) @ mean
    state["post_quant_conv.conv.weight"] = weight * std.view(1, -1, 1, 1, 1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
