"""The forward-process objective: rl/forward_process.py."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_med3d.rl import clipped_loss, forward_timesteps, gaussian_kl, log_prob, matching
from diffusers_med3d.schedulers.flow import FLOW_PREDICTION
from diffusers_med3d.schedulers.noising import noised, training_timesteps

CLEAN, NOISE, OUTPUT = (torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_states_and_targets_are_those_of_pre_training(kind, prediction):
    scheduler = kind(beta_schedule="scaled_linear", prediction_type=prediction)
    plain = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    t = torch.tensor([700, 0, 999])
    state, target = noised(scheduler, CLEAN, NOISE, t)
    torch.testing.assert_close(state, plain.add_noise(CLEAN, NOISE, t))
    expected = {"epsilon": NOISE, "sample": CLEAN, "v_prediction": plain.get_velocity(CLEAN, NOISE, t)}[prediction]
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type=FLOW_PREDICTION, use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_those_of_a_flow_too(scheduler):
    timesteps = training_timesteps(scheduler, torch.full((3,), 0.4))
    torch.testing.assert_close(timesteps, torch.full((3,), 1000 * 2 / 3))  # 3 * 0.4 / (1 + 2 * 0.4)
    state, target = noised(scheduler, CLEAN, NOISE, timesteps)
    torch.testing.assert_close(state, CLEAN / 3 + NOISE * 2 / 3)
    torch.testing.assert_close(target, NOISE - CLEAN)
    # shift(u) lies in its part of the shifted times
    times = torch.tensor(forward_timesteps(scheduler, 4, 0)) / 1000
    unshifted = times / (3.0 - 2.0 * times)
    assert ((unshifted * 4).floor() == torch.arange(4)).all()


def test_timesteps_are_spread_and_repeat_with_their_seed():
    scheduler = DDIMScheduler()
    drawn = [forward_timesteps(scheduler, 5, seed) for seed in range(50)]
    assert drawn[3] == forward_timesteps(scheduler, 5, 3) and len(set(drawn)) == 50
    assert all([int(t // 200) for t in times] == [0, 1, 2, 3, 4] for times in drawn)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="epsilon, sample or v_prediction; found 'other'"):
        noised(DDIMScheduler(prediction_type="other"), CLEAN, NOISE, torch.tensor([3, 3, 3]))


def test_the_log_density_is_minus_the_error_and_the_kl_the_square_of_the_difference():
    ours, theirs = log_prob(NOISE, matching(OUTPUT)), log_prob(NOISE, matching(CLEAN))
    error = ((NOISE - OUTPUT) ** 2).flatten(1).mean(1) - ((NOISE - CLEAN) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ours - theirs, -error)
    torch.testing.assert_close(
        gaussian_kl(matching(OUTPUT), matching(CLEAN)), ((OUTPUT - CLEAN) ** 2).flatten(1).mean(1)
    )


@pytest.mark.parametrize("timestep", [200.0, 500.0, 800.0])
def test_the_gradient_is_the_derivative_of_the_expected_reward(timestep):
    """Data N(m, s^2) of one dimension under a flow, whose velocity is known. With k the slope of the velocity in x_t,
    the descent direction is 2 s^2 (1 + k (1 - t))^2 times dE[r]/dm, which is taken by finite differences."""
    scheduler, s, t = FlowMatchEulerDiscreteScheduler(), 0.5, timestep / 1000
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(400_000, 1, 1, 1, 1, generator=generator) for _ in range(2))

    def reward(mean: torch.Tensor) -> torch.Tensor:
        return torch.tanh(2 * (mean + s * z)).flatten()

    mean = torch.tensor(0.3, requires_grad=True)
    slope = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    state, target = noised(scheduler, (mean + s * z).detach(), noise, torch.full((len(z),), timestep))
    velocity = -mean + slope * (state - (1 - t) * mean)
    new = log_prob(target, matching(velocity))
    advantages = reward(mean.detach()) - reward(mean.detach()).mean()
    clipped_loss(new, new.detach(), advantages, epsilon=0.2)[0].mean().backward()
    derivative = (reward(mean.detach() + 1e-2) - reward(mean.detach() - 1e-2)).mean() / 2e-2
    assert -mean.grad.item() == pytest.approx(2 * s**2 * (1 + slope * (1 - t)) ** 2 * derivative.item(), rel=0.02)
