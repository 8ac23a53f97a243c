"""A MONAI bundle to a pipeline: definitions to networks, weights into them, scale factor to latent statistics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from .definitions import BundleConfig
from .networks import Autoencoder, UNet, build_autoencoder, build_scheduler, build_unet
from .weights import attention_without_fc, load_exactly, read_weights

LAST_LAYER = ("out.2.conv.weight", "out.2.conv.bias")
"""Of every UNet: what it predicts is linear in these."""


class Conversion(NamedTuple):
    """A pipeline, and the keys of tensors that stood in the weights without any network applying them."""

    pipeline: MedDiffusion3DPipeline
    left_out: list[str]


@torch.no_grad()
def negate_prediction_(unet: UNet) -> UNet:
    """Turn the sign of what a UNet predicts: MONAI's flows predict data - noise, diffusers' noise - data."""
    parameters = dict(unet.named_parameters())
    for name in LAST_LAYER:
        parameters[name].neg_()
    return unet


@torch.no_grad()
def estimate_scale_factor(autoencoder: Autoencoder, volumes: Iterable[Tensor]) -> float:
    """1 / standard deviation of the latents over all volumes: what MONAI's scripts take from a single batch.

    The latents are those that are drawn from the posterior, so its variance counts too.

    Args:
        autoencoder: with its weights; latent statistics are neither needed nor written.
        volumes: each (C, X, Y, Z) in [0, 1], prepared as the autoencoder's training data were.

    Raises:
        ValueError: no volumes, or latents that do not vary.
    """
    count, total, squares = 0, 0.0, 0.0
    autoencoder.eval()
    for volume in volumes:
        batch = volume.as_subclass(torch.Tensor)[None].to(autoencoder.device, autoencoder.dtype)
        mean, sigma = (moment.double() for moment in autoencoder.encode_moments(batch))
        count += mean.numel()
        total += mean.sum().item()
        squares += (mean.square() + sigma.square()).sum().item()
    if count == 0:
        raise ValueError("there are no volumes to estimate the scale factor from.")
    variance = squares / count - (total / count) ** 2
    if not 0 < variance < float("inf"):
        raise ValueError(f"the latents have a variance of {variance}; the scale factor cannot be estimated from them.")
    return variance**-0.5


def convert_bundle(
    config: BundleConfig,
    autoencoder_weights: str | Path,
    unet_weights: str | Path,
    scale_factor: float | None = None,
    read_volumes: Callable[[Sequence[int], Sequence[float]], Iterable[Tensor]] | None = None,
    volume_shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    class_names: Mapping[str, int] | None = None,
    context_names: Sequence[str] | None = None,
    intensity: str = "[0, 1]",
) -> Conversion:
    """Build the pipeline that a bundle describes.

    Args:
        config: from `read_bundle`.
        autoencoder_weights, unet_weights: checkpoints in any published layout; see `read_weights`.
        scale_factor: the factor that latents were multiplied with in training; by default that of the checkpoint or
            the config.
        read_volumes: gives the volumes, of a size and spacing, that the factor is estimated from instead
            (`estimate_scale_factor`).
        volume_shape, spacing: default size (X, Y, Z) in voxels and voxel size in mm, where the config names none.
        class_names: names of classes with their indices.
        context_names: names of the numbers of the cross-attention, where the config names none.
        intensity: in words, what 0 and 1 stand for.

    Raises:
        ValueError: something is missing, does not fit or cannot be converted; the message says what.
    """
    if scale_factor is not None and read_volumes is not None:
        raise ValueError("give a scale factor or volumes to estimate it from, not both.")
    state, _ = read_weights(autoencoder_weights)
    vae = build_autoencoder(config.autoencoder, attention_without_fc(state))
    left_out = load_exactly(vae, state, config.autoencoder.name)
    state, stored_factor = read_weights(unet_weights)
    names = context_names or config.context_names
    # in a transformer GenerativeModels does apply the last linear layer, which is called to_out there
    unet = build_unet(config.unet, vae.latent_channels, names, attention_without_fc(state))
    left_out += load_exactly(unet, state, config.unet.name)

    if volume_shape is None and config.latent_shape is not None:
        volume_shape = [side * vae.downsample_factor for side in config.latent_shape]
    volume_shape = volume_shape or config.volume_shape
    spacing = spacing or config.spacing
    if volume_shape is None or spacing is None:
        what = "volume_shape (X, Y, Z in voxels)" if volume_shape is None else "spacing (X, Y, Z in mm)"
        raise ValueError(f"the config does not say {what} in plain numbers; please give it.")

    if read_volumes is not None:
        scale_factor = estimate_scale_factor(vae, read_volumes(volume_shape, spacing))
    elif scale_factor is None:
        scale_factor = stored_factor if stored_factor is not None else config.scale_factor
    if scale_factor is None:
        raise ValueError(
            "neither the weights nor the config hold the scale factor of the latents. MONAI's training scripts take it "
            "from one random batch and save it nowhere. Estimate it from scans prepared as in training, or give it; "
            "1.0 is what the samplers of the bundles brats_mri_generative_diffusion and "
            "brain_image_synthesis_latent_diffusion_model use."
        )
    if not 0 < scale_factor < float("inf"):
        raise ValueError(f"the scale factor must be a positive number, got {scale_factor}.")
    vae.set_latent_statistics(torch.zeros(vae.latent_channels), torch.full((vae.latent_channels,), 1 / scale_factor))

    scheduler = build_scheduler(
        config.scheduler, vae.latent_shape(volume_shape), config.timestep_spacing, config.zero_terminal_snr
    )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        negate_prediction_(unet)
    pipeline = MedDiffusion3DPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        scheduler=scheduler,
        volume_shape=tuple(volume_shape),
        spacing=tuple(spacing),
        class_names=None if class_names is None else dict(class_names),
        intensity=intensity,
    )
    return Conversion(pipeline, left_out)
