"""Rectified flow: latents move in straight lines from noise at t = 1 to data at t = 0.

x_t = (1 - t) x_0 + t noise, and the network predicts the velocity dx_t / dt = noise - x_0 (Liu et al. 2022, arXiv
2209.03003; Lipman et al. 2022, arXiv 2210.02747). Signs, times and shift are those of diffusers'
`FlowMatchEulerDiscreteScheduler`, whose timesteps are t * num_train_timesteps.
"""

from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

FLOW_TIMESTEPS = 1000
"""What t = 1 is called in timesteps."""

FLOW_PREDICTION = "flow_prediction"
"""``prediction_type`` of diffusers' multistep solvers for a network that predicts the velocity."""


def flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """1000 timesteps. A `shift` above 1 spends more of them, in training and sampling, where there is more noise."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be a positive number, got {shift}.")
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_TIMESTEPS, shift=shift, stochastic_sampling=False)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether this is the scheduler of a rectified flow that can train, sample and be fine-tuned."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def predicts_flow(scheduler: SchedulerMixin) -> bool:
    """Whether this scheduler takes a network's output for the velocity of a flow."""
    return is_flow(scheduler) or scheduler.config.get("prediction_type") == FLOW_PREDICTION


def check_supported(scheduler: SchedulerMixin) -> None:
    """Refuse, with the reason, a scheduler that nothing here can sample with.

    Raises:
        ValueError: no prediction type; a flow with inverted sigmas, a shift that is left open, or a solver whose
            settings say in part that there is a flow.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if is_flow(scheduler):
        if config.invert_sigmas or config.use_dynamic_shifting:
            raise ValueError(
                f"{name} has invert_sigmas={config.invert_sigmas}, use_dynamic_shifting={config.use_dynamic_shifting}; "
                "expected both False: write the shift for your size into shift."
            )
    elif "prediction_type" not in config:
        raise ValueError(
            f"{name} has no prediction_type; expected FlowMatchEulerDiscreteScheduler for a rectified flow, or DDPM, "
            "DDIM, DPMSolverMultistep, UniPC or Euler for a variance-preserving diffusion."
        )
    elif predicts_flow(scheduler) and not config.get("use_flow_sigmas"):
        raise ValueError(f"{name} has prediction_type={FLOW_PREDICTION!r} and must have use_flow_sigmas=True as well.")


def check_fits(scheduler: SchedulerMixin, network_predicts_flow: bool) -> None:
    """Refuse a scheduler that takes the network's output for something else: it would sample noise unnoticed.

    Raises:
        ValueError: an unsupported scheduler; a flow in place of a variance-preserving diffusion, or the reverse.
    """
    check_supported(scheduler)
    if predicts_flow(scheduler) != network_predicts_flow:
        expected = (
            "the velocity of a rectified flow; use FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler or "
            f"UniPCMultistepScheduler with prediction_type={FLOW_PREDICTION!r}, use_flow_sigmas=True and a flow_shift"
            if network_predicts_flow
            else "for a variance-preserving diffusion; use DDPM, DDIM, DPMSolverMultistep, UniPC or Euler"
        )
        raise ValueError(
            f"{type(scheduler).__name__} (prediction_type={scheduler.config.get('prediction_type')!r}) does not fit: "
            f"this network predicts {expected}."
        )


def set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None = None
) -> None:
    """`scheduler.set_timesteps`, for a flow with steps of equal length (before the shift) from t = 1 to t = 0.

    diffusers' own default for a flow goes to 1 / 1000 and from there to 0, so that the last step does nothing.
    """
    if not is_flow(scheduler):
        scheduler.set_timesteps(num_inference_steps, device=device)
        return
    times = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps, dtype=torch.float64)
    scheduler.set_timesteps(num_inference_steps, sigmas=times.tolist(), device=device)


def shift_times(times: torch.Tensor, shift: float) -> torch.Tensor:
    """Times in [0, 1] moved towards noise for a shift above 1: Esser et al. 2024 (arXiv 2403.03206), equation 23."""
    return shift * times / (1.0 + (shift - 1.0) * times)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """x_t of latents (B, C, x, y, z) and noise like them, at times (B,) in [0, 1]."""
    times = times.to(clean.device, clean.dtype).view(-1, 1, 1, 1, 1)
    return (1.0 - times) * clean + times * noise


class Preconditioning(NamedTuple):
    """Factors, float32, that broadcast over (B, C, x, y, z): velocity = skip * x_t + output * network(input * x_t)."""

    skip: torch.Tensor
    output: torch.Tensor
    input: torch.Tensor


def preconditioning(times: torch.Tensor, variance: torch.Tensor | float = 1.0) -> Preconditioning:
    """Factors with which a network of a flow sees and says values of unit variance at every time and place.

    Karras et al. 2022 (arXiv 2206.00364), equation 7, carried to flows. Their noisy sample is y = x_0 + sigma noise
    with sigma = t / (1 - t), so x_t = (1 - t) y; their denoiser D(y) stands for x_0 in the velocity (x_t - x_0) / t.
    Without the network this is the best linear prediction from each value alone.

    Args:
        times: (B,) in [0, 1].
        variance: of the data, sigma_data^2, one number or (C, x, y, z): how far subjects differ depends on the place.
    """
    times = times.float().view(-1, 1, 1, 1, 1)
    noisy_variance = (1 - times).square() * variance + times.square()  # of x_t
    noisy_variance = noisy_variance.clamp(min=1e-8)  # where nothing varies, at t = 0
    skip = (times - (1 - times) * variance) / noisy_variance
    return Preconditioning(skip, (variance / noisy_variance).sqrt(), noisy_variance.rsqrt())


def logit_normal_times(uniform: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Times whose logarithm of t / (1 - t), the noise over the signal, is normal: the quantiles ``uniform``, (B,) in
    [0, 1], of Esser et al. 2024 (arXiv 2403.03206), equation 19."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6))).to(uniform.dtype)
