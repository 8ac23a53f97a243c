import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_med3d.rl import (
    clipped_loss,
    deterministic_step,
    deterministic_steps,
    log_prob,
    rollout,
    rollout_window,
    transition,
)
from diffusers_med3d.utils.seeding import derive_seed, generators_for


class TinyPolicy(torch.nn.Module):
    """A 3D network with everything that could break a replay: convolution, GroupNorm, dropout."""

    def __init__(self, channels=2):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv3d(channels, 8, 3, padding=1),
            torch.nn.GroupNorm(4, 8),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Conv3d(8, channels, 3, padding=1),
        )

    def forward(self, sample, timestep):
        return self.net(sample) + 1e-4 * timestep


def make_scheduler(kind=DDIMScheduler, steps=6, spacing="trailing"):
    scheduler = kind(prediction_type="v_prediction", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return scheduler


def make_rollout(
    policy, scheduler, batch=4, channels=2, window=range(1, 4), trained=(1, 2, 3), first_sample=0, **options
):
    keys = [(0, 0, first_sample + i) for i in range(batch)]
    initial = torch.cat(
        [torch.randn(1, channels, 4, 4, 4, generator=g) for g in generators_for([(*k, 1) for k in keys])]
    )
    return rollout(policy, scheduler, initial, generators_for(keys), window, trained, **options)


def replay(policy, scheduler, trajectory, samples=slice(None)):
    """The log-probabilities (W, b) that an update would compute."""
    log_probs = []
    for index, state, following in zip(trajectory.steps, trajectory.states, trajectory.next_states, strict=True):
        t = int(scheduler.timesteps[index])
        step = transition(scheduler, policy(state[samples], t), t, state[samples])
        log_probs.append(log_prob(following[samples], step))
    return torch.stack(log_probs)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return TinyPolicy().eval()


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_replaying_a_rollout_gives_a_ratio_of_one(policy, kind, spacing):
    """Pitfall 1."""
    scheduler = make_scheduler(kind, spacing=spacing)
    trajectory = make_rollout(policy, scheduler, window=range(0, 5), trained=tuple(range(5)))
    ratio = torch.exp(replay(policy, scheduler, trajectory) - trajectory.log_probs)
    assert trajectory.log_probs.shape == (5, 4)
    assert (ratio - 1).abs().max() < 1e-6


def test_replaying_under_bf16_autocast_gives_a_ratio_of_one_only_with_the_same_context(policy):
    """Pitfall 8: autocast in the rollout and none in the update is seen at once."""
    scheduler = make_scheduler()

    def autocast_policy(sample, timestep):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return policy(sample, timestep)

    trajectory = make_rollout(autocast_policy, scheduler)
    same = torch.exp(replay(autocast_policy, scheduler, trajectory) - trajectory.log_probs)
    other = torch.exp(replay(policy, scheduler, trajectory) - trajectory.log_probs)
    assert (same - 1).abs().max() < 1e-6 < 1e-5 < (other - 1).abs().max()


def test_a_batch_of_four_replays_one_by_one(policy):
    """Pitfall 9."""
    scheduler = make_scheduler()
    trajectory = make_rollout(policy, scheduler)
    alone = torch.cat([replay(policy, scheduler, trajectory, slice(i, i + 1)) for i in range(4)], dim=1)
    torch.testing.assert_close(alone, trajectory.log_probs, rtol=0, atol=1e-5)


def test_dropout_in_the_update_would_be_seen(policy):
    """Pitfall 10: the reason why the trainer keeps the network in eval mode."""
    scheduler = make_scheduler()
    trajectory = make_rollout(policy, scheduler)
    policy.train()
    ratio = torch.exp(replay(policy, scheduler, trajectory) - trajectory.log_probs)
    assert (ratio - 1).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_stored_in_float32_even_if_the_network_answers_in_half(policy, dtype):
    """Pitfall 2."""
    scheduler = make_scheduler()
    trajectory = make_rollout(lambda s, t: policy(s, t).to(dtype), scheduler)
    for tensor in (trajectory.states, trajectory.next_states, trajectory.log_probs, trajectory.final):
        assert tensor.dtype == torch.float32
    rounded = trajectory._replace(next_states=trajectory.next_states.bfloat16())
    shift = replay(lambda s, t: policy(s, t).to(dtype), scheduler, rounded) - trajectory.log_probs
    assert shift.abs().max() > 1e-6  # what storing the states in bf16 would have done


@pytest.mark.parametrize("channels", [2, 4, 1])
def test_samples_stay_apart_when_batch_and_channels_are_equal(channels):
    """Pitfall 7."""
    torch.manual_seed(0)
    policy, scheduler = TinyPolicy(channels).eval(), make_scheduler()
    together = make_rollout(policy, scheduler, batch=4, channels=channels)
    last = make_rollout(policy, scheduler, batch=1, channels=channels, first_sample=3)
    torch.testing.assert_close(together.final[3:], last.final, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.log_probs[:, 3:], last.log_probs, rtol=1e-4, atol=1e-4)


def test_noise_belongs_to_the_sample_and_differs_between_samples(policy):
    """Pitfall 16."""
    scheduler = make_scheduler()
    one, again = make_rollout(policy, scheduler), make_rollout(policy, scheduler)
    assert torch.equal(one.final, again.final)
    assert (one.next_states[0, 0] - one.next_states[0, 1]).abs().max() > 0.1
    assert derive_seed(0, 1, 2) != derive_seed(0, 2, 1) != derive_seed(1, 0, 2)


def test_steps_outside_the_window_are_deterministic(policy):
    scheduler = make_scheduler()
    initial = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1, 1)
    trajectory = rollout(policy, scheduler, initial, generators_for([(i,) for i in range(3)]), range(3, 4), (3,))
    torch.testing.assert_close(trajectory.states[0, 0], trajectory.states[0, 1])  # equal up to the window
    assert (trajectory.next_states[0, 0] - trajectory.next_states[0, 1]).abs().max() > 1e-2
    sample = initial
    for t in scheduler.timesteps.tolist()[:3]:
        sample = deterministic_step(scheduler, policy(sample, t), t, sample)
    torch.testing.assert_close(trajectory.states[0], sample)


def test_what_comes_before_the_window_can_be_computed_once(policy):
    scheduler = make_scheduler()
    initial = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [generators_for([(i,) for i in range(3)]) for _ in range(2)]
    whole = rollout(policy, scheduler, initial, generators[0], range(2, 4), (2, 3))
    prefix = deterministic_steps(policy, scheduler, initial, range(2))
    split = rollout(policy, scheduler, prefix, generators[1], range(2, 4), (2, 3), first_step=2)
    for ours, theirs in zip(whole[1:], split[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_the_window_never_holds_the_last_step_and_is_reproducible():
    """Pitfalls 4 and 16."""
    for seed in range(50):
        window, trained = rollout_window(6, 2, 1.0, seed)
        assert 0 <= window.start and window.stop <= 5 and trained == tuple(window)
        assert rollout_window(6, 2, 1.0, seed) == (window, trained)
    assert len({rollout_window(6, 2, 1.0, seed)[0] for seed in range(50)}) == 4
    assert rollout_window(6, 0, 1.0, 0) == (range(0, 5), (0, 1, 2, 3, 4))


def test_a_fraction_trains_a_drawn_subset_of_distinct_steps():
    """Pitfall 19."""
    subsets = {rollout_window(11, 0, 0.5, seed)[1] for seed in range(20)}
    assert len(subsets) > 5 and all(len(set(s)) == 5 for s in subsets)
    assert len(rollout_window(11, 0, 0.01, 0)[1]) == 1


@pytest.mark.parametrize(("size", "bounds"), [(6, None), (3, (2, 4)), (1, (0, 6)), (0, (3, 3))])
def test_a_window_that_does_not_fit_is_refused(size, bounds):
    with pytest.raises(ValueError, match="window"):
        rollout_window(6, size, 1.0, 0, bounds)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_update_can_be_differentiated_after_a_rollout_under_any_mode(policy, mode):
    """Pitfall 26."""
    scheduler = make_scheduler()
    with mode():
        trajectory = make_rollout(policy, scheduler)
    new = replay(policy, scheduler, trajectory)
    loss, _ = clipped_loss(new.flatten(), trajectory.log_probs.flatten(), torch.ones(12), 1e-4)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_only_trained_steps_are_kept(policy):
    """Pitfall 24."""
    scheduler = make_scheduler()
    trajectory = make_rollout(policy, scheduler, window=range(0, 5), trained=(1, 4), storage_device="cpu")
    assert trajectory.states.shape == (2, 4, 2, 4, 4, 4) and trajectory.steps == (1, 4)
    assert trajectory.states.device.type == "cpu"
