"""DiffusionUNet3D: MONAI's DiffusionModelUNet as a diffusers model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from ..hub import PublishMixin
from .checkpointing import CheckpointedBlocksMixin
from .sizes import check_divisible


@dataclass
class DiffusionUNet3DOutput(BaseOutput):
    """``sample``: the network's prediction, (B, out_channels, x, y, z)."""

    sample: torch.Tensor


class DiffusionUNet3D(
    PublishMixin, CheckpointedBlocksMixin, ModelMixin, PeftAdapterMixin, DiffusionModelUNet, ConfigMixin
):
    """3D UNet that predicts noise, velocity or sample from a noisy latent (Pinaya et al. 2022, arXiv 2209.07162).

    State-dict keys are MONAI's. The last class index is the null class of classifier-free guidance
    (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        in_channels, out_channels: latent channels.
        channels: channels of each level; the side is halved between two levels.
        num_res_blocks: residual blocks per level (one number, or one per level).
        attention_levels: which levels have self-attention.
        num_head_channels: channels of one attention head.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        num_class_embeds: number of classes including the null class, or None for an unconditional network.
        include_fc: attention ends in a linear layer; networks of MONAI's GenerativeModels were trained without.
        sample_skip: add the noisy latent itself to the prediction, each channel times a learned function of the
            timestep: the c_skip of Karras et al. 2022, arXiv 2206.00364, equation 7, which they compute from the one
            variance of their data and which here differs between latent channels. A network that is narrow for its
            latents then need not hand their noise through its layers.
        sample_gate: add the noisy latent once more, times a factor per channel *and place* that a second last
            convolution reads from the same features as the prediction. How much of a noisy latent is noise depends on
            what stands there (background is known, tissue is not), which one scale per channel cannot say.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        channels: Sequence[int] = (32, 64, 128),
        num_res_blocks: int | Sequence[int] = 2,
        attention_levels: Sequence[bool] = (False, False, True),
        num_head_channels: int | Sequence[int] = 32,
        norm_num_groups: int = 16,
        norm_eps: float = 1e-6,
        resblock_updown: bool = False,
        num_class_embeds: int | None = None,
        include_fc: bool = True,
        sample_skip: bool = False,
        sample_gate: bool = False,
    ) -> None:
        DiffusionModelUNet.__init__(
            self,
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
            num_class_embeds=num_class_embeds,
            include_fc=include_fc,
        )
        for name, wanted in (("sample_skip", sample_skip), ("sample_gate", sample_gate)):
            if wanted and in_channels != out_channels:
                raise ValueError(f"{name} needs in_channels == out_channels, got {in_channels} and {out_channels}.")
        self.skip_scale = None
        if sample_skip:
            self.skip_scale = nn.Linear(self.time_embed[-1].out_features, out_channels)
            nn.init.zeros_(self.skip_scale.weight)
            nn.init.zeros_(self.skip_scale.bias)
        self.place_scale = None
        if sample_gate:
            self.place_scale = nn.Conv3d(channels[0], out_channels, kernel_size=3, padding=1)
            nn.init.zeros_(self.place_scale.weight)
            nn.init.zeros_(self.place_scale.bias)

    @property
    def null_class(self) -> int | None:
        """Index of the null class, None for an unconditional network."""
        return None if self.config.num_class_embeds is None else self.config.num_class_embeds - 1

    @property
    def size_divisor(self) -> int:
        """Every side of a latent must be a multiple of this."""
        return 2 ** (len(self.config.channels) - 1)

    def _labels(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor | None:
        if self.null_class is None:
            if class_labels is not None:
                raise ValueError("this network has num_class_embeds=None, so class_labels must be None.")
            return None
        if class_labels is None:
            class_labels = torch.full((sample.shape[0],), self.null_class)
        if class_labels.shape != (sample.shape[0],):
            raise ValueError(f"class_labels must have shape ({sample.shape[0]},), got {tuple(class_labels.shape)}.")
        return class_labels.to(sample.device, torch.long)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DiffusionUNet3DOutput | tuple[torch.Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: noisy latents (B, in_channels, x, y, z); sides must be multiples of ``size_divisor``.
            timestep: one number for the batch, or (B,).
            class_labels: (B,) in [0, num_class_embeds), None for the null class.
            return_dict: return ``DiffusionUNet3DOutput`` or a tuple.

        Raises:
            ValueError: wrong rank, channels, size (with the nearest that fits) or labels.
        """
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (B, {self.config.in_channels}, x, y, z), got {tuple(sample.shape)}."
            )
        check_divisible(sample.shape[2:], self.size_divisor, "latent shape")
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        class_labels = self._labels(sample, class_labels)

        embedding = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(sample.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)

        hidden = self.conv_in(sample)
        residuals = [hidden]
        for block in self.down_blocks:
            hidden, block_residuals = self._call(block, hidden, embedding)
            residuals.extend(block_residuals)
        hidden = self._call(self.middle_block, hidden, embedding)
        for block in self.up_blocks:
            count = len(block.resnets)
            block_residuals, residuals = residuals[-count:], residuals[:-count]
            hidden = self._call(block, hidden, block_residuals, embedding)
        hidden = self.out[:-1](hidden)
        prediction = self.out[-1](hidden)
        if self.place_scale is not None:
            prediction = prediction + self.place_scale(hidden) * sample
        if self.skip_scale is not None:
            prediction = prediction + self.skip_scale(embedding)[..., None, None, None] * sample
        return DiffusionUNet3DOutput(sample=prediction) if return_dict else (prediction,)
