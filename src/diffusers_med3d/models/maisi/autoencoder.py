"""AutoencoderKLMaisi3D: MONAI's AutoencoderKlMaisi as a diffusers model."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiConvolution,
    MaisiGroupNorm3D,
)
from torch import nn

from ..autoencoder import DiagonalGaussianDistribution3D, KLCodecMixin

MIN_SPLIT = 4
"""Shortest part of a latent side that a split convolution can work on: its parts overlap by up to 4 voxels."""


def _fits(splits: int, latent_side: int) -> bool:
    """Whether a latent's side can be computed in this many parts."""
    return splits == 1 or (latent_side % splits == 0 and latent_side // splits >= MIN_SPLIT)


class AutoencoderKLMaisi3D(KLCodecMixin, ModelMixin, AutoencoderKlMaisi, ConfigMixin):
    """KL autoencoder of MAISI and NV-Generate (Guo et al. 2024, arXiv 2409.11169): convolutions split to save memory.

    State-dict keys are MONAI's, calls those of `AutoencoderKL3D`. The norms see the whole volume, so splitting the
    convolutions changes nothing but memory and time. MONAI's option ``norm_float16`` is the ``dtype`` of the model
    here, and its norms are torch's.

    Args:
        in_channels, out_channels: image channels.
        channels: channels of each level; the side is halved between two levels.
        latent_channels: channels of the latent space.
        num_res_blocks: residual blocks of each level.
        attention_levels: which levels have self-attention.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        with_encoder_nonlocal_attn, with_decoder_nonlocal_attn: attention in the middle of encoder / decoder.
        include_fc: attention ends in a linear layer.
        use_convtranspose: upsample with transposed convolutions instead of trilinear interpolation and convolution.
        num_splits: parts that every convolution is computed in; see `set_num_splits`.
        dim_split: axis that is split, 0, 1 or 2 for X, Y or Z.
        latents_mean, latents_std: per-channel statistics of the raw latents; MAISI's ``scale_factor`` is 1 / std.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (64, 128, 256),
        latent_channels: int = 4,
        num_res_blocks: Sequence[int] = (2, 2, 2),
        attention_levels: Sequence[bool] = (False, False, False),
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = False,
        with_decoder_nonlocal_attn: bool = False,
        include_fc: bool = False,
        use_convtranspose: bool = False,
        num_splits: int = 1,
        dim_split: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        if dim_split not in (0, 1, 2):
            raise ValueError(f"dim_split must be 0, 1 or 2 (X, Y or Z), got {dim_split}.")
        AutoencoderKlMaisi.__init__(
            self,
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=tuple(num_res_blocks),
            num_channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            with_encoder_nonlocal_attn=with_encoder_nonlocal_attn,
            with_decoder_nonlocal_attn=with_decoder_nonlocal_attn,
            include_fc=include_fc,
            use_convtranspose=use_convtranspose,
            num_splits=1,
            dim_split=dim_split,
            save_mem=False,
        )
        # MAISI's norm gives float32 or float16 whatever the model's dtype is, so that bfloat16 models would stop
        for name, norm in list(self.named_modules()):
            if isinstance(norm, MaisiGroupNorm3D):
                parent, _, child = name.rpartition(".")
                same = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
                setattr(self.get_submodule(parent), child, same)
        self.downsample_factor = 2 ** (len(channels) - 1)
        self.latent_channels = latent_channels
        self._add_atlas(None)
        self.set_num_splits(num_splits)

    def set_num_splits(self, num_splits: int) -> None:
        """Compute every convolution in this many parts: less memory, more time, the same result.

        It must divide the latent's side along ``dim_split`` into parts of at least 4 voxels; 1 switches splitting off.
        """
        if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits must be a whole number of at least 1, got {num_splits!r}.")
        self.register_to_config(num_splits=num_splits)
        for module in self.modules():
            if isinstance(module, MaisiConvolution):
                module.num_splits = num_splits

    def fitting_splits(self, at_most: int, latent_shape: Sequence[int]) -> int:
        """The largest number up to `at_most` that `set_num_splits` takes for latents of this size (x, y, z)."""
        side = latent_shape[self.config.dim_split]
        return max(n for n in range(1, at_most + 1) if _fits(n, side))

    def _check_splits(self, latent_side: int) -> None:
        splits = self.config.num_splits
        if not _fits(splits, latent_side):
            raise ValueError(
                f"a latent side of {latent_side} (axis {self.config.dim_split}) cannot be computed in {splits} parts: "
                f"it must be a multiple of {splits} and at least {MIN_SPLIT * splits}. "
                "Call set_num_splits(1), or with a number that fits."
            )

    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution3D]:
        """As `AutoencoderKL3D.encode`; refuses a size that ``num_splits`` does not fit."""
        if x.ndim == 5:
            self._check_splits(x.shape[2 + self.config.dim_split] // self.downsample_factor)
        return super().encode(x, return_dict)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """As `AutoencoderKL3D.decode`; refuses a size that ``num_splits`` does not fit."""
        self._check_splits(z.shape[2 + self.config.dim_split])
        return super().decode(z, return_dict)
