"""Latent statistics: stored in the autoencoder's config, applied once in each direction, here and nowhere else."""

from collections.abc import Iterable

import torch

from ..hub import PublishMixin
from .checkpointing import CheckpointedBlocksMixin
from .sizes import check_divisible


class NormalizedLatentsMixin(PublishMixin, CheckpointedBlocksMixin):
    """``encode_latents`` / ``decode_latents`` of an autoencoder with ``latents_mean``, ``latents_std`` in its config.

    Subclasses give ``encode_moments(volumes) -> (mean, sigma)``, ``decode_raw(latents) -> volumes``,
    ``downsample_factor`` and ``latent_channels``.
    """

    downsample_factor: int
    latent_channels: int

    def _run(self, blocks: torch.nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            hidden = self._call(block, hidden)
        return hidden

    def latent_shape(self, volume_shape: Iterable[int]) -> tuple[int, int, int]:
        """Spatial latent size of a volume of size (X, Y, Z); raises ValueError with the nearest size that fits."""
        volume_shape = tuple(volume_shape)
        check_divisible(volume_shape, self.downsample_factor, "volume shape")
        return tuple(int(side) // self.downsample_factor for side in volume_shape)

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store per-channel mean and standard deviation (each of shape (latent_channels,)) in the config."""
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (self.latent_channels,) or not torch.isfinite(values).all():
                raise ValueError(f"latent {name} must be {self.latent_channels} finite values, got {values}.")
        if (std <= 0).any():
            raise ValueError(f"latent std must be positive, got {std.tolist()}.")
        self.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.latents_mean is None or self.config.latents_std is None:
            raise ValueError(
                f"this {type(self).__name__} has no latents_mean / latents_std in its config; "
                "estimate them over the training set and store them with set_latent_statistics(mean, std)."
            )
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(self.config.latents_mean, device=like.device, dtype=torch.float32).view(shape)
        return mean, torch.tensor(self.config.latents_std, device=like.device, dtype=torch.float32).view(shape)

    def encode_latents(self, volumes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode volumes to normalised latents.

        Args:
            volumes: (B, C, X, Y, Z) in [0, 1].
            generator: draws from the posterior; None gives its mean.

        Returns:
            float32 latents (B, latent_channels, X/f, Y/f, Z/f), about zero mean and unit variance per channel.
        """
        mean, sigma = self.encode_moments(volumes.to(self.dtype))
        latents = mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator, device=generator.device)
            latents = latents + sigma.float() * noise.to(latents.device)
        return self.normalize_latents(latents)

    def normalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw encoder output to zero mean and unit variance per channel, for latents that were cached raw."""
        mean, std = self._statistics(latents)
        return (latents.float() - mean) / std

    def denormalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``normalize_latents``."""
        mean, std = self._statistics(latents)
        return latents.float() * std + mean

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents (B, latent_channels, x, y, z) to float32 volumes (B, C, X, Y, Z) in [0, 1]."""
        return self.decode_raw(self.denormalize_latents(latents).to(self.dtype)).float().clamp(0.0, 1.0)
