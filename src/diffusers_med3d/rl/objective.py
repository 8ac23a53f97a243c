"""From rewards to a loss: group-relative advantages and PPO's clipped surrogate.

Advantages: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2), with group mean and batch or group std; several
rewards are normalised one by one and then weighed (GDPO, TRL's `normalize_then_sum`). Loss: Schulman et al. 2017 (arXiv
1707.06347), equation 7.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

MIN_STD = 1e-4  # a group that spreads less than this has no preference, only rounding: rewards should be of order 1


class Advantages(NamedTuple):
    """`values` (N,), 0 where a sample could not be scored; `frac_zero_std` (R,): share of groups without variance."""

    values: torch.Tensor
    frac_zero_std: torch.Tensor


def _nan_mean_std(values: torch.Tensor, dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased std over `dim`, ignoring NaN; 0 where fewer than two values are left."""
    dims = tuple(range(values.dim())) if dim is None else (dim,)
    valid = ~values.isnan()
    count = valid.sum(dim=dims, keepdim=True)
    mean = values.nan_to_num(0.0).sum(dim=dims, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, values - mean, 0.0).pow(2).sum(dim=dims, keepdim=True)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt() * (count > 1)


def _center_and_scale(grouped: torch.Tensor, scale_rewards: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, G) rewards -> (P, G) advantages (NaN stays NaN) and (P,) whether the group has variance."""
    mean, group_std = _nan_mean_std(grouped, dim=1)
    has_variance = group_std > MIN_STD
    centered = torch.where(has_variance | grouped.isnan(), grouped - mean, 0.0)
    if scale_rewards == "group":
        centered = centered / group_std.clamp(min=MIN_STD)
    elif scale_rewards == "batch":
        centered = centered / _nan_mean_std(grouped - mean)[1].clamp(min=MIN_STD)
    return centered, has_variance[:, 0]


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    weights: Sequence[float] | None = None,
    aggregation: str = "normalize_then_sum",
    scale_rewards: str = "batch",
    clip: float = 5.0,
) -> Advantages:
    """Advantage of each sample over the other samples of its condition.

    Args:
        rewards: (P * G, R) float32, the G samples of a condition next to each other; NaN = could not be scored.
        num_generations: G.
        weights: one per reward, default all 1.
        aggregation: `normalize_then_sum` normalises every reward before weighing, so that none wins by its scale;
            `sum_then_normalize` weighs raw rewards and normalises the sum.
        scale_rewards: divide by the std of the "group", of the group-centred "batch" (all groups), or "none".
        clip: advantages are clipped to [-clip, clip].

    Returns:
        Values (P * G,), in the order of `rewards`. A sample with any NaN reward gets 0 and is left out of the
        statistics of that reward; a group whose std is below 1e-4 gets 0.
    """
    total, num_rewards = rewards.shape
    if total % num_generations:
        raise ValueError(f"{total} rewards cannot be split into groups of {num_generations}.")
    weight = torch.ones(num_rewards) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    if weight.shape != (num_rewards,):
        raise ValueError(f"Found {len(weight)} reward weights for {num_rewards} rewards; expected one each.")
    weight = weight.to(rewards.device)
    grouped = rewards.float().view(-1, num_generations, num_rewards)  # (P, G, R)
    if aggregation == "normalize_then_sum":
        each = [_center_and_scale(column, scale_rewards) for column in grouped.unbind(dim=-1)]
        parts, variance = zip(*each, strict=True)
        summed = (torch.stack(parts, dim=-1) * weight).sum(dim=-1)  # (P, G), NaN where any reward is NaN
        if scale_rewards != "none" and num_rewards > 1:  # so that the step does not grow with the number of rewards
            std = _nan_mean_std(summed)[1]
            summed = torch.where(std > MIN_STD, summed / std.clamp(min=MIN_STD), summed)
        has_variance = torch.stack(variance, dim=-1)
    elif aggregation == "sum_then_normalize":
        summed, has_variance = _center_and_scale((grouped * weight).sum(dim=-1), scale_rewards)
        has_variance = has_variance[:, None].expand(-1, num_rewards)
    else:
        raise ValueError(f"aggregation must be normalize_then_sum or sum_then_normalize; found {aggregation!r}.")
    values = summed.nan_to_num(0.0).clamp(-clip, clip).reshape(total)
    return Advantages(values, 1.0 - has_variance.float().mean(dim=0))


def clipped_loss(
    new_log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic surrogate, negated so that descent improves the policy.

    Args:
        new_log_prob, old_log_prob, advantages: (B,).
        epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon].

    Returns:
        Loss (B,) and probability ratio (B,).
    """
    ratio = torch.exp(new_log_prob - old_log_prob)
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + epsilon)
    return torch.maximum(-advantages * ratio, -advantages * clipped), ratio


def clip_fraction(ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Share of samples whose gradient the clip switches off: too likely already, or too unlikely already. Scalar."""
    too_high = (ratio > 1.0 + epsilon) & (advantages > 0)
    too_low = (ratio < 1.0 - epsilon) & (advantages < 0)
    return (too_high | too_low).float().mean()
