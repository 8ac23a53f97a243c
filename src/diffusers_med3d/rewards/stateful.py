"""Rewards that remember something and follow the generator: a buffer of samples, a discriminator in training."""

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class StatefulReward(Protocol):
    """What a reward has besides being a callable `f(volumes, **conditions)` when it carries state.

    `DDPOTrainer` calls `update` once per rollout, before scores are asked for, in every process with the samples of all
    processes in the same order, so that the state is the same everywhere. Checkpoints hold the state.
    """

    def update(self, volumes: torch.Tensor, **conditions: Any) -> None:
        """Take in the samples of a rollout, float32 (N, C, X, Y, Z) in [0, 1] on the CPU, and their conditions as
        lists of N. Whatever is random in it must depend on its arguments and on the state alone."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that scores and updates depend on."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave."""
