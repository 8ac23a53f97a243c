"""AutoencoderKL3D: MONAI's AutoencoderKL as a diffusers model."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from monai.networks.nets import AutoencoderKL

from .convolution import quicken_small_convolutions
from .latents import NormalizedLatentsMixin
from .sizes import check_divisible, check_volumes
from .slabs import decode_in_slabs


class DiagonalGaussianDistribution3D(DiagonalGaussianDistribution):
    """Normal distribution with independent elements, of 3D latents (B, c, x, y, z).

    diffusers' class with its attributes ``mean``, ``std``, ``var`` and ``logvar`` and its methods ``mode()`` and
    ``sample(generator)``. Its sums leave out the last axis of a 3D latent; those here do not.
    """

    def kl(self, other: "DiagonalGaussianDistribution3D | None" = None) -> torch.Tensor:
        """Kullback-Leibler divergence from ``other``, by default the standard normal (Kingma & Welling 2014,
        arXiv 1312.6114, appendix B).

        Returns:
            float32 (B,), summed over channels and places.
        """
        mean, logvar = self.mean.float(), self.logvar.float()
        other_mean = 0.0 if other is None else other.mean.float()
        other_logvar = torch.zeros_like(logvar) if other is None else other.logvar.float()
        squares = (mean - other_mean).square() / other_logvar.exp()
        return 0.5 * (squares + (logvar - other_logvar).exp() - 1 - logvar + other_logvar).flatten(1).sum(1)

    def nll(self, sample: torch.Tensor, dims: tuple[int, ...] = (1, 2, 3, 4)) -> torch.Tensor:
        """Negative log-likelihood of ``sample``, summed over ``dims``: (B,)."""
        return super().nll(sample, list(dims))


class KLCodecMixin(NormalizedLatentsMixin):
    """``encode``, ``decode`` and ``forward`` of diffusers' ``AutoencoderKL`` for MONAI's AutoencoderKL family."""

    @apply_forward_hook  # so that enable_model_cpu_offload brings the weights to the device
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution3D]:
        """Encode volumes to the distribution of their raw latents.

        Args:
            x: volumes (B, C, X, Y, Z) in [0, 1].
            return_dict: return ``AutoencoderKLOutput`` or a tuple.

        Returns:
            ``latent_dist`` with ``mean`` and ``std`` (B, latent_channels, X/f, Y/f, Z/f).
        """
        check_volumes(x, self.config.in_channels)
        check_divisible(x.shape[2:], self.downsample_factor, "volume shape")
        hidden = self._run(self.encoder.blocks, x)
        moments = torch.cat([self.quant_conv_mu(hidden), self.quant_conv_log_sigma(hidden)], dim=1)
        posterior = DiagonalGaussianDistribution3D(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode raw latents (B, latent_channels, x, y, z).

        Returns:
            ``sample``, volumes (B, C, x*f, y*f, z*f), not clamped.
        """
        hidden = self.post_quant_conv(z)
        if hidden.device.type == "cpu":  # benchmarks/README.md: 0.85 of the time at 64^3
            hidden = hidden.contiguous(memory_format=torch.channels_last_3d)
        decoded = self._decode_blocks(hidden)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def _decode_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._run(self.decoder.blocks, hidden)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode volumes.

        Args:
            sample: volumes (B, C, X, Y, Z) in [0, 1].
            sample_posterior: decode a draw from the distribution of the latents instead of its mean.
            return_dict: return ``DecoderOutput`` or a tuple.
            generator: of the draw.

        Returns:
            ``sample``, volumes (B, C, X, Y, Z), not clamped.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def encode_moments(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.encode(volumes).latent_dist
        return posterior.mean, posterior.std

    def encode_stage_2_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """A draw of raw latents of ``x``, for MONAI's inferers."""
        return self.encode(x).latent_dist.sample()

    def decode_stage_2_outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Volumes of raw latents ``z``, for MONAI's inferers."""
        return self.decode(z).sample

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Round trip of ``x`` through the mean of its latents, as MONAI's method of this name."""
        return self(x).sample


class AutoencoderKL3D(KLCodecMixin, ModelMixin, AutoencoderKL, ConfigMixin):
    """KL-regularised 3D autoencoder (Rombach et al. 2022, arXiv 2112.10752; Pinaya et al. 2022, arXiv 2209.07162).

    State-dict keys are MONAI's, calls are those of diffusers' ``AutoencoderKL``: ``encode(volumes).latent_dist``,
    ``decode(latents).sample`` and ``model(volumes).sample`` work on raw latents. ``encode_latents`` and
    ``decode_latents`` work on normalised ones, as the pipeline does.

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
        data_settings: how the volumes of the training data were made (grid, intensity, classes), as
            ``data.DataSettings.to_dict`` gives it; None where that is not known.
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
        data_settings: dict[str, Any] | None = None,
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
        self.num_splits = 1
        self._add_atlas(atlas_shape)
        quicken_small_convolutions(self)

    def set_num_splits(self, num_splits: int) -> None:
        """Decode in this many slabs along the first axis wherever no gradient is needed: less memory, the same volumes
        up to rounding. 1 switches it off.
        """
        if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits must be a whole number of at least 1, got {num_splits!r}.")
        self.num_splits = num_splits

    def fitting_splits(self, at_most: int, latent_shape: Sequence[int]) -> int:
        """The largest number up to `at_most` that `set_num_splits` takes for latents of this size (x, y, z): any."""
        return at_most

    def _decode_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.num_splits == 1 or torch.is_grad_enabled():
            return super()._decode_blocks(hidden)
        return decode_in_slabs(self.decoder.blocks, hidden, self.num_splits)
