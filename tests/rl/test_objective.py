import math

import pytest
import torch

from diffusers_med3d.rl import Transition, as_reward_tensor, clip_fraction, clipped_loss, group_advantages, log_prob


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("rewards", [[0, 1, 2, 3], [False, True, True, False], torch.tensor([0, 1, 2, 3])])
def test_integer_and_bool_rewards_are_not_truncated(rewards):
    """Pitfall 12."""
    values = as_reward_tensor(rewards, 4, "r")
    assert values.dtype == torch.float32
    advantages = group_advantages(values[:, None], num_generations=4).values
    assert advantages.sum().abs() < 1e-5 and not torch.equal(advantages, advantages.round())


def test_none_nan_and_infinite_rewards_get_zero_advantage_and_leave_the_others_alone():
    """Pitfall 14."""
    rewards = as_reward_tensor([1.0, None, 3.0, float("nan"), float("inf"), 2.0], 6, "r")
    assert rewards.isnan().tolist() == [False, True, False, True, True, False]
    values = group_advantages(rewards[:, None], num_generations=6, scale_rewards="group").values
    torch.testing.assert_close(values, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))


def test_a_sample_that_one_of_two_rewards_could_not_score_gets_zero():
    rewards = torch.tensor([[1.0, 5.0], [2.0, float("nan")], [3.0, 1.0], [6.0, 2.0]])
    for aggregation in ("normalize_then_sum", "sum_then_normalize"):
        values = group_advantages(rewards, 4, aggregation=aggregation).values
        assert values[1] == 0 and values.isfinite().all() and values.abs().sum() > 0


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4), [1.0, 2.0, 3.0], torch.tensor(1.0)])
def test_a_reward_of_the_wrong_shape_is_refused(wrong):
    with pytest.raises(ValueError, match=r"Reward 'sharp' gave shape .*for 4 volumes; expected 4 numbers"):
        as_reward_tensor(wrong, 4, "sharp")


def test_a_reward_that_returns_nothing_is_named():
    with pytest.raises(ValueError, match="Reward 'sharp' returned None for 4 volumes"):
        as_reward_tensor(None, 4, "sharp")


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_rounding_noise_in_a_group_without_variance_is_not_amplified(scale):
    """Pitfall 13."""
    rewards = column(0.5, 0.5 + 1e-7, 0.5, 0.5 - 1e-7, 0.0, 1.0, 2.0, 3.0)
    result = group_advantages(rewards, num_generations=4, scale_rewards=scale)
    assert (result.values[:4] == 0).all() and result.values[4:].abs().max() > 0.5
    assert result.frac_zero_std.tolist() == [0.5]


def test_all_groups_without_variance_give_zero_and_not_nan():
    result = group_advantages(torch.ones(8, 2), num_generations=4)
    assert (result.values == 0).all() and result.frac_zero_std.tolist() == [1.0, 1.0]


def test_advantages_are_relative_to_the_own_group():
    easy_and_hard = column(10.0, 11.0, 12.0, 13.0, 0.0, 1.0, 2.0, 3.0)
    values = group_advantages(easy_and_hard, num_generations=4).values
    torch.testing.assert_close(values[:4], values[4:])
    assert values[0] < values[1] < 0 < values[2] < values[3]


def test_normalising_before_the_sum_makes_the_scale_of_a_reward_irrelevant():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    reference = group_advantages(torch.stack([small, large], 1), 8).values
    scaled = torch.stack([small, 1000 * large], 1)
    torch.testing.assert_close(group_advantages(scaled, 8).values, reference, rtol=1e-4, atol=1e-4)
    won = group_advantages(scaled, 8, aggregation="sum_then_normalize").values
    torch.testing.assert_close(won, group_advantages(large[:, None], 8).values, rtol=1e-2, atol=1e-2)


def test_a_weight_of_zero_switches_a_reward_off_and_a_negative_one_turns_it_round():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 2, generator=generator)
    alone = group_advantages(rewards[:, :1], 4).values
    torch.testing.assert_close(group_advantages(rewards, 4, weights=[1.0, 0.0]).values, alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(group_advantages(rewards[:, :1], 4, weights=[-1.0]).values, -alone)
    with pytest.raises(ValueError, match="3 reward weights for 2 rewards"):
        group_advantages(rewards, 4, weights=[1.0, 1.0, 1.0])


def test_scale_none_only_centres():
    values = group_advantages(column(0.0, 2.0, 4.0, 6.0), 4, scale_rewards="none").values
    assert values.tolist() == [-3.0, -1.0, 1.0, 3.0]


def test_advantages_are_clipped():
    """Pitfall 23."""
    rewards = column(*([0.0] * 99), 100.0)
    assert group_advantages(rewards, 100, scale_rewards="group").values.max() == 5.0
    assert group_advantages(rewards, 100, scale_rewards="group", clip=2.0).values.max() == 2.0


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "has_gradient"),
    [(0.0, 1.0, True), (0.5, 1.0, False), (-0.5, 1.0, True), (0.0, -1.0, True), (0.5, -1.0, True), (-0.5, -1.0, False)],
)
def test_the_clip_stops_only_moves_that_have_gone_far_enough(log_ratio, advantage, has_gradient):
    """Pitfall 23: pessimistic side. Gradient sign: more likely if the advantage is positive, less if negative."""
    new = torch.tensor([log_ratio], requires_grad=True)
    loss, ratio = clipped_loss(new, torch.zeros(1), torch.tensor([advantage]), epsilon=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), new)
    assert (gradient != 0).item() == has_gradient
    if has_gradient:
        assert torch.sign(-gradient).item() == advantage
    assert clip_fraction(ratio, torch.tensor([advantage]), 0.2).item() == float(not has_gradient)


def test_the_gradient_of_the_surrogate_is_the_derivative_of_the_expected_reward():
    """Pitfall 23: finite differences of E[reward] of a 1-D Gaussian policy, reward -(x - 1)^2, at mean 0.3, std 0.5."""
    mean, std, samples = 0.3, 0.5, 400_000

    def expected_reward(m):
        return -((m - 1.0) ** 2 + std**2)

    finite_difference = (expected_reward(mean + 1e-4) - expected_reward(mean - 1e-4)) / 2e-4
    x = mean + std * torch.randn(samples, 1, generator=torch.Generator().manual_seed(0))
    reward = -((x[:, 0] - 1.0) ** 2)
    parameter = torch.tensor(mean, requires_grad=True)
    new = log_prob(x, Transition(parameter.expand(samples, 1), std))
    loss, _ = clipped_loss(new, new.detach(), reward - reward.mean(), epsilon=0.2)
    (gradient,) = torch.autograd.grad(loss.mean(), parameter)
    assert -gradient.item() == pytest.approx(finite_difference, rel=0.02)


def test_a_gaussian_bandit_improves():
    """Pitfall 23: a few clipped updates on a toy policy must raise its reward and move every mean to its own target."""
    torch.manual_seed(0)
    means = torch.zeros(2, requires_grad=True)  # one mean per condition
    targets = torch.tensor([1.0, -1.0])
    optimizer = torch.optim.Adam([means], lr=0.05)
    conditions = torch.arange(2).repeat_interleave(16)
    for _ in range(60):
        x = means.detach()[conditions] + 0.5 * torch.randn(32)
        advantages = group_advantages((-((x - targets[conditions]) ** 2))[:, None], num_generations=16).values
        old = log_prob(x[:, None], Transition(means.detach()[conditions][:, None], 0.5))
        for _ in range(2):
            new = log_prob(x[:, None], Transition(means[conditions][:, None], 0.5))
            loss, _ = clipped_loss(new, old, advantages, epsilon=0.2)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    torch.testing.assert_close(means.detach(), targets, rtol=0.2, atol=0.2)
    assert math.isfinite(loss.mean().item())
