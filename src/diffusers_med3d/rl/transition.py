"""One denoising step seen as an action: x_{t-1} ~ N(mean(x_t, model output), std^2 I).

DDPM: Ho et al. 2020 (arXiv 2006.11239), equations 6-7. DDIM with eta > 0: Song et al. 2020 (arXiv 2010.02502),
equations 12 and 16. The mean is that of `scheduler.step`, so what is trained is what the pipeline samples. Rectified
flow: rl/flow.py.

Log-probabilities and divergences are *means* over all non-batch dimensions (ddpo-pytorch, DanceGRPO), so that a clip
range does not depend on how large the latent is: a clip of 1e-4 here stands for 1e-4 x (number of dimensions) nats.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..schedulers.flow import check_supported
from .flow import flow_sde, flow_times

Scheduler: TypeAlias = DDIMScheduler | DDPMScheduler | FlowMatchEulerDiscreteScheduler
DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


class Transition(NamedTuple):
    """Mean (B, C, X, Y, Z) in float32 and standard deviation of one step; all samples of a batch are at the same t."""

    mean: torch.Tensor
    std: float


def check_scheduler(scheduler: Scheduler, eta: float) -> None:
    """Refuse, with the reason, a scheduler whose steps have no density."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, Scheduler):
        raise ValueError(
            f"{name} cannot be used for PPO: a step of a multistep, ODE or sigma-space solver has no Gaussian density "
            "that depends on (x_t, t) alone, so there is no probability ratio. Give the pipeline a DDIMScheduler "
            "(eta > 0) or a DDPMScheduler for training, or, for a rectified flow, a FlowMatchEulerDiscreteScheduler; "
            "any scheduler can be put back for inference afterwards."
        )
    check_supported(scheduler)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.stochastic_sampling:
        raise ValueError(f"{name} with stochastic_sampling=True has other steps than PPO trains; expected False.")
    if isinstance(scheduler, DDPMScheduler):
        if scheduler.config.variance_type not in DDPM_VARIANCES:
            raise ValueError(
                f"DDPMScheduler with variance_type={scheduler.config.variance_type!r} is not supported for PPO; "
                f"expected one of {DDPM_VARIANCES}."
            )
        if eta != 1.0:
            raise ValueError(f"DDPMScheduler always adds its full noise, so eta must be 1.0; found {eta}.")
    elif not 0.0 < eta <= 1.0:
        raise ValueError(
            f"eta must lie in (0, 1], found {eta}: with eta = 0 a step is deterministic and has no density, so there "
            "is nothing to reinforce."
        )


def _alphas(scheduler: DDIMScheduler | DDPMScheduler, timestep: int) -> tuple[float, float]:
    """Cumulative alphas at `timestep` and at the one that `scheduler.step` goes to, by the scheduler's own rule."""
    if isinstance(scheduler, DDIMScheduler):
        previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        end = scheduler.final_alpha_cumprod
    else:
        previous = int(scheduler.previous_timestep(timestep))
        end = scheduler.one
    alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else end
    return float(scheduler.alphas_cumprod[timestep]), float(alpha_previous)


def _clean_and_noise(
    scheduler: DDIMScheduler | DDPMScheduler, model_output: torch.Tensor, sample: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted x_0 (clipped if the scheduler clips) and predicted noise (from the unclipped x_0)."""
    signal, sigma = math.sqrt(alpha), math.sqrt(1.0 - alpha)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean, noise = (sample - sigma * model_output) / signal, model_output
    elif kind == "sample":
        clean, noise = model_output, (sample - signal * model_output) / sigma
    elif kind == "v_prediction":
        clean, noise = signal * sample - sigma * model_output, signal * model_output + sigma * sample
    else:
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction; found {kind!r}.")
    if scheduler.config.thresholding:
        clean = scheduler._threshold_sample(clean)
    elif scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return clean, noise


def transition(
    scheduler: Scheduler,
    model_output: torch.Tensor,
    timestep: int | float,
    sample: torch.Tensor,
    eta: float = 1.0,
) -> Transition:
    """The Gaussian of one stochastic step.

    Args:
        scheduler: DDIM (eta > 0), DDPM or flow-matching Euler, with `set_timesteps` called.
        model_output: (B, C, X, Y, Z), what the network predicted (epsilon, v, sample or flow velocity), guidance
            included.
        timestep: the t of the whole batch, an element of `scheduler.timesteps`.
        sample: (B, C, X, Y, Z), x_t.
        eta: noise of DDIM; for a flow the noise level a of Flow-GRPO.

    Raises:
        ValueError: for a scheduler or eta without a density, and for the last step, whose std is 0 or as good as 0.
    """
    check_scheduler(scheduler, eta)
    if timestep == scheduler.timesteps[-1].item():
        raise ValueError(f"Timestep {timestep} is the last step: it is deterministic and is never trained.")
    model_output, sample = model_output.float(), sample.float()
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Transition(*flow_sde(model_output, sample, *flow_times(scheduler, timestep), eta))
    alpha, alpha_previous = _alphas(scheduler, int(timestep))
    clean, noise = _clean_and_noise(scheduler, model_output, sample, alpha)
    beta = 1.0 - alpha / alpha_previous
    variance = (1.0 - alpha_previous) / (1.0 - alpha) * beta
    if isinstance(scheduler, DDPMScheduler):
        mean = (math.sqrt(alpha_previous) * beta / (1.0 - alpha)) * clean
        mean = mean + (math.sqrt(alpha / alpha_previous) * (1.0 - alpha_previous) / (1.0 - alpha)) * sample
        std = math.sqrt(beta if scheduler.config.variance_type == "fixed_large" else variance)
    else:
        std = eta * math.sqrt(variance)
        direction = math.sqrt(max(1.0 - alpha_previous - std**2, 0.0))
        mean = math.sqrt(alpha_previous) * clean + direction * noise
    if not std > 0.0:
        raise ValueError(f"{type(scheduler).__name__} has std {std} at timestep {timestep}; expected a positive one.")
    return Transition(mean, std)


def deterministic_step(
    scheduler: Scheduler, model_output: torch.Tensor, timestep: int | float, sample: torch.Tensor
) -> torch.Tensor:
    """The same move without noise (DDIM at eta = 0, Euler step of a flow): outside the stochastic window, and always
    for the last step.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        time, next_time = flow_times(scheduler, timestep)
        return sample.float() + (next_time - time) * model_output.float()
    alpha, alpha_previous = _alphas(scheduler, int(timestep))
    clean, noise = _clean_and_noise(scheduler, model_output.float(), sample.float(), alpha)
    return math.sqrt(alpha_previous) * clean + math.sqrt(1.0 - alpha_previous) * noise


def log_prob(value: torch.Tensor, step: Transition) -> torch.Tensor:
    """Gaussian log-density of `value` (B, C, X, Y, Z), mean over all non-batch dimensions: (B,), float32."""
    squared = ((value.float() - step.mean) ** 2).flatten(1).mean(dim=1)
    return -squared / (2.0 * step.std**2) - math.log(step.std) - 0.5 * math.log(2.0 * math.pi)


def gaussian_kl(step: Transition, reference: Transition) -> torch.Tensor:
    """KL(step || reference) of two Gaussians of equal std, closed form, mean over all non-batch dimensions: (B,)."""
    if step.std != reference.std:
        raise ValueError(f"Both transitions must belong to one timestep; found stds {step.std} and {reference.std}.")
    return ((step.mean - reference.mean) ** 2).flatten(1).mean(dim=1) / (2.0 * step.std**2)
