"""A step of a rectified flow with noise added such that the distribution at every time stays that of the flow.

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), section 4.2. With velocity v, noise = x_t + (1 - t) v and thus score
-(x_t + (1 - t) v) / t, the Fokker-Planck equation of

    dx = [v + sigma_t^2 / (2 t) (x_t + (1 - t) v)] dt + sigma_t dw,    sigma_t = a sqrt(t / (1 - t)),    t from 1 to 0,

is the continuity equation of dx = v dt for any a. One Euler-Maruyama step over dt = t_next - t < 0 is the Gaussian
N(x_t + [...] dt, sigma_t^2 |dt|). Distributions are kept exactly for small steps only: for data ~ N(0, 1) ten steps end
at a standard deviation of 0.97 (a = 0.7) or 1.00 (a = 1); without noise they end at 0.88.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

NEARLY_ONE = 1.0 - 1e-6


def flow_times(scheduler: FlowMatchEulerDiscreteScheduler, timestep: float) -> tuple[float, float]:
    """t in [0, 1] at `timestep` and at the one that `scheduler.step` goes to."""
    timesteps = scheduler.timesteps.tolist()
    if timestep not in timesteps:
        raise ValueError(f"Timestep {timestep} is none of the scheduler's: {timesteps}.")
    index = timesteps.index(timestep)
    return float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1])


def flow_sde(
    velocity: torch.Tensor, sample: torch.Tensor, time: float, next_time: float, noise_level: float
) -> tuple[torch.Tensor, float]:
    """Mean (B, C, X, Y, Z) and std of one stochastic step from `time` to `next_time` < `time`; a is `noise_level`.

    sigma_t is infinite at t = 1; there, as in the authors' code, 1 - t is replaced by that of the next time.
    """
    remaining = 1.0 - (time if time < NEARLY_ONE else next_time)
    variance_rate = noise_level**2 * time / remaining  # sigma_t^2
    noise = sample + (1.0 - time) * velocity
    drift = velocity + (variance_rate / (2.0 * time)) * noise
    return sample + (next_time - time) * drift, math.sqrt(variance_rate * (time - next_time))
