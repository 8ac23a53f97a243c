"""Stage 1: train an autoencoder (KL, or VQ with a codebook) on crops of scans."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from matplotlib.figure import Figure
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset as TorchDataset

from .. import metrics, viz
from ..data import FOREGROUND_THRESHOLD, VolumeDataset
from ..hub.origin import inherited_license
from ..models import AutoencoderKL3D, VQModel3D
from ..utils.checks import check_least
from ..utils.padding import centred
from ..utils.wrappers import unwrapped
from .base import Med3DConfig, Med3DTrainer, describe_volumes
from .losses import gradient_l1, spectral_l1

LOSS_WEIGHTS = ("gradient_weight", "spectral_weight", "kl_weight", "commitment_weight", "adversarial_weight")


@dataclass
class AutoencoderConfig(Med3DConfig):
    """Arguments of ``AutoencoderTrainer``; loss weights multiply mean losses."""

    output_dir: str = field(default="outputs/autoencoder", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Crops per device and step."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Whole volumes at a time in evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=50, metadata={"help": "Steps of linear warm-up."})
    crop_size: int = field(
        default=32, metadata={"help": "Side of the training crops in voxels; 0 trains on whole volumes."}
    )
    gradient_weight: float = field(default=0.3, metadata={"help": "Weight of the L1 loss of finite differences."})
    spectral_weight: float = field(default=0.3, metadata={"help": "Weight of the L1 loss of Fourier amplitudes."})
    kl_weight: float = field(default=1e-4, metadata={"help": "Weight of the KL to N(0, 1), mean per latent element."})
    commitment_weight: float = field(default=1.0, metadata={"help": "Weight of the codebook's commitment loss (VQ)."})
    adversarial_weight: float = field(
        default=0.01, metadata={"help": "Weight of the patch discriminator; 0 leaves it out."}
    )
    adversarial_start: int = field(default=2800, metadata={"help": "Step at which the discriminator comes in."})
    discriminator_channels: int = field(default=16, metadata={"help": "Channels of the discriminator's first layer."})
    decoder_only: bool = field(
        default=False,
        metadata={
            "help": "Train the decoder alone, as Stability AI's sd-vae-ft-mse was made: latents and their statistics "
            "stay as they are, so generators that were trained on them go on working."
        },
    )

    latent_scaling: str = field(
        default="global",
        metadata={
            "help": "How latents are normalised: 'channel' gives every channel unit variance; 'global' divides all by "
            "the median standard deviation: the few channels of coarse anatomy, which vary more, stay louder and are "
            "generated first, and the many of fine detail are as loud as the noise schedule expects."
        },
    )
    latent_atlas: bool = field(
        default=True,
        metadata={
            "help": "Subtract from latents what all scans have in common at a place. For scans in one frame, such as "
            "heads; where the same place shows other anatomy in every scan it does nothing."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_scaling not in ("channel", "global"):
            raise ValueError(f"latent_scaling must be 'channel' or 'global', got {self.latent_scaling!r}.")
        if self.crop_size < 0:
            raise ValueError(f"crop_size must be 0 (whole volumes) or positive, got {self.crop_size}.")
        check_least(vars(self), dict.fromkeys(LOSS_WEIGHTS, 0) | {"discriminator_channels": 1})


class CropDataset(TorchDataset):
    """Random crops (C, s, s, s), flipped left-right half of the time.

    Half are centred on a foreground voxel, half lie anywhere: GroupNorm sees the whole input (docs/pitfalls.md, P20),
    so the share of background must vary in training as it does between a crop and a whole volume.

    An item is ``{"index": int}``; the training step cuts the crops with ``draw``. The loader reads a batch ahead of the
    step, so crops that it cut would leave the random state of a checkpoint one batch ahead, and a resumed run would not
    repeat an uninterrupted one.
    """

    def __init__(self, volumes: VolumeDataset, crop_size: int, divisor: int) -> None:
        sides = volumes[0]["volume"].shape[1:]
        if crop_size % divisor or crop_size > max(sides):
            raise ValueError(
                f"crop_size {crop_size} must be a multiple of {divisor} and fit in volumes of {tuple(sides)}."
            )
        self.volumes = [item["volume"].as_tensor() for item in volumes]
        self.foreground = [torch.nonzero(volume[0] > FOREGROUND_THRESHOLD) for volume in self.volumes]
        self.crop_size = crop_size

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}

    def draw(self, indices: Tensor) -> Tensor:
        """One random crop of each volume: (B,) to (B, C, s, s, s), with numbers from torch's global generator.

        Along an axis of fewer voxels (a stack of few slices) all of them are taken.
        """
        return torch.stack([self._crop(index) for index in indices.tolist()])

    def _crop(self, index: int) -> Tensor:
        volume = self.volumes[index]
        if self.crop_size:
            limit = (torch.tensor(volume.shape[1:]) - self.crop_size).clamp(min=0)
            corner = (torch.rand(3) * (limit + 1)).long()
            if torch.rand(()) < 0.5:
                foreground = self.foreground[index]
                corner = foreground[torch.randint(len(foreground), ())] - self.crop_size // 2
            x, y, z = corner.clamp(min=torch.zeros_like(limit), max=limit).tolist()
            volume = volume[:, x : x + self.crop_size, y : y + self.crop_size, z : z + self.crop_size]
        if torch.rand(()) < 0.5:
            volume = volume.flip(1)
        return volume


FILMED = 4
"""Scans of the pictures by which a run is watched."""

DISCRIMINATOR_SIDE = 12
"""Voxels that a side must have for the discriminator's four convolutions to leave one patch."""


def pad_thin(volume: Tensor) -> Tensor:
    """Background (0) around a (B, C, X, Y, Z) stack on the sides that are too short for the discriminator."""
    return centred(volume, [max(side, DISCRIMINATOR_SIDE) for side in volume.shape[2:]])


def latent_statistics(
    moments: Iterable[tuple[Tensor, Tensor]], atlas: bool = True, scaling: str = "channel"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What normalises latents, with the posterior's noise counted in.

    Args:
        moments: mean and sigma (c, x, y, z) of every training volume.
        atlas: subtract the mean latent of every place, not of a channel alone.
        scaling: "channel": every channel gets its own standard deviation; "global": all get the median one.

    Returns:
        mean (c,), standard deviation (c,) of what is left after mean and atlas, and atlas (c, x, y, z) or None.
    """
    total = squares = torch.zeros((), dtype=torch.double)
    count = 0
    for mean, sigma in moments:
        mean, sigma = mean.double().cpu(), sigma.double().cpu()
        total, count = total + mean, count + 1
        squares = squares + (mean.square() + sigma.square()).mean(dim=(1, 2, 3))
    total, squares = total / count, squares / count
    mean = total.mean(dim=(1, 2, 3))
    variance = squares - (total.square().mean(dim=(1, 2, 3)) if atlas else mean.square())
    std = variance.sqrt()
    if scaling == "global":
        std = std.median().expand_as(std)
    return mean.float(), std.float(), (total - mean[:, None, None, None]).float() if atlas else None


class AutoencoderLosses(nn.Module):
    """An autoencoder, its discriminator, and one scalar that trains both in one backward pass.

    The generator's adversarial term runs through a copy of the discriminator with detached weights and the
    discriminator's own term through a detached reconstruction, so each sees only its own gradient.
    """

    def __init__(self, autoencoder: AutoencoderKL3D | VQModel3D, args: AutoencoderConfig) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        for module in self._fixed(args):
            module.requires_grad_(False)
        self.discriminator = None
        if args.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(
                spatial_dims=3,
                channels=args.discriminator_channels,
                in_channels=autoencoder.config.out_channels,
                num_layers_d=2,
                norm=None,  # a norm takes away how strong fine detail is, which tells a scan from its round trip
                bias=True,
            )
            for layer in self.discriminator.modules():
                if isinstance(layer, nn.Conv3d):  # MONAI's N(0, 0.02) counts on norms
                    nn.init.kaiming_normal_(layer.weight, 0.2)
                    nn.init.zeros_(layer.get_parameter("bias"))
            self.adversarial_loss = PatchAdversarialLoss(criterion="least_squares")
        self.args = args

    def _fixed(self, args: AutoencoderConfig) -> list[nn.Module]:
        """What makes the latents, where the decoder alone is trained."""
        names = ("encoder", "quant_conv_mu", "quant_conv_log_sigma", "quantizer") if args.decoder_only else ()
        return [module for name, module in self.autoencoder.named_children() if name in names]

    def train(self, mode: bool = True) -> Self:
        """Training mode; what is not trained keeps its codebook too."""
        super().train(mode)
        for module in self._fixed(self.args):
            module.eval()
        return self

    def forward(self, volume: Tensor, adversarial: bool) -> dict[str, Tensor]:
        """(B, C, X, Y, Z) in [0, 1] to scalar losses; ``loss`` is the one to minimise."""
        args = self.args
        if isinstance(self.autoencoder, VQModel3D):
            reconstruction, commitment = self.autoencoder(volume, return_dict=False)
            parts = {"commitment": commitment}
            loss = args.commitment_weight * commitment
        else:
            posterior = self.autoencoder.encode(volume).latent_dist
            reconstruction = self.autoencoder.decode(posterior.sample()).sample
            parts = {"kl": posterior.kl().mean() / posterior.mean[0].numel()}
            loss = args.kl_weight * parts["kl"]
        reconstruction, volume = reconstruction.float(), volume.float()
        parts["l1"] = (reconstruction - volume).abs().mean()
        parts["gradient"] = gradient_l1(reconstruction, volume)
        parts["spectral"] = spectral_l1(reconstruction, volume)
        loss = loss + parts["l1"] + args.gradient_weight * parts["gradient"] + args.spectral_weight * parts["spectral"]
        if self.discriminator is not None and adversarial:
            frozen = {name: tensor.detach() for name, tensor in self.discriminator.named_parameters()}
            reconstruction, volume = pad_thin(reconstruction), pad_thin(volume)
            judged = functional_call(self.discriminator, frozen, (reconstruction,))[-1].float()
            parts["adversarial"] = self.adversarial_loss(judged, target_is_real=True, for_discriminator=False)
            fake = self.discriminator(reconstruction.detach())[-1].float()
            real = self.discriminator(volume)[-1].float()
            parts["discriminator"] = 0.5 * (
                self.adversarial_loss(fake, target_is_real=False, for_discriminator=True)
                + self.adversarial_loss(real, target_is_real=True, for_discriminator=True)
            )
            loss = loss + args.adversarial_weight * parts["adversarial"] + parts["discriminator"]
        return {"loss": loss, **parts}


class AutoencoderTrainer(Med3DTrainer):
    """Trains ``AutoencoderKL3D`` or ``VQModel3D`` (with the discriminator a VQ-GAN) on crops.

    At the end the latent statistics over the whole training set go into the config (not with ``decoder_only``).

    Args:
        model: the autoencoder.
        args: arguments.
        train_dataset, eval_dataset: volumes; validation volumes are encoded whole.

    Raises:
        ValueError: volumes of a size that the autoencoder cannot take, crops that cannot be cut or encoded.
    """

    _name = "Autoencoder"

    def __init__(
        self,
        model: AutoencoderKL3D | VQModel3D,
        args: AutoencoderConfig,
        train_dataset: VolumeDataset,
        eval_dataset: VolumeDataset | None = None,
        **kwargs,
    ) -> None:
        model = self.autoencoder = unwrapped(model)
        self.train_volumes = train_dataset
        model.latent_shape(train_dataset[0]["volume"].shape[1:])  # crops would fit, whole volumes not
        self.crops = CropDataset(train_dataset, args.crop_size, model.downsample_factor)
        super().__init__(
            model=AutoencoderLosses(model, args),
            args=args,
            train_dataset=self.crops,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.card_data = describe_volumes(train_dataset, eval_dataset)
        self.card_volume_shape = tuple(train_dataset[0]["volume"].shape[1:])
        self.inherited_license = inherited_license(model)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs) -> Tensor:
        """One step's loss; its parts are averaged into the next log."""
        volume = self.crops.draw(inputs["index"]).to(self.args.device)
        losses = model(volume, adversarial=self.state.global_step >= self.args.adversarial_start)
        for name, value in losses.items():
            if name != "loss":
                self.record_part(name, value)
        return losses["loss"]

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Round trips of whole validation volumes: PSNR (all, foreground), high-frequency power over the scan's.

        Scans whose round trip is NaN or infinite are left out, counted as `unjudged` and named in a warning. Where no
        other is left the PSNR is minus infinity, so that such a checkpoint is never the best.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs an eval_dataset: volumes of subjects that nothing was trained on.")
        self.model.eval()
        device = self.args.device
        volumes = dataset.stack()
        with self.ema_weights(), self.accelerator.autocast():
            chunks = volumes.split(self.args.per_device_eval_batch_size)
            reconstructions = torch.cat([self.reconstruct(chunk.to(device)).cpu() for chunk in chunks])
        usable = reconstructions.isfinite().flatten(1).all(1)
        reconstructions, scans = reconstructions[usable], volumes[usable]
        foreground = scans > FOREGROUND_THRESHOLD
        measures = {
            "psnr": (metrics.psnr, None),
            "psnr_foreground": (metrics.psnr, foreground),
            "high_frequency_ratio": (metrics.high_frequency_ratio, foreground),
        }
        results = dict.fromkeys((f"{metric_key_prefix}_{name}" for name in measures), -math.inf)
        if usable.any():
            for name, (measure, mask) in measures.items():
                results[f"{metric_key_prefix}_{name}"] = measure(reconstructions, scans, mask=mask).mean().item()
        if not usable.all():
            lost = (~usable).nonzero()[:, 0].tolist()
            warnings.warn(
                f"The round trip of {len(lost)} of {len(volumes)} validation scans is NaN or infinite, the first is "
                f"scan {lost[0]} (counted from 0): they are left out.",
                stacklevel=2,
            )
            results[f"{metric_key_prefix}_unjudged"] = float(len(lost))
        if isinstance(self.autoencoder, VQModel3D):
            results[f"{metric_key_prefix}_codes_used"] = self.codes_used(volumes)
        return self.conclude_evaluation(results)

    def film_figures(self) -> dict[str, Figure]:
        """The first validation scans, or else training scans, and their round trips."""
        dataset = self.train_volumes if self.eval_dataset is None else self.eval_dataset
        scans = torch.stack([dataset[i]["volume"].as_tensor() for i in range(min(FILMED, len(dataset)))])
        made = torch.cat([self.reconstruct(scan.to(self.args.device)).cpu() for scan in scans.split(1)])
        spacing = dataset[0]["volume"].pixdim.tolist()
        return {
            "reconstructions": viz.volume_rows(
                {"scan": scans, "round trip": made}, spacing=spacing, title=self.film_title
            )
        }

    def reconstruct(self, volumes: Tensor) -> Tensor:
        """Round trip through the posterior mean (VQ: the quantised code), clamped to [0, 1]."""
        return self.autoencoder(volumes).sample.float().clamp(0.0, 1.0)

    def codes_used(self, volumes: Tensor) -> float:
        """Share of the codebook that the volumes use."""
        indices = [self.autoencoder.index_quantize(volume.to(self.args.device)).unique() for volume in volumes.split(1)]
        return torch.cat(indices).unique().numel() / self.autoencoder.num_embeddings

    @torch.no_grad()
    def latent_statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``latent_statistics`` of the whole training set, as ``AutoencoderConfig`` says."""
        self.autoencoder.eval()
        moments = (
            self.autoencoder.encode_moments(item["volume"].as_tensor()[None].to(self.args.device))
            for item in self.train_volumes
        )
        pairs = ((mean[0], sigma[0]) for mean, sigma in moments)
        return latent_statistics(pairs, self.args.latent_atlas, self.args.latent_scaling)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the autoencoder; its latent statistics are taken anew unless the decoder alone was trained."""
        if not self.args.decoder_only:
            self.autoencoder.set_latent_statistics(*self.latent_statistics())
        self.autoencoder.register_to_config(data_settings=self.train_volumes.settings.to_dict())
        self.autoencoder.save_pretrained(folder)
