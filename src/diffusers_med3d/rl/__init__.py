"""Reinforcement learning of a diffusion policy as pure functions of tensors: transition, objective and rollout."""

from .forward_process import Noised, forward_timesteps, matching, noised
from .objective import Advantages, as_reward_tensor, clip_fraction, clipped_loss, group_advantages
from .rollout import Trajectory, deterministic_steps, rollout, rollout_window
from .transition import Transition, check_scheduler, deterministic_step, gaussian_kl, log_prob, transition

__all__ = [
    "Advantages",
    "Noised",
    "Trajectory",
    "Transition",
    "as_reward_tensor",
    "check_scheduler",
    "clip_fraction",
    "clipped_loss",
    "deterministic_step",
    "deterministic_steps",
    "forward_timesteps",
    "gaussian_kl",
    "group_advantages",
    "log_prob",
    "matching",
    "noised",
    "rollout",
    "rollout_window",
    "transition",
]
