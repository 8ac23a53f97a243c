"""Rewards from what a user gives: a name, a folder, a Hub id, a function by name, a callable or a reward model."""

from collections.abc import Sequence
from inspect import isclass
from pathlib import Path
from typing import Any

from torch import nn

from ..hub.resolve import resolve
from ..models.reward import SliceRewardModel, VolumeRewardModel
from ..models.witness import WitnessRewardModel
from ..utils.importing import load_function
from ..utils.wrappers import unwrapped
from .learned import LearnedReward, SliceReward, VolumeReward
from .scoring import RewardFunc
from .witness import WitnessReward

Reward = str | Path | RewardFunc | VolumeRewardModel | SliceRewardModel | WitnessRewardModel
"""What `load_reward` takes."""

REWARD_CLASSES: tuple[type[LearnedReward], ...] = (VolumeReward, SliceReward, WitnessReward)

DEFAULT_REWARDS = ("brain-t1-reward-3d", "brain-t1-reward-2d")
"""The bundled rewards, which know the brains that the generators in ``DEFAULT_REWARDS_FOR`` make."""

DEFAULT_REWARDS_FOR = ("brain-t1", "brain-t1-ppo")

_WANTED = (
    "a reward is a bundled reward model's name, a folder or Hub id of one, file.py:function, package.module:function, "
    "or in Python a callable or a reward model"
)


def load_reward(reward: Reward) -> RewardFunc:
    """Return a reward function `f(volumes, **conditions)`.

    Args:
        reward: name of a bundled reward model ("brain-t1-reward-3d"), folder or Hub id of a `VolumeRewardModel`,
            `SliceRewardModel` or `WitnessRewardModel` (its config says which), "file.py:function",
            "package.module:function", such a model itself, or any callable, which is returned as it is. Functions may
            be async.

    Raises:
        ValueError, OSError, ImportError: something else, with what was found and what is wanted.
    """
    if isinstance(reward, nn.Module):
        kind = unwrapped(reward)
        for reward_class in REWARD_CLASSES:
            if isinstance(kind, reward_class.model_class):
                return reward_class(reward)  # type: ignore[arg-type]  # compiled, it is one all the same
    if isinstance(reward, str | Path):
        name = str(reward)
        return load_function(name) if ":" in name else _load_model(name)
    if not callable(reward) or isclass(reward):
        raise ValueError(f"{reward!r} is no reward; {_WANTED}.")
    return reward


def load_rewards(rewards: Reward | Sequence[Reward]) -> list[RewardFunc]:
    """Return `load_reward` of one reward, or of each of several.

    Raises:
        ValueError: an empty list. Otherwise as `load_reward`.
    """
    given: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    if not given:
        raise ValueError(f"reward_funcs is empty; give at least one: {_WANTED}.")
    return [load_reward(reward) for reward in given]


def default_rewards(model_name_or_path: str) -> list[str]:
    """Return the rewards that a bundled generator is fine-tuned by when none are named.

    Raises:
        ValueError: another generator: these rewards would score its volumes as if they were bundled brains.
    """
    if model_name_or_path not in DEFAULT_REWARDS_FOR:
        raise ValueError(
            f"the default rewards ({', '.join(DEFAULT_REWARDS)}) are for {' and '.join(DEFAULT_REWARDS_FOR)}, not for "
            f"{model_name_or_path}; name its rewards with --reward_funcs."
        )
    return list(DEFAULT_REWARDS)


def _load_model(name: str) -> LearnedReward:
    try:
        config = VolumeRewardModel.load_config(resolve(name))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name!r} is no reward ({error}); {_WANTED}.") from error
    found = config.get("_class_name")
    for reward_class in REWARD_CLASSES:
        if reward_class.model_class.__name__ == found:
            return reward_class.from_pretrained(name)
    raise ValueError(f"{name!r} holds a {found}, which is no reward; {_WANTED}.")
