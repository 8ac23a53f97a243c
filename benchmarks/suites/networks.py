"""The networks that are measured: ours, and MONAI's own classes with the same weights."""

import torch
from diffusers import DDIMScheduler
from measure import Settings
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, MedDiffusion3DPipeline, VolumeRewardModel

SCHEDULE = {"beta_start": 0.0015, "beta_end": 0.0195}


def side(settings: Settings) -> int:
    """Voxels of a volume along each axis."""
    return 64 if settings.size == "brain-t1" else 16


def make_pipeline(settings: Settings, volume_side: int | None = None) -> MedDiffusion3DPipeline:
    """A plain generator with random weights, of `brain-t1`'s widths or tiny: an architecture that MONAI has too."""
    torch.manual_seed(0)
    wide = settings.size == "brain-t1"
    latents = 24 if wide else 4
    vae = AutoencoderKL3D(
        channels=(16, 32, 64) if wide else (8, 8, 8),
        latent_channels=latents,
        norm_num_groups=1 if wide else 4,
        use_convtranspose=True,
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
    )
    unet = DiffusionUNet3D(
        in_channels=latents,
        out_channels=latents,
        channels=(80, 144) if wide else (8, 8, 8),
        num_res_blocks=1,
        attention_levels=(False, True) if wide else (False, False, False),
        num_head_channels=48 if wide else 8,
        norm_num_groups=4,
        num_class_embeds=None,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="linspace", **SCHEDULE
    )  # MONAI's timesteps
    shape = [volume_side or side(settings)] * 3
    pipeline = MedDiffusion3DPipeline(vae.eval(), unet.eval(), scheduler, volume_shape=shape)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(settings.device)


def make_reward(settings: Settings) -> VolumeRewardModel:
    """A 3D reward as `brain-t1-reward-3d`, or tiny."""
    torch.manual_seed(1)
    wide = settings.size == "brain-t1"
    reward = VolumeRewardModel(
        channels=(16, 32, 64, 96) if wide else (8, 8), norm_num_groups=8 if wide else 4, num_members=2 if wide else 1
    )
    return reward.to(settings.device).eval()


def monai_networks(pipeline: MedDiffusion3DPipeline) -> tuple[DiffusionModelUNet, AutoencoderKL]:
    """MONAI's own UNet and autoencoder with the pipeline's weights."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    network = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        channels=tuple(unet.channels),
        num_res_blocks=unet.num_res_blocks,
        attention_levels=tuple(unet.attention_levels),
        norm_num_groups=unet.norm_num_groups,
        num_head_channels=unet.num_head_channels,
    )
    autoencoder = AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=tuple(vae.channels),
        num_res_blocks=vae.num_res_blocks,
        attention_levels=tuple(vae.attention_levels),
        latent_channels=vae.latent_channels,
        norm_num_groups=vae.norm_num_groups,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        use_convtranspose=vae.use_convtranspose,
    )
    network.load_state_dict(pipeline.unet.state_dict())
    autoencoder.load_state_dict(pipeline.vae.state_dict())
    return network.to(pipeline.device).eval(), autoencoder.to(pipeline.device).eval()
