"""DiffusionUNet3D: MONAI's DiffusionModelUNet as a diffusers model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import nn

from ..hub.publish import PublishMixin
from ..schedulers.flow import FLOW_TIMESTEPS, preconditioning
from .casting import QuietCastMixin
from .checkpointing import CheckpointedBlocksMixin
from .convolution import quicken_small_convolutions
from .sizes import check_divisible

REMOVED = ("sample_skip", "sample_gate", "num_modes")
"""Arguments that version 0.1 had: parts of the network that lost to a plain one (docs/experiments/base_training.md)."""


@dataclass
class DiffusionUNet3DOutput(BaseOutput):
    """``sample``: the network's prediction, (B, out_channels, x, y, z)."""

    sample: torch.Tensor


class DiffusionUNet3D(
    PublishMixin, QuietCastMixin, CheckpointedBlocksMixin, ModelMixin, PeftAdapterMixin, DiffusionModelUNet, ConfigMixin
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
        position_shape: size (x, y, z) of latents that lie in one frame, or None. A learned value per channel and place
            is then added after the first convolution, so that the network knows where in the body it is; it takes no
            other size.
        precondition: of a network that predicts the velocity of a rectified flow: what its layers see and must say has
            unit variance at every time; see ``flow.preconditioning``. With ``position_shape``, at every place too, once
            ``set_data_variance`` was called.
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
        position_shape: Sequence[int] | None = None,
        precondition: bool = False,
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
        if precondition and in_channels != out_channels:
            raise ValueError(f"precondition needs in_channels == out_channels, got {in_channels} and {out_channels}.")
        self.position = None if position_shape is None else nn.Parameter(torch.zeros(1, channels[0], *position_shape))
        self.register_buffer("data_variance", None)
        if precondition and position_shape is not None:
            self.register_buffer("data_variance", torch.ones(1, in_channels, *position_shape))
        quicken_small_convolutions(self)

    def set_data_variance(self, variance: torch.Tensor) -> None:
        """Take the variance of training latents per channel and place, (in_channels, *position_shape)."""
        if self.data_variance is None or variance.shape != self.data_variance.shape[1:] or not (variance >= 0).all():
            wanted = None if self.data_variance is None else tuple(self.data_variance.shape[1:])
            raise ValueError(f"variance must be at least 0, of shape {wanted}; got {tuple(variance.shape)}.")
        self.data_variance.copy_(variance)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The step of ``from_config`` and ``from_pretrained`` that reads a saved config.

        Raises:
            ValueError: a network with a part that version 0.1 had and this one does not have.
        """
        switched_on = [name for name in REMOVED if config_dict.get(name)]
        if switched_on:
            raise ValueError(
                f"this checkpoint's {cls.__name__} has {' and '.join(switched_on)}, which version 0.2 no longer has. "
                "Load it with version 0.1 of diffusers-med3d (git commit 9bca24f), or train a new network with "
                "examples/train_diffusion.py."
            )
        kept = {name: value for name, value in config_dict.items() if name not in (*REMOVED, "mode_shape")}
        return super().extract_init_dict(kept, **kwargs)

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
        if self.position is not None and sample.shape[2:] != self.position.shape[2:]:
            raise ValueError(
                f"this network has position maps of size {tuple(self.position.shape[2:])} and takes no other, got "
                f"{tuple(sample.shape[2:])}."
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        class_labels = self._labels(sample, class_labels)

        embedding = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(sample.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)

        if self.config.precondition:
            scaling = preconditioning(
                timesteps / FLOW_TIMESTEPS, 1.0 if self.data_variance is None else self.data_variance.float()
            )
            noisy, sample = sample, (scaling.input * sample).to(sample.dtype)
        hidden = self.conv_in(sample)
        if self.position is not None:
            hidden = hidden + self.position
        residuals = [hidden]
        for block in self.down_blocks:
            hidden, block_residuals = self._call(block, hidden, embedding)
            residuals.extend(block_residuals)
        hidden = self._call(self.middle_block, hidden, embedding)
        for block in self.up_blocks:
            count = len(block.resnets)
            block_residuals, residuals = residuals[-count:], residuals[:-count]
            hidden = self._call(block, hidden, block_residuals, embedding)
        prediction = self.out(hidden)
        if self.config.precondition:
            prediction = (scaling.skip * noisy + scaling.output * prediction).to(prediction.dtype)
        return DiffusionUNet3DOutput(sample=prediction) if return_dict else (prediction,)
