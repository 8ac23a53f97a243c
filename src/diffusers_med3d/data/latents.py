"""Latents of augmented scans, cached as mean and sigma: drawing from them each time keeps the posterior's noise."""

from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..models import AutoencoderKL3D, VQModel3D
from ..utils.files import whole_file
from ..utils.hashing import tensor_hash
from .transforms import flip_and_shift
from .volumes import VolumeDataset


class LatentDataset(TorchDataset):
    """Normalised latents drawn from the cached posteriors of every scan and its augmented copies.

    An item is ``{"index": int}``, the scan; the training step draws latents with ``draw``. The loader reads a
    batch ahead of the step, so latents that it drew would leave the random state of a checkpoint one batch ahead, and a
    resumed run would not repeat an uninterrupted one. The cache holds raw mean and sigma (float16) and is made again
    when scans, augmentation or autoencoder changed.

    Args:
        volumes: scans to encode.
        autoencoder: with latent statistics.
        cache_file: safetensors file, written whole or not at all.
        copies: augmented copies per scan; the first is the scan as it is. Every epoch draws one copy of every scan.
        max_shift: see ``flip_and_shift``.
        seed: of the augmentation.
    """

    def __init__(
        self,
        volumes: VolumeDataset,
        autoencoder: AutoencoderKL3D | VQModel3D,
        cache_file: str | Path,
        copies: int = 8,
        max_shift: int = 2,
        seed: int = 0,
    ) -> None:
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}.")
        self.autoencoder, self.copies = autoencoder, copies
        cache_file = Path(cache_file)
        fingerprint = _fingerprint(volumes, autoencoder, copies, max_shift, seed)
        cached = None
        if cache_file.is_file():
            with safe_open(cache_file, "pt") as file:
                if file.metadata() == {"fingerprint": fingerprint}:
                    cached = {"mean": file.get_tensor("mean"), "sigma": file.get_tensor("sigma")}
        if cached is None:
            cached = _encode(volumes, autoencoder, copies, max_shift, seed)
            with whole_file(cache_file) as temporary:
                save_file(cached, temporary, metadata={"fingerprint": fingerprint})
        self.mean, self.sigma = cached["mean"], cached["sigma"]  # (N, copies, c, x, y, z)

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}

    def variance(self) -> Tensor:
        """Variance of the normalised latents about 0, their mean, per channel and place: (c, x, y, z)."""
        mean, sigma = (values.flatten(0, 1) for values in (self.mean, self.sigma))
        shift = self.autoencoder.normalize_latents(torch.zeros(1, *mean.shape[1:]))
        scale = self.autoencoder.normalize_latents(torch.ones(1, *mean.shape[1:])) - shift  # 1 / std
        total = sum(
            ((m.float() * scale + shift).square() + (s.float() * scale).square()).sum(0)
            for m, s in zip(mean.split(64), sigma.split(64), strict=True)
        )
        return total / len(mean)

    def draw(self, indices: Tensor) -> Tensor:
        """Latents of one copy of each scan: (B,) to float32 (B, c, x, y, z), with torch's global generator."""
        indices = indices.cpu()
        copies = torch.randint(self.copies, indices.shape)
        mean, sigma = self.mean[indices, copies].float(), self.sigma[indices, copies].float()
        return self.autoencoder.normalize_latents(mean + sigma * torch.randn(mean.shape))


def _fingerprint(volumes: VolumeDataset, autoencoder: torch.nn.Module, *settings: int) -> str:
    state = autoencoder.state_dict()
    state.pop("latents_atlas", None)  # what is cached is raw
    scans = (("", item["volume"].as_tensor()) for item in volumes)
    return tensor_hash(chain(scans, sorted(state.items())), [*settings, [item["subject"] for item in volumes]])


@torch.no_grad()
def _encode(
    volumes: VolumeDataset, autoencoder: AutoencoderKL3D | VQModel3D, copies: int, max_shift: int, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    autoencoder.eval()
    means, sigmas = [], []
    for item in tqdm(volumes, desc="encoding scans", unit="scan"):
        volume = item["volume"].as_tensor()
        batch = torch.stack([volume] + [flip_and_shift(volume, generator, max_shift) for _ in range(copies - 1)])
        moments = [autoencoder.encode_moments(chunk.to(autoencoder.device)) for chunk in batch.split(4)]
        means.append(torch.cat([mean for mean, _ in moments]).half().cpu())
        sigmas.append(torch.cat([sigma for _, sigma in moments]).half().cpu())
    return {"mean": torch.stack(means), "sigma": torch.stack(sigmas)}
