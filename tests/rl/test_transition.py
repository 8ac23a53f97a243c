import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_med3d.rl import Transition, check_scheduler, deterministic_step, gaussian_kl, log_prob, transition

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


def make_scheduler(kind, prediction="v_prediction", spacing="trailing", steps=10, **config):
    config = {"clip_sample": False, "prediction_type": prediction, "timestep_spacing": spacing, **BETAS, **config}
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def noise_like(shape=(2, 3, 4, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("config", [{}, {"steps_offset": 1}, {"clip_sample": True}, {"steps": 7}])
def test_mean_and_std_are_those_of_scheduler_step(kind, prediction, spacing, config):
    """Pitfall 5: no spacing is assumed. The scheduler's own step, with known noise, must land on mean + std * noise."""
    scheduler = make_scheduler(kind, prediction, spacing, **config)
    output, sample = noise_like()
    for timestep in scheduler.timesteps.tolist()[:-1]:
        ours = transition(scheduler, output, timestep, sample, eta=1.0)
        extra = {"eta": 1.0} if kind is DDIMScheduler else {}
        theirs = scheduler.step(
            output, timestep, sample, generator=torch.Generator().manual_seed(7), **extra
        ).prev_sample
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(ours.mean + ours.std * noise, theirs, rtol=2e-4, atol=2e-4)
        assert math.isfinite(ours.std) and ours.std > 0
        assert log_prob(theirs, ours).isfinite().all()


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_first_step_from_pure_noise_is_that_of_scheduler_step(kind, prediction):
    """As the bundled generator has it: no signal is left at T (rescale_betas_zero_snr)."""
    scheduler = make_scheduler(kind, prediction, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] < 1e-6
    output, sample = noise_like()
    timestep = int(scheduler.timesteps[0])
    extra = {"eta": 1.0} if kind is DDIMScheduler else {}
    theirs = scheduler.step(output, timestep, sample, generator=torch.Generator().manual_seed(7), **extra).prev_sample
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
    ours = transition(scheduler, output, timestep, sample)
    torch.testing.assert_close(ours.mean + ours.std * noise, theirs, rtol=2e-4, atol=2e-4)
    assert log_prob(theirs, ours).isfinite().all()
    without = deterministic_step(scheduler, output, timestep, sample)
    if kind is DDIMScheduler:
        torch.testing.assert_close(without, scheduler.step(output, timestep, sample).prev_sample, rtol=1e-4, atol=1e-4)
    assert without.isfinite().all()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_step_without_noise_is_the_ddim_step_at_eta_zero(spacing, to_one, offset):
    scheduler = make_scheduler(DDIMScheduler, "v_prediction", spacing, set_alpha_to_one=to_one, steps_offset=offset)
    output, sample = noise_like()
    for timestep in scheduler.timesteps.tolist():
        theirs = scheduler.step(output, timestep, sample, eta=0.0).prev_sample
        torch.testing.assert_close(
            deterministic_step(scheduler, output, timestep, sample), theirs, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_last_step_has_no_density(kind, spacing, offset):
    """Pitfall 4: it goes where the scheduler says, which for DDPM and for DDIM's default is the clean sample."""
    scheduler = make_scheduler(kind, spacing=spacing, steps_offset=offset)
    output, sample = noise_like()
    timestep = int(scheduler.timesteps[-1])
    with pytest.raises(ValueError, match="last step"):
        transition(scheduler, output, timestep, sample)
    theirs = scheduler.step(output, timestep, sample, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(deterministic_step(scheduler, output, timestep, sample), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_scales_the_std_of_ddim(eta):
    scheduler = make_scheduler(DDIMScheduler)
    output, sample = noise_like()
    timestep = int(scheduler.timesteps[4])
    full = transition(scheduler, output, timestep, sample, eta=1.0).std
    assert transition(scheduler, output, timestep, sample, eta=eta).std == pytest.approx(eta * full)
    theirs = scheduler.step(output, timestep, sample, eta=eta, variance_noise=torch.zeros_like(sample)).prev_sample
    torch.testing.assert_close(transition(scheduler, output, timestep, sample, eta).mean, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5])
def test_an_eta_without_density_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \(0, 1\], found"):
        check_scheduler(DDIMScheduler(), eta)


def test_ddpm_refuses_an_eta_that_it_would_ignore():
    with pytest.raises(ValueError, match="eta must be 1.0; found 0.5"):
        check_scheduler(DDPMScheduler(), 0.5)
    with pytest.raises(ValueError, match="learned_range"):
        check_scheduler(DDPMScheduler(variance_type="learned_range"), 1.0)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_schedulers_without_a_density_per_step_are_refused_with_the_reason(kind):
    """Pitfall 6."""
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be used for PPO.*no Gaussian density"):
        check_scheduler(kind(), 1.0)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 6), (3, 3, 3, 3, 3), (1, 4, 2, 2, 2), (2, 1, 2, 2, 2)])
def test_log_prob_is_the_mean_of_the_normal_log_density_for_any_shape(shape):
    """Pitfall 7: B = C and batches of one must not mix up samples and channels. Pitfall 3: a mean, not a sum."""
    generator = torch.Generator().manual_seed(1)
    mean, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    value = value * torch.arange(1, shape[0] + 1).view(-1, 1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(value).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(value, Transition(mean, 0.3)), expected, rtol=1e-5, atol=1e-5)


def test_log_prob_does_not_grow_with_the_size_of_the_latent():
    """Pitfall 3: the same error everywhere must give the same log-ratio at 4 and at 8 voxels a side."""
    mean, noise = noise_like((1, 4, 4, 4, 4))
    ratios = []
    for repeat in (1, 2):
        large_mean, large_value = (x.repeat(1, 1, repeat, repeat, repeat) for x in (mean, mean + 0.5 * noise))
        off = log_prob(large_value, Transition(large_mean * 1.01, 0.5))
        ratios.append((off - log_prob(large_value, Transition(large_mean, 0.5))).item())
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3) and abs(ratios[0]) > 1e-4


def test_kl_is_the_closed_form_and_zero_for_equal_policies():
    """Pitfall 20."""
    a, b = noise_like((3, 2, 4, 4, 4))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, 0.2), normal(b, 0.2)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(Transition(a, 0.2), Transition(b, 0.2)), expected)
    assert (gaussian_kl(Transition(a, 0.2), Transition(a, 0.2)) == 0).all()
    with pytest.raises(ValueError, match="one timestep"):
        gaussian_kl(Transition(a, 0.2), Transition(a, 0.3))


def test_half_precision_network_outputs_give_float32_log_probs():
    scheduler = make_scheduler(DDIMScheduler)
    output, sample = noise_like()
    step = transition(scheduler, output.bfloat16(), int(scheduler.timesteps[3]), sample)
    assert step.mean.dtype == torch.float32 and log_prob(sample.bfloat16(), step).dtype == torch.float32
