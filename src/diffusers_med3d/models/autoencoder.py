"""AutoencoderKL3D: MONAI's AutoencoderKL as a diffusers model."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from monai.networks.nets import AutoencoderKL

from .latents import NormalizedLatentsMixin
from .sizes import check_divisible, check_volumes


class KLCodecMixin(NormalizedLatentsMixin):
    """Encoder and decoder of MONAI's AutoencoderKL family, block by block."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Volumes (B, C, X, Y, Z) in [0, 1] to raw posterior mean and sigma, (B, latent_channels, X/f, Y/f, Z/f)."""
        check_volumes(x, self.config.in_channels)
        check_divisible(x.shape[2:], self.downsample_factor, "volume shape")
        hidden = self._run(self.encoder.blocks, x)
        log_variance = self.quant_conv_log_sigma(hidden).clamp(-30.0, 20.0)
        return self.quant_conv_mu(hidden), torch.exp(log_variance / 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, latent_channels, x, y, z) to volumes (B, C, x*f, y*f, z*f), not clamped."""
        return self._run(self.decoder.blocks, self.post_quant_conv(z))

    def encode_moments(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode(volumes)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents)


class AutoencoderKL3D(KLCodecMixin, ModelMixin, AutoencoderKL, ConfigMixin):
    """KL-regularised 3D autoencoder (Rombach et al. 2022, arXiv 2112.10752; Pinaya et al. 2022, arXiv 2209.07162).

    State-dict keys are MONAI's. ``encode(volumes) -> (mean, sigma)``, ``decode(latents)`` and
    ``forward(volumes) -> (reconstruction, mean, sigma)`` are MONAI's and work on raw latents; ``encode_latents`` and
    ``decode_latents`` work on normalised ones.

    Args:
        in_channels, out_channels: image channels.
        channels: channels of each level; the side is halved between two levels.
        latent_channels: channels of the latent space.
        num_res_blocks: residual blocks per level (one number, or one per level).
        attention_levels: which levels have self-attention.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        with_encoder_nonlocal_attn, with_decoder_nonlocal_attn: attention in the middle of encoder / decoder.
        use_convtranspose: upsample with transposed convolutions instead of nearest neighbour and convolution.
        include_fc: attention ends in a linear layer; networks of MONAI's GenerativeModels were trained without.
        latents_mean, latents_std: per-channel statistics of the raw latents over the training set.
        atlas_shape: size (x, y, z) of the atlas of the latents, see ``NormalizedLatentsMixin``; None for none.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64),
        latent_channels: int = 16,
        num_res_blocks: int | Sequence[int] = 1,
        attention_levels: Sequence[bool] = (False, False, False),
        norm_num_groups: int = 8,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = False,
        with_decoder_nonlocal_attn: bool = False,
        use_convtranspose: bool = False,
        include_fc: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        atlas_shape: Sequence[int] | None = None,
    ) -> None:
        AutoencoderKL.__init__(
            self,
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            with_encoder_nonlocal_attn=with_encoder_nonlocal_attn,
            with_decoder_nonlocal_attn=with_decoder_nonlocal_attn,
            use_convtranspose=use_convtranspose,
            include_fc=include_fc,
        )
        self.downsample_factor = 2 ** (len(channels) - 1)
        self.latent_channels = latent_channels
        self._add_atlas(atlas_shape)
