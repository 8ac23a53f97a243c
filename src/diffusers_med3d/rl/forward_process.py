"""The forward-process objective: the denoising loss of clean samples in the place of the density of sampling steps.

Advantage-weighted matching (AWM, Xue et al. 2025, arXiv 2509.25050, section 4): the policy's own samples x_0 are noised
again, x_t = a_t x_0 + s_t noise, and the log-likelihood of a sample is replaced by minus its denoising loss,
-||prediction(x_t, t) - target||^2, the loss of pre-training. Then follow the ratio, the clip and the advantages of PPO.
Any sampler may have made x_0, and nothing of its steps is kept.

A prediction is seen here as the Gaussian N(prediction, 1/2): its log-density of the target is minus the mean square
error, and the KL of two predictions is their mean square difference, both as means over all non-batch dimensions like
those of `transition.py`.
"""

import math
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from ..schedulers.flow import interpolate, predicts_flow, shift_times
from .transition import Transition

STD = math.sqrt(0.5)  # so that 2 STD^2 = 1


class Noised(NamedTuple):
    """Noisy latents and what the network should predict from them, both (B, C, X, Y, Z) in float32."""

    state: torch.Tensor
    target: torch.Tensor


def forward_timesteps(scheduler: SchedulerMixin, count: int, seed: int) -> tuple[float, ...]:
    """Draw `count` timesteps, one from each of as many equal parts of the times that the scheduler trains.

    Args:
        scheduler: of a rectified flow (its shift moves the times) or of a variance-preserving diffusion.
        count: at least 1.
        seed: shared by all ranks, e.g. `derive_seed(seed, rollout)`.
    """
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = (torch.arange(count) + uniform) / count
    total = scheduler.config.num_train_timesteps
    if predicts_flow(scheduler):
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift"))
        return tuple((shift_times(spread, shift) * total).tolist())
    return tuple(int(time * total) for time in spread.tolist())


def noised(scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timestep: float) -> Noised:
    """Noise clean samples again.

    Args:
        scheduler: says what the network predicts: a flow's velocity (Lipman et al. 2022, arXiv 2210.02747, equation
            23), or epsilon, v (Salimans & Ho 2022, arXiv 2202.00512, appendix D) or the sample.
        clean, noise: (B, C, X, Y, Z).
        timestep: one for the whole batch, from `forward_timesteps`.

    Raises:
        ValueError: a prediction type without a target.
    """
    clean, noise = clean.float(), noise.float()
    if predicts_flow(scheduler):
        times = torch.full((len(clean),), timestep / scheduler.config.num_train_timesteps)
        return Noised(interpolate(clean, noise, times), noise - clean)
    alpha = float(scheduler.alphas_cumprod[int(timestep)])
    signal, sigma = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    kind = scheduler.config.prediction_type
    targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
    if kind not in targets:
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction; found {kind!r}.")
    return Noised(signal * clean + sigma * noise, targets[kind])


def matching(prediction: torch.Tensor) -> Transition:
    """The Gaussian around a prediction (B, C, X, Y, Z) under which the log-density of a target is minus its error."""
    return Transition(prediction.float(), STD)
