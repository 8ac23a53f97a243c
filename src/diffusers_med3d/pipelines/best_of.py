"""The best of several samples by a reward: what choice among samples gives without any training."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..rl import as_reward_tensor, check_signature, reward_names


def choose(
    sample: Callable[[], torch.Tensor],
    reward: Callable[..., Any],
    count: int,
    columns: Mapping[str, Sequence[Any]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a batch `count` times and keep the best of each place.

    Args:
        sample: gives volumes (B, C, X, Y, Z), others at each call.
        reward: `f(volumes, **columns)` as for `DDPOTrainer`, not async: B numbers, higher is better. A sample without a
            score is kept only where no other has one.
        count: at least 1.
        columns: what the samples are of, lists of B.

    Returns:
        volumes (B, C, X, Y, Z), the kept ones, and scores (B, count) of all; NaN is "no score".

    Raises:
        ValueError: a reward that does not take these columns, or returns something else than B numbers.
    """
    (name,) = reward_names([reward])
    check_signature(reward, name, list(columns))
    best, scores = sample(), []
    for number in range(count):
        volumes = best if number == 0 else sample()
        with torch.no_grad():
            given = reward(volumes.clone(), **{name: list(values) for name, values in columns.items()})
        scores.append(as_reward_tensor(given, len(volumes), name))
        if number:
            before = torch.stack(scores[:-1]).nan_to_num(-torch.inf).amax(0)
            better = (scores[-1] > before).to(volumes.device)  # never for NaN
            best = torch.where(better.view(-1, 1, 1, 1, 1), volumes, best)
    together = torch.stack(scores, dim=1)
    unscored = int(together.isnan().all(1).sum())
    if unscored:
        warnings.warn(
            f"the reward scored none of the {count} samples for {unscored} of {len(best)} volumes: the first was kept.",
            stacklevel=2,
        )
    return best, together
