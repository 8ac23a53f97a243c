"""VQModel3D: MONAI's VQVAE as a diffusers model (trained with a discriminator it is a 3D VQ-GAN)."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from monai.networks.nets import VQVAE

from .latents import NormalizedLatentsMixin
from .sizes import check_divisible, check_volumes

RESTART_SHARE = 0.1
"""A code restarts when its use falls under this share of an even spread over the codebook, and has this share then: a
new place that nobody uses at once is given up at once."""


class VQModel3D(NormalizedLatentsMixin, ModelMixin, VQVAE, ConfigMixin):
    """3D VQ autoencoder (van den Oord et al. 2017, arXiv 1711.00937; VQ-GAN: Esser et al. 2021, arXiv 2012.09841).

    Diffusion runs on the continuous encoder output; ``decode`` quantises before it decodes, as latent diffusion does
    (Rombach et al. 2022, section 3.1). State-dict keys are MONAI's, calls are those of diffusers' ``VQModel``:
    ``encode(volumes).latents``, ``decode(latents).sample`` and ``model(volumes).sample``.

    In training mode, codes that hardly any latent uses restart at random latents of the batch (Dhariwal et al. 2020,
    arXiv 2005.00341, section 3); the first batch starts them all. MONAI's quantiser flings codes that are not used at
    once so far away that they never are: without restarts two of 256 codes remain.

    Args:
        in_channels, out_channels: image channels.
        channels: channels of each level; **every** level halves the side, so two levels give f = 4.
        num_res_layers: residual layers per level.
        num_res_channels: channels inside the residual layers, one per level.
        num_embeddings: codebook size.
        embedding_dim: channels of the latent space.
        commitment_cost: weight of the commitment loss.
        decay: decay of the codebook's moving average.
        latents_mean, latents_std: per-channel statistics of the encoder output over the training set.
        atlas_shape: size (x, y, z) of the atlas of the latents, see ``NormalizedLatentsMixin``; None for none.
        data_settings: how the volumes of the training data were made (grid, intensity, classes), as
            ``data.DataSettings.to_dict`` gives it; None where that is not known.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["quantizer"]  # MONAI's quantiser compares float32 latents with the codebook

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        num_res_layers: int = 1,
        num_res_channels: Sequence[int] = (32, 64),
        num_embeddings: int = 512,
        embedding_dim: int = 8,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        atlas_shape: Sequence[int] | None = None,
        data_settings: dict[str, Any] | None = None,
    ) -> None:
        VQVAE.__init__(
            self,
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=tuple(channels),
            num_res_layers=num_res_layers,
            num_res_channels=tuple(num_res_channels),
            downsample_parameters=((2, 4, 1, 1),) * len(channels),
            upsample_parameters=((2, 4, 1, 1, 0),) * len(channels),
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            commitment_cost=commitment_cost,
            decay=decay,
        )
        self.downsample_factor = 2 ** len(channels)
        self.latent_channels = embedding_dim
        self._add_atlas(atlas_shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Self:
        super()._apply(fn, *args, **kwargs)
        self.quantizer.float()  # ... also after ``.to(dtype)`` and ``.half()``
        return self

    @apply_forward_hook  # so that enable_model_cpu_offload brings the weights to the device
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Encode volumes (B, C, X, Y, Z) in [0, 1].

        Returns:
            ``latents``, encoder output (B, embedding_dim, X/f, Y/f, Z/f), not quantised.
        """
        check_volumes(x, self.config.in_channels)
        check_divisible(x.shape[2:], self.downsample_factor, "volume shape")
        latents = self._run(self.encoder.blocks, x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, h: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Quantise and decode encoder output (B, embedding_dim, x, y, z); codes themselves are their own nearest.

        Returns:
            ``sample``, volumes (B, C, x*f, y*f, z*f), not clamped, and ``commit_loss``, a scalar.
        """
        codes, commit_loss = self.quantize(h)
        decoded = self._run(self.decoder.blocks, codes.to(self.dtype))
        return DecoderOutput(sample=decoded, commit_loss=commit_loss) if return_dict else (decoded, commit_loss)

    def forward(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encode, quantise and decode volumes (B, C, X, Y, Z) in [0, 1]; returns what `decode` does."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def encode_moments(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.encode(volumes).latents
        return latents, torch.zeros_like(latents)

    def encode_stage_2_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of ``x``, for MONAI's inferers."""
        return self.quantize(self.encode(x).latents)[0]

    def decode_stage_2_outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Volumes of latents ``z``, for MONAI's inferers."""
        return self.decode(z).sample

    def decode_samples(self, embedding_indices: torch.Tensor) -> torch.Tensor:
        """Volumes of indices of codes (B, x, y, z), as MONAI's method of this name."""
        return self.decode(self.quantizer.embed(embedding_indices)).sample

    def quantize(self, encodings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder output (B, embedding_dim, x, y, z) to nearest codes (straight-through) and the commitment loss."""
        with torch.autocast(encodings.device.type, enabled=False):  # MONAI switches it off for CUDA only
            encodings = encodings.float()
            if self.quantizer.training:
                self._restart_unused_codes(encodings)
            return super().quantize(encodings)

    def index_quantize(self, images: torch.Tensor) -> torch.Tensor:
        """Volumes (B, C, X, Y, Z) in [0, 1] to indices of the nearest codes (B, X/f, Y/f, Z/f)."""
        encodings = self.encode(images).latents
        with torch.autocast(encodings.device.type, enabled=False):
            return self.quantizer.quantize(encodings)

    @torch.no_grad()
    def _restart_unused_codes(self, encodings: torch.Tensor) -> None:
        quantizer = self.quantizer.quantizer
        latents = encodings.movedim(1, -1).flatten(0, -2)
        even_spread = len(latents) / quantizer.num_embeddings
        unused = quantizer.ema_cluster_size < RESTART_SHARE * even_spread
        chosen = latents[torch.randint(len(latents), (quantizer.num_embeddings,)).to(latents.device)].contiguous()
        if torch.distributed.is_initialized():  # all processes must restart at the same latents
            torch.distributed.broadcast(chosen, src=0)
        quantizer.embedding.weight[unused] = chosen[unused]
        quantizer.ema_cluster_size[unused] = RESTART_SHARE * even_spread
        quantizer.ema_w[unused] = chosen[unused] * RESTART_SHARE * even_spread
