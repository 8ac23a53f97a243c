"""Latent statistics: stored in the autoencoder's config, applied once in each direction, here and nowhere else."""

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from ..hub.publish import PublishMixin
from .casting import QuietCastMixin
from .checkpointing import CheckpointedBlocksMixin
from .sizes import check_divisible


class NormalizedLatentsMixin(PublishMixin, QuietCastMixin, CheckpointedBlocksMixin):
    """``encode_latents`` / ``decode_latents`` of an autoencoder with ``latents_mean``, ``latents_std`` in its config.

    Where scans lie in one frame, as heads do, most of a latent is the anatomy that all of them share. The buffer
    ``latents_atlas`` (latent_channels, x, y, z) holds it: by how much the mean latent of a place differs from the mean
    of its channel. Normalised latents are then what makes one subject different from the mean, and a generator need
    not learn from noise where a brain is. Latents of another size get the atlas resized.

    Subclasses give ``encode_moments`` and ``decode``, ``downsample_factor`` and ``latent_channels``, and call
    ``_add_atlas``.
    """

    downsample_factor: int
    latent_channels: int
    latents_atlas: torch.Tensor | None

    def encode_moments(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the raw latents of volumes (B, C, X, Y, Z), each (B, latent_channels, X/f,
        Y/f, Z/f); zeros where latents are not drawn.
        """
        raise NotImplementedError

    def _run(self, blocks: torch.nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            hidden = self._call(block, hidden)
        return hidden

    def latent_shape(self, volume_shape: Iterable[int]) -> tuple[int, int, int]:
        """Spatial latent size of a volume of size (X, Y, Z); raises ValueError with the nearest size that fits."""
        x, y, z = check_divisible(tuple(volume_shape), self.downsample_factor, "volume shape")
        return x // self.downsample_factor, y // self.downsample_factor, z // self.downsample_factor

    def _add_atlas(self, shape: Iterable[int] | None) -> None:
        for name in ("latents_mean", "latents_std"):
            if self.config[name] is not None and len(self.config[name]) != self.latent_channels:
                raise ValueError(f"{name} must be {self.latent_channels} numbers, got {self.config[name]}.")
        self.register_buffer("latents_atlas", None if shape is None else torch.zeros(self.latent_channels, *shape))

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor, atlas: torch.Tensor | None = None) -> None:
        """Store what latents are normalised by: (latents - mean - atlas) / std.

        Args:
            mean, std: per channel (latent_channels,).
            atlas: difference of every place from ``mean``, (latent_channels, x, y, z); None is zero everywhere.
        """
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (self.latent_channels,) or not torch.isfinite(values).all():
                raise ValueError(f"latent {name} must be {self.latent_channels} finite values, got {values}.")
        if (std <= 0).any():
            raise ValueError(f"latent std must be positive, got {std.tolist()}.")
        if atlas is not None:
            if "atlas_shape" not in self.config:
                raise ValueError(f"{type(self).__name__} has no atlas of its latents.")
            if atlas.ndim != 4 or len(atlas) != self.latent_channels or not torch.isfinite(atlas).all():
                raise ValueError(f"atlas must be finite, ({self.latent_channels}, x, y, z); got {tuple(atlas.shape)}.")
        self.latents_atlas = None if atlas is None else atlas.to(self.device, self.dtype)
        if "atlas_shape" in self.config:
            self.register_to_config(atlas_shape=None if atlas is None else list(atlas.shape[1:]))
        self.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is subtracted from raw latents and what they are divided by."""
        if self.config.latents_mean is None or self.config.latents_std is None:
            raise ValueError(
                f"this {type(self).__name__} has no latents_mean / latents_std in its config; "
                "estimate them over the training set and store them with set_latent_statistics(mean, std)."
            )
        mean, std = (
            torch.tensor(values, device=like.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        if self.latents_atlas is not None:
            atlas = self.latents_atlas[None].to(like.device, torch.float32)
            if atlas.shape[2:] != like.shape[2:]:
                atlas = F.interpolate(atlas, like.shape[2:], mode="trilinear")
            mean = mean + atlas
        return mean, std

    def encode_latents(self, volumes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode volumes to normalised latents.

        Args:
            volumes: (B, C, X, Y, Z) in [0, 1].
            generator: draws from the posterior; None gives its mean.

        Returns:
            float32 latents (B, latent_channels, X/f, Y/f, Z/f), about zero mean and unit variance.
        """
        mean, sigma = self.encode_moments(volumes.to(self.dtype))
        latents = mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator, device=generator.device)
            latents = latents + sigma.float() * noise.to(latents.device)
        return self.normalize_latents(latents)

    def normalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw encoder output to zero mean and unit variance, for latents that were cached raw."""
        mean, std = self._statistics(latents)
        return (latents.float() - mean) / std

    def denormalize_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``normalize_latents``."""
        mean, std = self._statistics(latents)
        return latents.float() * std + mean

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents (B, latent_channels, x, y, z) to float32 volumes (B, C, X, Y, Z) in [0, 1]."""
        return self.decode(self.denormalize_latents(latents).to(self.dtype)).sample.float().clamp(0.0, 1.0)
