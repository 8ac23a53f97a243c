"""The published generators of MONAI: definitions as their configs have them, and small ones of the same structure.

From Project-MONAI/model-zoo (brats_mri_generative_diffusion, brain_image_synthesis_latent_diffusion_model,
maisi_ct_generative) and NVIDIA-Medtech/NV-Generate-CTMR (config_network_rflow.json, which MR, MR-Brain and CT share).
"""

import copy
from typing import Any

MAISI = "monai.apps.generation.maisi.networks"

_MAISI_AUTOENCODER = {
    "_target_": f"{MAISI}.autoencoderkl_maisi.AutoencoderKlMaisi",
    "spatial_dims": "@spatial_dims",
    "in_channels": "@image_channels",
    "out_channels": "@image_channels",
    "latent_channels": "@latent_channels",
    "num_channels": [64, 128, 256],
    "num_res_blocks": [2, 2, 2],
    "norm_num_groups": 32,
    "norm_eps": 1e-06,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_checkpointing": False,
    "use_convtranspose": False,
    "norm_float16": True,
    "num_splits": 8,
    "dim_split": 1,
}
_MAISI_UNET = {
    "_target_": f"{MAISI}.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
    "spatial_dims": "@spatial_dims",
    "in_channels": "@latent_channels",
    "out_channels": "@latent_channels",
    "num_channels": [64, 128, 256, 512],
    "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32],
    "num_res_blocks": 2,
    "use_flash_attention": True,
    "include_top_region_index_input": "@include_body_region",
    "include_bottom_region_index_input": "@include_body_region",
    "include_spacing_input": True,
}
_MASK_GENERATION = {  # a network of the same file that is not the generator
    "_target_": "monai.networks.nets.diffusion_model_unet.DiffusionModelUNet",
    "spatial_dims": "@spatial_dims",
    "in_channels": "@latent_channels",
    "out_channels": "@latent_channels",
    "with_conditioning": True,
    "cross_attention_dim": 10,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "brats": {
        "bundle_root": ".",
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 8,
        "latent_shape": [8, 36, 44, 28],
        "spacing": [1.1, 1.1, 1.1],
        "autoencoder_def": {
            "_target_": "monai.networks.nets.autoencoderkl.AutoencoderKL",
            "spatial_dims": "@spatial_dims",
            "in_channels": "@image_channels",
            "out_channels": "@image_channels",
            "latent_channels": "@latent_channels",
            "channels": [64, 128, 256],
            "num_res_blocks": 2,
            "norm_num_groups": 32,
            "norm_eps": 1e-06,
            "attention_levels": [False, False, False],
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
            "include_fc": False,
        },
        "network_def": {
            "_target_": "monai.networks.nets.diffusion_model_unet.DiffusionModelUNet",
            "spatial_dims": "@spatial_dims",
            "in_channels": "@latent_channels",
            "out_channels": "@latent_channels",
            "channels": [256, 256, 512],
            "attention_levels": [False, True, True],
            "num_head_channels": [0, 64, 64],
            "num_res_blocks": 2,
            "include_fc": False,
            "use_combined_linear": False,
        },
        "load_autoencoder_path": "$@bundle_root + '/models/model_autoencoder.pt'",
        "load_autoencoder": "$@autoencoder_def.load_old_state_dict(torch.load(@load_autoencoder_path))",
        "autoencoder": "$@autoencoder_def.to(@device)",
        "load_diffusion_path": "$@model_dir + '/model.pt'",
        "diffusion": "$@network_def.to(@device)",
        "noise_scheduler": {
            "_target_": "monai.networks.schedulers.ddim.DDIMScheduler",
            "_requires_": ["@load_diffusion", "@load_autoencoder"],
            "num_train_timesteps": 1000,
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
        "set_timesteps": "$@noise_scheduler.set_timesteps(num_inference_steps=50)",
    },
    "brain": {
        "conditioning": "$torch.tensor([[@gender, @age, @ventricular_vol, @brain_vol]]).to(@device).unsqueeze(1)",
        "autoencoder_def": {
            "_target_": "monai.networks.nets.AutoencoderKL",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 1,
            "latent_channels": 3,
            "channels": [64, 128, 128, 128],
            "num_res_blocks": 2,
            "norm_num_groups": 32,
            "norm_eps": 1e-06,
            "attention_levels": [False, False, False, False],
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        },
        "network_def": "@autoencoder_def",
        "load_autoencoder_path": "$@model_dir + '/autoencoder.pt'",
        "diffusion_def": {
            "_target_": "monai.networks.nets.DiffusionModelUNet",
            "spatial_dims": 3,
            "in_channels": 7,
            "out_channels": 3,
            "channels": [256, 512, 768],
            "num_res_blocks": 2,
            "attention_levels": [False, True, True],
            "norm_num_groups": 32,
            "norm_eps": 1e-06,
            "resblock_updown": True,
            "num_head_channels": [0, 512, 768],
            "with_conditioning": True,
            "transformer_num_layers": 1,
            "cross_attention_dim": 4,
            "upcast_attention": True,
            "use_flash_attention": False,
        },
        "load_diffusion_path": "$@model_dir + '/model.pt'",
        "scheduler": {
            "_target_": "monai.networks.schedulers.DDIMScheduler",
            "_requires_": ["@load_diffusion", "@load_autoencoder"],
            "beta_start": 0.0015,
            "beta_end": 0.0205,
            "num_train_timesteps": 1000,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
        "noise": "$torch.randn((1, 3, 20, 28, 20)).to(@device)",
    },
    "maisi-ddpm": {
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 4,
        "include_body_region": True,
        "output_size_xy": 512,
        "output_size": ["@output_size_xy", "@output_size_xy", 512],
        "spacing": [1.0, 1.0, 1.0],
        "latent_shape": ["@latent_channels", "$@output_size[0]//4", "$@output_size[1]//4", "$@output_size[2]//4"],
        "trained_autoencoder_path": "$@model_dir + '/autoencoder_epoch273.pt'",
        "trained_diffusion_path": "$@model_dir + '/input_unet3d_data.pt'",
        "trained_mask_generation_diffusion_path": "$@model_dir + '/mask_generation_diffusion_unet.pt'",
        "autoencoder_def": _MAISI_AUTOENCODER,
        "diffusion_unet_def": _MAISI_UNET,
        "mask_generation_autoencoder_def": {**_MAISI_AUTOENCODER, "in_channels": 8, "out_channels": 125},
        "mask_generation_diffusion_def": _MASK_GENERATION,
        "scale_factor": "$@checkpoint_diffusion_unet['scale_factor'].to(@device)",
        "noise_scheduler": {
            "_target_": "monai.networks.schedulers.ddpm.DDPMScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "schedule": "scaled_linear_beta",
            "clip_sample": False,
        },
    },
    "maisi-rflow": {
        "spatial_dims": 3,
        "image_channels": 1,
        "latent_channels": 4,
        "include_body_region": False,
        "autoencoder_def": {**_MAISI_AUTOENCODER, "num_splits": 4},
        "diffusion_unet_def": {**_MAISI_UNET, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True},
        "mask_generation_diffusion_def": _MASK_GENERATION,
        "mask_generation_scale_factor": 1.0055984258651733,
        "noise_scheduler": {
            "_target_": "monai.networks.schedulers.rectified_flow.RFlowScheduler",
            "num_train_timesteps": 1000,
            "use_discrete_timesteps": False,
            "use_timestep_transform": True,
            "sample_method": "uniform",
            "scale": 1.4,
        },
        "diffusion_unet_inference": {
            "dim": [256, 256, 128],
            "spacing": [0.94, 0.94, 1.36],
            "modality": 9,
            "cfg_guidance_scale": 2,
        },
        "trained_autoencoder_path": "models/autoencoder_v1.pt",
        "model_filename": "diff_unet_3d_rflow-mr-brain_v1.pt",
    },
}

# Widths only: levels, blocks, attention, heads, conditions and splits stay as published.
_SMALL = {
    "brats": {"autoencoder_def": [4, 4, 8], "network_def": ([8, 8, 16], [0, 4, 8])},
    "brain": {"autoencoder_def": [4, 4, 8, 8], "diffusion_def": ([8, 8, 16], [0, 8, 16])},
    "maisi-ddpm": {"autoencoder_def": [4, 4, 8], "diffusion_unet_def": ([8, 8, 16, 16], [0, 0, 8, 4])},
    "maisi-rflow": {"autoencoder_def": [4, 4, 8], "diffusion_unet_def": ([8, 8, 16, 16], [0, 0, 8, 4])},
}
LATENT_SHAPES = {"brats": (8, 4, 4), "brain": (4, 4, 4), "maisi-ddpm": (8, 32, 8), "maisi-rflow": (8, 16, 8)}


def small(name: str) -> dict[str, Any]:
    """A published config with narrow networks, to run in a second on a CPU."""
    config = copy.deepcopy(PUBLISHED[name])
    for key, widths in _SMALL[name].items():
        definition = config[key]
        channels, heads = widths if isinstance(widths, tuple) else (widths, None)
        definition["num_channels" if "num_channels" in definition else "channels"] = channels
        definition["norm_num_groups"] = 4
        if heads is not None:
            definition["num_head_channels"] = heads
    return config
