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

import torch
from diffusers import SchedulerMixin

from ..schedulers.noising import training_timesteps
from .transition import Transition

STD = math.sqrt(0.5)  # so that 2 STD^2 = 1


def forward_timesteps(scheduler: SchedulerMixin, count: int, seed: int) -> tuple[float, ...]:
    """Draw `count` timesteps, one from each of as many equal parts of the times that the scheduler trains.

    Args:
        scheduler: of a rectified flow (its shift moves the times) or of a variance-preserving diffusion.
        count: at least 1.
        seed: shared by all ranks, e.g. `derive_seed(seed, rollout)`.
    """
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = (torch.arange(count) + uniform) / count
    return tuple(training_timesteps(scheduler, spread).tolist())


def matching(prediction: torch.Tensor) -> Transition:
    """The Gaussian around a prediction (B, C, X, Y, Z) under which the log-density of a target is minus its error."""
    return Transition(prediction.float(), STD)
