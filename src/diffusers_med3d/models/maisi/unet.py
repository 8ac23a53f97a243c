"""DiffusionUNetMaisi3D: MONAI's DiffusionModelUNetMaisi, with the conditions it and its relatives take."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding

from ...hub.publish import PublishMixin
from ...utils.checks import positive_spacing
from ..casting import QuietCastMixin
from ..checkpointing import CheckpointedBlocksMixin
from ..convolution import quicken_small_convolutions
from ..sizes import check_divisible
from ..unet import DiffusionUNet3DOutput

REGIONS = ("head", "chest", "abdomen", "pelvis")
"""Body regions in MAISI's order."""

REGION_INPUTS = ("top_region", "bottom_region")

GAIN = 100.0
"""MAISI multiplies spacing (mm) and one-hot regions by this before they enter the network."""


class DiffusionUNetMaisi3D(
    PublishMixin,
    QuietCastMixin,
    CheckpointedBlocksMixin,
    ModelMixin,
    PeftAdapterMixin,
    DiffusionModelUNetMaisi,
    ConfigMixin,
):
    """3D UNet with conditions besides the class: MAISI's spacing and body region (Guo et al. 2024, arXiv 2409.11169),
    or named numbers through cross-attention (Pinaya et al. 2022, arXiv 2209.07162).

    State-dict keys are MONAI's. What it takes is in ``condition_names``. For MAISI the class is the modality, and the
    null class of classifier-free guidance is **the first** (0, "unknown"). Attention runs through torch's
    ``scaled_dot_product_attention``, which needs no memory for the square of the number of voxels.

    Args:
        in_channels, out_channels: latent channels.
        channels: channels of each level; the side is halved between two levels.
        num_res_blocks: residual blocks per level (one number, or one per level).
        attention_levels: which levels have self-attention (with ``context_names``: transformers).
        num_head_channels: channels of one attention head.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        resblock_updown: residual blocks for down- and upsampling.
        include_fc: self-attention ends in a linear layer.
        num_class_embeds: number of classes including the null class 0, or None for a network without classes.
        include_region: takes ``top_region`` and ``bottom_region``.
        include_spacing: takes the voxel size.
        context_names: names of the numbers that reach the network through cross-attention, as one token.
        concat_context: the same numbers are also handed in as constant maps beside the latent.
        transformer_num_layers: transformer blocks per attention block, with ``context_names``.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: Sequence[int] = (64, 128, 256, 512),
        num_res_blocks: int | Sequence[int] = 2,
        attention_levels: Sequence[bool] = (False, False, True, True),
        num_head_channels: int | Sequence[int] = (0, 0, 32, 32),
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resblock_updown: bool = False,
        include_fc: bool = False,
        num_class_embeds: int | None = None,
        include_region: bool = False,
        include_spacing: bool = True,
        context_names: Sequence[str] | None = None,
        concat_context: bool = False,
        transformer_num_layers: int = 1,
    ) -> None:
        context_names = list(context_names or [])
        if len(set(context_names)) != len(context_names) or set(context_names) & {"spacing", *REGION_INPUTS}:
            raise ValueError(f"context_names must differ from each other and from MAISI's, got {context_names}.")
        if concat_context and not context_names:
            raise ValueError("concat_context needs context_names.")
        DiffusionModelUNetMaisi.__init__(
            self,
            spatial_dims=3,
            in_channels=in_channels + (len(context_names) if concat_context else 0),
            out_channels=out_channels,
            num_res_blocks=num_res_blocks,
            num_channels=tuple(channels),
            attention_levels=tuple(attention_levels),
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
            with_conditioning=bool(context_names),
            transformer_num_layers=transformer_num_layers,
            cross_attention_dim=len(context_names) or None,
            num_class_embeds=num_class_embeds,
            include_fc=include_fc,
            include_top_region_index_input=include_region,
            include_bottom_region_index_input=include_region,
            include_spacing_input=include_spacing,
        )
        for module in self.modules():
            if isinstance(module, SABlock | CrossAttentionBlock):
                module.use_flash_attention = True  # MONAI's constructor insists on a GPU; torch does not
        quicken_small_convolutions(self)
        self.condition_names = (
            *(["spacing"] if include_spacing else []),
            *(REGION_INPUTS if include_region else []),
            *context_names,
        )

    @property
    def null_class(self) -> int | None:
        """Index of the null class, None for a network without classes."""
        return None if self.config.num_class_embeds is None else 0

    @property
    def size_divisor(self) -> int:
        """Every side of a latent must be a multiple of this."""
        return 2 ** (len(self.config.channels) - 1)

    def encode_conditions(self, conditions: Mapping[str, Any], batch: int) -> dict[str, torch.Tensor]:
        """Conditions in words and numbers to what `forward` takes.

        Args:
            conditions: a value for each of ``condition_names``: "spacing" (X, Y, Z) in mm for the whole batch; regions
                as a name from `REGIONS` or its index, context as a number, each for the whole batch or one per sample.
            batch: number of samples B.

        Returns:
            "spacing" float32 (B, 3); regions int64 (B,); context float32 (B,).

        Raises:
            ValueError: a condition that is missing or unknown, or a value that cannot be used.
        """
        missing = [name for name in self.condition_names if name not in conditions]
        unknown = sorted(set(conditions) - set(self.condition_names))
        if missing or unknown:
            raise ValueError(
                f"this network takes the conditions {list(self.condition_names)}; missing {missing}, unknown {unknown}."
            )
        encoded = {}
        for name in self.condition_names:
            value = conditions[name]
            if name == "spacing":
                encoded[name] = torch.tensor(positive_spacing(value)).expand(batch, 3)
                continue
            values = value.tolist() if torch.is_tensor(value) else value
            values = list(values) if isinstance(values, list | tuple) else [values] * batch
            if len(values) != batch:
                raise ValueError(f"condition {name!r} has {len(values)} entries for {batch} sample(s).")
            if name in REGION_INPUTS:
                encoded[name] = torch.tensor([_region(name, entry) for entry in values])
            else:
                encoded[name] = torch.tensor([_number(name, entry) for entry in values])
        return encoded

    def _check_conditions(
        self, conditions: Mapping[str, torch.Tensor] | None, sample: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        conditions = {} if conditions is None else conditions
        found = {name: tuple(tensor.shape) for name, tensor in conditions.items()}
        expected = {name: (len(sample), 3) if name == "spacing" else (len(sample),) for name in self.condition_names}
        if found != expected:
            raise ValueError(
                f"this network takes conditions of the shapes {expected}, got {found}; make them with "
                "encode_conditions(conditions, batch)."
            )
        return {name: tensor.to(sample.device) for name, tensor in conditions.items()}

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> DiffusionUNet3DOutput | tuple[torch.Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: noisy latents (B, in_channels, x, y, z); sides must be multiples of ``size_divisor``.
            timestep: one number for the batch, or (B,).
            class_labels: (B,) in [0, num_class_embeds), None for the null class.
            return_dict: return ``DiffusionUNet3DOutput`` or a tuple.
            conditions: what `encode_conditions` gives.

        Raises:
            ValueError: wrong rank, channels, size (with the nearest that fits), labels or conditions.
        """
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"sample must have shape (B, {self.config.in_channels}, x, y, z), got {tuple(sample.shape)}."
            )
        check_divisible(sample.shape[2:], self.size_divisor, "latent shape")
        conditions = self._check_conditions(conditions, sample)
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])

        embedding = self.time_embed(get_timestep_embedding(timesteps, self.block_out_channels[0]).to(sample.dtype))
        if self.null_class is not None:
            if class_labels is None:
                class_labels = torch.full((sample.shape[0],), self.null_class)
            if class_labels.shape != (sample.shape[0],):
                raise ValueError(f"class_labels must have shape ({sample.shape[0]},), got {tuple(class_labels.shape)}.")
            labels = class_labels.to(sample.device, torch.long)
            embedding = embedding + self.class_embedding(labels).to(sample.dtype)
        elif class_labels is not None:
            raise ValueError("this network has num_class_embeds=None, so class_labels must be None.")

        parts = [embedding]  # in MONAI's order
        if self.config.include_region:
            layers = (self.top_region_index_layer, self.bottom_region_index_layer)
            for name, layer in zip(REGION_INPUTS, layers, strict=True):
                one_hot = F.one_hot(conditions[name], len(REGIONS))
                parts.append(layer(GAIN * one_hot.to(sample.dtype)))
        if self.config.include_spacing:
            parts.append(self.spacing_layer((GAIN * conditions["spacing"]).to(sample.dtype)))
        embedding = torch.cat(parts, dim=1)

        context = None
        if self.config.context_names:
            values = torch.stack([conditions[name] for name in self.config.context_names], dim=1).to(sample.dtype)
            context = values[:, None]  # (B, 1 token, number of names)
            if self.config.concat_context:
                maps = values[..., None, None, None].expand(-1, -1, *sample.shape[2:])
                sample = torch.cat([sample, maps], dim=1)

        hidden = self.conv_in(sample)
        residuals = [hidden]
        for block in self.down_blocks:
            hidden, block_residuals = self._call(block, hidden, embedding, context)
            residuals.extend(block_residuals)
        hidden = self._call(self.middle_block, hidden, embedding, context)
        for block in self.up_blocks:
            count = len(block.resnets)
            block_residuals, residuals = residuals[-count:], residuals[:-count]
            hidden = self._call(block, hidden, block_residuals, embedding, context)
        prediction = self.out(hidden)
        return DiffusionUNet3DOutput(sample=prediction) if return_dict else (prediction,)


def _number(name: str, value: float) -> float:
    if not isinstance(value, Real) or not abs(value) <= torch.finfo(torch.float32).max:  # so is NaN
        raise ValueError(f"condition {name!r} must be a finite number, got {value!r}.")
    return float(value)


def _region(name: str, value: str | int) -> int:
    if value in REGIONS:
        return REGIONS.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(REGIONS):
        raise ValueError(f"condition {name!r} must be one of {list(REGIONS)} or an index from 0 to 3, got {value!r}.")
    return value
