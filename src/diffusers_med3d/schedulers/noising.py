"""The forward process: at which timesteps a network is trained, noisy latents there, and what it predicts from them."""

from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from .flow import interpolate, predicts_flow, shift_times


class Noised(NamedTuple):
    """Noisy latents and what the network should predict from them, both (B, C, x, y, z) in float32."""

    state: torch.Tensor
    target: torch.Tensor


def training_timesteps(scheduler: SchedulerMixin, uniform: torch.Tensor) -> torch.Tensor:
    """Timesteps (B,) as the network sees them.

    Args:
        scheduler: of a rectified flow (its shift decides which times are trained, as it decides which are sampled), or
            of a variance-preserving diffusion.
        uniform: (B,) in [0, 1), uniform times before the shift.
    """
    total = scheduler.config.num_train_timesteps
    if predicts_flow(scheduler):
        return shift_times(uniform, scheduler.config.get("shift", scheduler.config.get("flow_shift"))) * total
    return (uniform * total).long()


def noised(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> Noised:
    """Noise clean latents.

    Args:
        scheduler: says what the network predicts: a flow's velocity (Lipman et al. 2022, arXiv 2210.02747, equation
            23), or epsilon, v (Salimans & Ho 2022, arXiv 2202.00512, appendix D) or the sample.
        clean, noise: (B, C, x, y, z), normalised latents and standard normal noise.
        timesteps: (B,), see `training_timesteps`.

    Raises:
        ValueError: a prediction type without a target.
    """
    clean, noise = clean.float(), noise.float()
    if predicts_flow(scheduler):
        return Noised(interpolate(clean, noise, timesteps / scheduler.config.num_train_timesteps), noise - clean)
    alphas = scheduler.alphas_cumprod.to(clean.device)[timesteps.long()].view(-1, 1, 1, 1, 1)
    signal, sigma = alphas.sqrt(), (1.0 - alphas).sqrt()
    kind = scheduler.config.prediction_type
    targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
    if kind not in targets:
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction; found {kind!r}.")
    return Noised(signal * clean + sigma * noise, targets[kind])
