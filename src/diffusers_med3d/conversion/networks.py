"""Our networks and diffusers' schedulers from the definitions of MONAI's."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks import schedulers as monai_schedulers
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet

from ..models import AutoencoderKL3D, AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D, VQModel3D
from .definitions import Definition, full_arguments

Autoencoder = AutoencoderKL3D | AutoencoderKLMaisi3D | VQModel3D
UNet = DiffusionUNet3D | DiffusionUNetMaisi3D
Scheduler: TypeAlias = DDIMScheduler | DDPMScheduler | FlowMatchEulerDiscreteScheduler

BETA_SCHEDULES = {"linear_beta": "linear", "scaled_linear_beta": "scaled_linear"}


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)


def _check(name: str, arguments: dict, expected: dict) -> None:
    """Refuse arguments whose value our class does not have."""
    wrong = {key: arguments[key] for key, value in expected.items() if arguments[key] != value}
    if wrong:
        raise ValueError(
            f"{name} with {wrong} cannot be converted; expected { {key: expected[key] for key in wrong} }."
        )


def build_autoencoder(definition: Definition, without_fc: bool = False) -> Autoencoder:
    """The autoencoder, with random weights and no latent statistics.

    Args:
        without_fc: its attention has no last linear layer, whatever the definition says (GenerativeModels).
    """
    if definition.name == "VQVAE":
        a = full_arguments(definition, VQVAE)
        levels = len(a["channels"])
        for name, value in (("downsample_parameters", [2, 4, 1, 1]), ("upsample_parameters", [2, 4, 1, 1, 0])):
            single = all(isinstance(entry, int) for entry in a[name])
            a[name] = [list(entry) for entry in ([a[name]] * levels if single else a[name])]
            _check("VQVAE", a, {name: [value] * levels})
        _check("VQVAE", a, {"spatial_dims": 3, "dropout": 0.0, "output_act": None, "epsilon": 1e-5})
        if str(a["act"]).lower() not in ("relu", "act.relu"):
            raise ValueError(f"VQVAE with act={a['act']!r} cannot be converted; expected 'RELU'.")
        return VQModel3D(
            in_channels=a["in_channels"],
            out_channels=a["out_channels"],
            channels=list(a["channels"]),
            num_res_layers=a["num_res_layers"],
            num_res_channels=_per_level(a["num_res_channels"], levels),
            num_embeddings=a["num_embeddings"],
            embedding_dim=a["embedding_dim"],
            commitment_cost=a["commitment_cost"],
            decay=a["decay"],
        )
    maisi = definition.name == "AutoencoderKlMaisi"
    a = full_arguments(definition, AutoencoderKlMaisi if maisi else AutoencoderKL)
    _check(definition.name, a, {"spatial_dims": 3})
    channels = list(a["num_channels" if maisi else "channels"])
    shared = {
        "in_channels": a["in_channels"],
        "out_channels": a["out_channels"],
        "channels": channels,
        "latent_channels": a["latent_channels"],
        "num_res_blocks": _per_level(a["num_res_blocks"], len(channels)),
        "attention_levels": list(a["attention_levels"]),
        "norm_num_groups": a["norm_num_groups"],
        "norm_eps": float(a["norm_eps"]),
        "with_encoder_nonlocal_attn": a["with_encoder_nonlocal_attn"],
        "with_decoder_nonlocal_attn": a["with_decoder_nonlocal_attn"],
        "use_convtranspose": a["use_convtranspose"],
        "include_fc": a["include_fc"] and not without_fc,
    }
    if maisi:
        return AutoencoderKLMaisi3D(**shared, num_splits=a["num_splits"], dim_split=a["dim_split"])
    return AutoencoderKL3D(**shared)


def build_unet(
    definition: Definition,
    latent_channels: int,
    context_names: Sequence[str] | None = None,
    without_fc: bool = False,
) -> UNet:
    """The UNet, with random weights.

    Args:
        latent_channels: of the autoencoder; what the network takes beyond them must be its conditions, as maps.
        context_names: names for the numbers of the cross-attention.
        without_fc: its self-attention has no last linear layer, whatever the definition says (GenerativeModels).
    """
    maisi = definition.name == "DiffusionModelUNetMaisi"
    a = full_arguments(definition, DiffusionModelUNetMaisi if maisi else DiffusionModelUNet)
    _check(definition.name, a, {"spatial_dims": 3, "dropout_cattn": 0.0, "out_channels": latent_channels})
    channels = list(a["num_channels" if maisi else "channels"])
    shared = {
        "in_channels": latent_channels,
        "out_channels": a["out_channels"],
        "channels": channels,
        "num_res_blocks": _per_level(a["num_res_blocks"], len(channels)),
        "attention_levels": list(a["attention_levels"]),
        "num_head_channels": _per_level(a["num_head_channels"], len(channels)),
        "norm_num_groups": a["norm_num_groups"],
        "norm_eps": float(a["norm_eps"]),
        "resblock_updown": a["resblock_updown"],
        "include_fc": a["include_fc"] and not without_fc,
        "num_class_embeds": a["num_class_embeds"],
    }
    extra = a["in_channels"] - latent_channels
    if not maisi and not a["with_conditioning"]:
        _check(definition.name, a, {"in_channels": latent_channels})
        return DiffusionUNet3D(**shared)
    count = a["cross_attention_dim"] if a["with_conditioning"] else 0
    if extra not in (0, count):
        raise ValueError(
            f"the UNet takes {a['in_channels']} channels, the autoencoder gives {latent_channels}; expected the same, "
            f"or {count} more for its conditions as maps."
        )
    names = list(context_names or [f"condition_{i}" for i in range(count)])
    if len(names) != count:
        raise ValueError(f"the UNet takes {count} numbers through cross-attention, but {names} were named.")
    top, bottom, spacing = (
        maisi and a[f"include_{name}_input"] for name in ("top_region_index", "bottom_region_index", "spacing")
    )
    if top != bottom:
        raise ValueError(f"regions must both be inputs or neither, got top {top}, bottom {bottom}.")
    return DiffusionUNetMaisi3D(
        **shared,
        include_region=top,
        include_spacing=spacing,
        context_names=names or None,
        concat_context=extra > 0,
        transformer_num_layers=a["transformer_num_layers"],
    )


def flow_shift(arguments: dict, latent_shape: Sequence[int]) -> float:
    """Shift of MONAI's ``timestep_transform`` for a latent size: the ratio of sides to a cube of the base size.

    RFlowScheduler stores ``transform_scale`` and never uses it, so neither does this.
    """
    if not arguments["use_timestep_transform"]:
        return 1.0
    sides = math.prod(latent_shape) / arguments["base_img_size_numel"]
    return sides ** (1 / arguments["spatial_dim"])


def build_scheduler(
    definition: Definition,
    latent_shape: Sequence[int],
    timestep_spacing: str = "linspace",
    zero_terminal_snr: bool = False,
) -> Scheduler:
    """diffusers' scheduler with the same noise schedule, prediction type, clipping and timesteps.

    Args:
        latent_shape: (x, y, z) that a rectified flow's shift is for.
        timestep_spacing, zero_terminal_snr: of a diffusion, as `BundleConfig` has them.

    Raises:
        ValueError: options that diffusers does not have.
    """
    a = full_arguments(definition, getattr(monai_schedulers, definition.name))
    if definition.name == "RFlowScheduler":
        if a["steps_offset"]:
            raise ValueError(f"RFlowScheduler with steps_offset={a['steps_offset']} cannot be converted; expected 0.")
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=a["num_train_timesteps"], shift=flow_shift(a, latent_shape), stochastic_sampling=False
        )
    if "beta_schedule" in a:  # GenerativeModels
        name = str(a.pop("beta_schedule"))
        a["schedule"] = f"{name}_beta" if name in ("linear", "scaled_linear", "sigmoid") else name
    if a["clip_sample"] and a["clip_sample_min"] != -a["clip_sample_max"]:
        raise ValueError(
            f"clipping to [{a['clip_sample_min']}, {a['clip_sample_max']}] cannot be converted; expected a range "
            "around 0."
        )
    reference = getattr(monai_schedulers, definition.name)(**a)
    options = {
        "num_train_timesteps": a["num_train_timesteps"],
        "prediction_type": str(a["prediction_type"]),
        "clip_sample": a["clip_sample"],
        "clip_sample_range": float(a["clip_sample_max"]),
        "timestep_spacing": timestep_spacing,
        "rescale_betas_zero_snr": zero_terminal_snr,
    }
    if a["schedule"] in BETA_SCHEDULES:
        options["beta_schedule"] = BETA_SCHEDULES[a["schedule"]]
        options["beta_start"], options["beta_end"] = float(a.get("beta_start", 1e-4)), float(a.get("beta_end", 2e-2))
    else:
        options["trained_betas"] = reference.betas.tolist()
    if definition.name == "DDIMScheduler":
        if a["steps_offset"] and timestep_spacing == "linspace":
            raise ValueError(f"steps_offset={a['steps_offset']} of MONAI 1.6 cannot be converted; expected 0.")
        scheduler: Scheduler = DDIMScheduler(
            **options, set_alpha_to_one=a["set_alpha_to_one"], steps_offset=a["steps_offset"]
        )
    else:
        if str(a["variance_type"]) not in ("fixed_small", "fixed_large"):
            raise ValueError(f"variance_type={a['variance_type']!r} cannot be converted; expected a fixed one.")
        scheduler = DDPMScheduler(**options, variance_type=str(a["variance_type"]))
    betas = rescale_zero_terminal_snr(reference.betas) if zero_terminal_snr else reference.betas
    if not torch.allclose(scheduler.alphas_cumprod, (1 - betas).cumprod(0), atol=1e-6):
        raise ValueError(f"the noise schedule {a['schedule']!r} comes out differently in diffusers.")
    return scheduler
