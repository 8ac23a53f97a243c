"""The witness function as a reward that follows the generator while it is fine-tuned."""

from typing import Any

import torch

from ..data.settings import GRID
from ..models.witness import WitnessRewardModel
from .learned import LearnedReward


class WitnessReward(LearnedReward):
    """Scores of a `WitnessRewardModel`, whose buffer takes in the samples of every rollout (see `StatefulReward`).

    Every sample of a rollout is in the buffer once when it is scored, which adds the same to all of them.
    """

    model_class = WitnessRewardModel
    same_settings = GRID  # it compares with features of scans of one size
    model: WitnessRewardModel

    @torch.no_grad()
    def update(self, volumes: torch.Tensor, **conditions: Any) -> None:
        """Remember the samples of a rollout (N, C, X, Y, Z); those with NaN or infinite voxels are left out."""
        usable = volumes[volumes.isfinite().flatten(1).all(1)]
        with torch.autocast(self.model.device.type, enabled=False):
            for part in usable.split(self.batch_size):
                self.model.update(part.to(self.model.device))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The buffer of samples."""
        return {"samples": self.model.samples.cpu(), "num_samples": self.model.num_samples.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take back the buffer of samples.

        Raises:
            ValueError: a buffer of another size.
        """
        if state["samples"].shape != self.model.samples.shape:
            raise ValueError(
                f"the buffer of samples has shape {tuple(self.model.samples.shape)}, the saved one "
                f"{tuple(state['samples'].shape)}."
            )
        self.model.samples.copy_(state["samples"])
        self.model.num_samples.copy_(state["num_samples"])
