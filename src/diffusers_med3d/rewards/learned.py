"""Learned rewards as callables, the form in which ``DDPOTrainer(reward_funcs=[...])`` takes them."""

from typing import Any, Self

import torch

from ..data.settings import VOXELS
from ..models.reward import SliceRewardModel, VolumeRewardModel
from ..models.witness import WitnessRewardModel
from ..utils.wrappers import unwrapped


class LearnedReward:
    """A reward model in evaluation mode, without gradients, called in chunks.

    Args:
        model: the reward model; it is frozen and put into evaluation mode.
        batch_size: volumes per forward pass; a score does not depend on it.
    """

    model_class: type[VolumeRewardModel] | type[SliceRewardModel] | type[WitnessRewardModel]
    same_settings: tuple[str, ...] = VOXELS
    """Settings that the volumes must share with those that the model was trained on."""

    def __init__(self, model: VolumeRewardModel | SliceRewardModel | WitnessRewardModel, batch_size: int = 8) -> None:
        if not isinstance(unwrapped(model), self.model_class):
            raise TypeError(f"{type(self).__name__} needs a {self.model_class.__name__}, got {type(model).__name__}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.__name__ = type(self).__name__  # the name that a trainer logs

    @classmethod
    def from_pretrained(cls, name_or_path: str, batch_size: int = 8, **kwargs: Any) -> Self:
        """Load a bundled reward ("brain-t1-reward-3d"), a folder, or a Hub repository ("org/name").

        ``kwargs`` go to the model's ``from_pretrained`` (``revision``, ``dtype``, ``token``, ...); weights are
        stored in half precision and computed in float32 unless ``dtype`` says otherwise.
        """
        return cls(cls.model_class.from_pretrained(name_or_path, **kwargs), batch_size)

    def to(self, device: torch.device | str) -> Self:
        """Move the model; volumes are brought to its device by every call."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, volumes: torch.Tensor, **conditions: Any) -> torch.Tensor:
        """Score volumes.

        Args:
            volumes: (B, C, X, Y, Z) in [0, 1].
            conditions: ignored; a realism reward does not look at the class.

        Returns:
            float32 scores (B,) on the volumes' device, higher = more real (about 1 for a real scan); NaN, "could not
            score", for a volume that holds NaN or infinite voxels.

        Raises:
            ValueError: wrong rank, channels, type, size or range.
        """
        if volumes.ndim != 5:
            raise ValueError(f"volumes must have shape (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
        scores = torch.full((volumes.shape[0],), torch.nan)
        usable = torch.isfinite(volumes).flatten(1).all(1).nonzero().flatten()
        device = self.model.device
        # scores in the precision of the weights, whatever context the caller is in
        with torch.autocast(device.type, enabled=False):
            for rows in usable.split(self.batch_size):
                scores[rows.cpu()] = self.model(volumes[rows].to(device)).float().cpu()
        return scores.to(volumes.device)


class VolumeReward(LearnedReward):
    """Realism of whole volumes: scores of a `VolumeRewardModel`."""

    model_class = VolumeRewardModel


class SliceReward(LearnedReward):
    """Realism of slices: scores of a `SliceRewardModel`."""

    model_class = SliceRewardModel
