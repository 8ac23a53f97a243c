"""Reinforcement learning of a diffusion policy as pure functions of tensors: transition, objective and rollout."""

from .forward_process import forward_timesteps, matching
from .objective import Advantages, clip_fraction, clipped_loss, group_advantages
from .reward_calls import as_reward_tensor, check_signature, reward_names
from .rollout import Trajectory, deterministic_steps, rollout, rollout_window
from .transition import Transition, check_scheduler, deterministic_step, gaussian_kl, log_prob, transition

__all__ = [
    "Advantages",
    "Trajectory",
    "Transition",
    "as_reward_tensor",
    "check_scheduler",
    "check_signature",
    "clip_fraction",
    "clipped_loss",
    "deterministic_step",
    "deterministic_steps",
    "forward_timesteps",
    "gaussian_kl",
    "group_advantages",
    "log_prob",
    "matching",
    "reward_names",
    "rollout",
    "rollout_window",
    "transition",
]
