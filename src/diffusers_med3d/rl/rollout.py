"""Sampling trajectories: noise that a resumed or a distributed run draws again, and a window of stochastic steps.

Only the steps inside a short window are stochastic (and can be trained); the others are deterministic, so a rollout
needs few steps and its gradient little memory: MixGRPO (Li et al. 2025, arXiv 2507.21802), Flow-GRPO-Fast. Where the
window lies is drawn per rollout and is the same for every sample and rank.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from .transition import Scheduler, deterministic_step, log_prob, transition

Predict = Callable[[torch.Tensor, int | float], torch.Tensor]  # (x_t, t) -> model output like x_t, guidance included


class Trajectory(NamedTuple):
    """What an update needs of B samples, in float32: half-precision states would shift the log-probabilities."""

    steps: tuple[int, ...]  # indices into scheduler.timesteps of the W trained steps
    states: torch.Tensor  # (W, B, C, X, Y, Z), x_t of each trained step
    next_states: torch.Tensor  # (W, B, C, X, Y, Z), x_{t-1} of each trained step
    log_probs: torch.Tensor  # (W, B)
    final: torch.Tensor  # (B, C, X, Y, Z), x_0


def rollout_window(
    num_steps: int,
    window_size: int,
    fraction: float,
    seed: int,
    window_range: Sequence[int] | None = None,
) -> tuple[range, tuple[int, ...]]:
    """Which steps of a rollout are stochastic, and which of those are trained.

    Args:
        num_steps: rollout steps; the last one is deterministic and never in the window.
        window_size: length of the stochastic window, 0 = all of them.
        fraction: share of the window's steps that is trained (at least one), drawn without replacement.
        seed: shared by all ranks, e.g. `derive_seed(seed, rollout)`.
        window_range: first and one-past-last step in which the window may lie, default (0, num_steps - 1).

    Raises:
        ValueError: if the window does not fit.
    """
    first, end = (0, num_steps - 1) if window_range is None else window_range
    size = (end - first) if window_size == 0 else window_size
    if not 0 <= first < end <= num_steps - 1:
        raise ValueError(
            f"The stochastic window must lie in [0, {num_steps - 1}) (the last of {num_steps} steps is deterministic); "
            f"found [{first}, {end})."
        )
    if not 0 < size <= end - first:
        raise ValueError(f"A stochastic window of {size} steps does not fit in [{first}, {end}).")
    generator = torch.Generator().manual_seed(seed)
    start = first + int(torch.randint(end - first - size + 1, (1,), generator=generator))
    count = max(1, round(size * fraction))
    chosen = torch.randperm(size, generator=generator)[:count].sort().values
    return range(start, start + size), tuple(start + int(i) for i in chosen)


@torch.no_grad()
def deterministic_steps(predict: Predict, scheduler: Scheduler, sample: torch.Tensor, steps: range) -> torch.Tensor:
    """Take `sample` (B, C, X, Y, Z) through the given steps without noise."""
    for timestep in scheduler.timesteps[steps.start : steps.stop].tolist():
        sample = deterministic_step(scheduler, predict(sample, timestep), timestep, sample)
    return sample


@torch.inference_mode(False)  # inference tensors could not be used in the update
@torch.no_grad()
def rollout(
    predict: Predict,
    scheduler: Scheduler,
    initial: torch.Tensor,
    step_generators: list[torch.Generator],
    window: range,
    trained: Sequence[int],
    eta: float = 1.0,
    storage_device: torch.device | str | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Denoise `initial` (B, C, X, Y, Z) to the end, keeping what the trained steps need.

    Args:
        predict: the policy, the very same callable as in the update.
        scheduler: DDIM, DDPM or flow-matching Euler, with `set_timesteps` called.
        step_generators: one per sample, for the noise inside the window.
        window, trained: from `rollout_window`; `trained` lies inside `window`.
        storage_device: where states are kept, e.g. "cpu" to offload them; default where they are.
        first_step: the step that `initial` is at, not behind the window.
    """
    kept: dict[str, list[torch.Tensor]] = {"states": [], "next": [], "log_probs": []}
    sample = initial.float()
    for index, timestep in list(enumerate(scheduler.timesteps.tolist()))[first_step:]:
        output = predict(sample, timestep)
        if index not in window:
            sample = deterministic_step(scheduler, output, timestep, sample)
            continue
        step = transition(scheduler, output, timestep, sample, eta)
        noise = randn_tensor(tuple(sample.shape), generator=step_generators, device=sample.device)
        following = step.mean + step.std * noise
        if index in trained:
            kept["states"].append(sample.to(storage_device or sample.device))
            kept["next"].append(following.to(storage_device or sample.device))
            kept["log_probs"].append(log_prob(following, step))
        sample = following
    return Trajectory(
        tuple(trained),
        torch.stack(kept["states"]),
        torch.stack(kept["next"]),
        torch.stack(kept["log_probs"]),
        sample,
    )
