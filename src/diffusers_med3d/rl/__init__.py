"""Reinforcement learning of a diffusion policy as pure functions: transition -> objective -> rollout, no framework."""

from ..utils.seeding import derive_seed, generators_for
from .objective import Advantages, as_reward_tensor, clip_fraction, clipped_loss, group_advantages
from .rollout import Trajectory, deterministic_steps, rollout, rollout_window
from .transition import Transition, check_scheduler, deterministic_step, gaussian_kl, log_prob, transition

__all__ = [
    "Advantages",
    "Trajectory",
    "Transition",
    "as_reward_tensor",
    "check_scheduler",
    "clip_fraction",
    "clipped_loss",
    "derive_seed",
    "deterministic_step",
    "deterministic_steps",
    "gaussian_kl",
    "generators_for",
    "group_advantages",
    "log_prob",
    "rollout",
    "rollout_window",
    "transition",
]
