"""Rectified flow: times, training pairs, the SDE of Flow-GRPO against closed forms, sampling and partial noising."""

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from conftest import SPACING, VOLUME_SHAPE
from diffusers_med3d import DiffusionUNet3D, LatentDiffusionConfig, LatentDiffusionTrainer, MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.models import DiffusionUNet3DOutput
from diffusers_med3d.rl import check_scheduler, deterministic_step, gaussian_kl, log_prob, rollout, transition
from diffusers_med3d.schedulers.flow import (
    flow_scheduler,
    logit_normal_times,
    preconditioning,
    set_timesteps,
    shift_times,
)
from diffusers_med3d.schedulers.noising import noised, training_timesteps
from diffusers_med3d.trainers.diffusion import default_scheduler
from diffusers_med3d.utils.seeding import generators_for

MEAN, STD = 0.7, 0.5  # of the data in every closed form


def scheduler_of(steps: int, shift: float = 1.0, **config) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **config)
    set_timesteps(scheduler, steps)
    return scheduler


def true_velocity(sample: torch.Tensor, time: float) -> torch.Tensor:
    """E[noise - x_0 | x_t] for data ~ N(MEAN, STD^2): both expectations are those of a linear Gaussian model."""
    surprise = (sample - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
    return time * surprise - (MEAN + (1 - time) * STD**2 * surprise)


def marginal(time: float) -> tuple[float, float]:
    """Mean and std of x_t."""
    return (1 - time) * MEAN, math.sqrt((1 - time) ** 2 * STD**2 + time**2)


def step_moments(scheduler, index: int, mean: float, std: float, noise_level: float) -> tuple[float, float]:
    """Mean and std after one step of the true flow: the step is affine in x, so x = 0 and x = 1 tell all of it."""
    timestep, time = scheduler.timesteps[index].item(), scheduler.sigmas[index].item()
    probe = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    if index == len(scheduler.timesteps) - 1:
        after, noise = deterministic_step(scheduler, true_velocity(probe, time), timestep, probe), 0.0
    else:
        after, noise = transition(scheduler, true_velocity(probe, time), timestep, probe, noise_level)
    offset, end = after.flatten().double().tolist()
    slope = end - offset
    return slope * mean + offset, math.hypot(slope * std, noise)


# Times


def test_sampling_times_are_equal_steps_from_noise_to_data_before_the_shift():
    assert scheduler_of(4).timesteps.tolist() == [1000, 750, 500, 250]
    shifted = scheduler_of(4, shift=3.0)
    torch.testing.assert_close(shifted.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    torch.testing.assert_close(shifted.timesteps, torch.tensor([1000.0, 900, 750, 500]))


def test_the_shift_of_training_is_that_of_sampling():
    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(shift_times(times, 3.0), scheduler_of(4, shift=3.0).sigmas[:-1])
    with pytest.raises(ValueError, match="shift must be a positive number, got 0"):
        flow_scheduler(0)


def test_a_training_pair_is_a_point_of_the_straight_line_and_its_velocity():
    clean, noise = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    scheduler = flow_scheduler(shift=3.0)
    timesteps = training_timesteps(scheduler, torch.tensor([0.25, 0.5]))
    assert timesteps.tolist() == [500, 750]
    state, velocity = noised(scheduler, clean, noise, timesteps)
    torch.testing.assert_close(state[0], 0.5 * clean[0] + 0.5 * noise[0])
    torch.testing.assert_close(state[1], 0.25 * clean[1] + 0.75 * noise[1])
    for sample, t in zip(range(2), (0.5, 0.75), strict=True):  # going back along the velocity for a time t ends at x_0
        torch.testing.assert_close(state[sample] - t * velocity[sample], clean[sample])


def test_flow_is_one_more_prediction_type_and_a_shift_belongs_to_it_alone():
    scheduler = default_scheduler("flow", shift=2.0)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.config.shift == 2.0
    with pytest.raises(ValueError, match="shift belongs to prediction_type='flow'; got shift=2.0 for 'epsilon'"):
        default_scheduler("epsilon", shift=2.0)


# The step as an action


@pytest.mark.parametrize("shift", [1.0, 1.4, 3.0])
def test_the_step_without_noise_is_that_of_the_scheduler(shift):
    scheduler = scheduler_of(7, shift)
    sample, velocity = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(velocity, timestep, sample).prev_sample
        torch.testing.assert_close(deterministic_step(scheduler, velocity, timestep.item(), sample), theirs)


@pytest.mark.parametrize("noise_level", [0.7, 1.0])
@pytest.mark.parametrize("shift", [1.0, 1.4, 3.0])
def test_the_stochastic_step_is_that_of_the_paper_and_finite_at_pure_noise(shift, noise_level):
    scheduler = scheduler_of(7, shift)
    sample, velocity = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    for index, timestep in enumerate(scheduler.timesteps.tolist()[:-1]):
        step = transition(scheduler, velocity, timestep, sample, noise_level)
        t, following = scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()
        sigma = noise_level * math.sqrt(t / (1 - (following if index == 0 else t)))
        mean = sample + (velocity + sigma**2 / (2 * t) * (sample + (1 - t) * velocity)) * (following - t)
        torch.testing.assert_close(step.mean, mean)
        assert step.std == pytest.approx(sigma * math.sqrt(t - following), rel=1e-5)
        assert log_prob(sample, step).isfinite().all()


@pytest.mark.parametrize("noise_level", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_leaves_the_distribution_at_every_time_as_it_is(shift, noise_level):
    """Closed form for Gaussian data, from the exact law at t = 0.9 on; the error falls with the step."""
    errors = []
    for steps in (100, 1000):
        scheduler = scheduler_of(steps, shift)
        first = next(i for i, t in enumerate(scheduler.sigmas.tolist()) if t <= 0.9)
        (mean, std), worst = marginal(scheduler.sigmas[first].item()), 0.0
        for index in range(first, steps):
            mean, std = step_moments(scheduler, index, mean, std, noise_level)
            exact = marginal(scheduler.sigmas[index + 1].item())
            worst = max(worst, abs(mean - exact[0]), abs(std - exact[1]))
        errors.append(worst)
    assert errors[1] < 0.003 and errors[1] < errors[0] / 5


def test_noise_does_not_change_what_is_sampled_from_pure_noise():
    scheduler, mean, std = scheduler_of(1000), 0.0, 1.0
    for index in range(1000):
        mean, std = step_moments(scheduler, index, mean, std, 1.0)
    assert (mean, std) == (pytest.approx(MEAN, abs=0.003), pytest.approx(STD, abs=0.003))


def test_the_kl_is_that_of_two_gaussians_and_the_closed_form_of_the_paper():
    """Pitfall 20."""
    scheduler = scheduler_of(6)
    sample, velocity, reference = (torch.randn(3, 2, 4, 4, 4) for _ in range(3))
    step, other = (transition(scheduler, v, scheduler.timesteps[2].item(), sample, 0.7) for v in (velocity, reference))
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(step.mean, step.std), normal(other.mean, other.std))
    torch.testing.assert_close(gaussian_kl(step, other), kl.flatten(1).mean(1))
    t, length = scheduler.sigmas[2].item(), 1 / 6
    sigma = 0.7 * math.sqrt(t / (1 - t))
    factor = length / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    torch.testing.assert_close(gaussian_kl(step, other), factor * (velocity - reference).square().flatten(1).mean(1))


def test_the_last_step_has_no_density_and_moves_without_noise():
    """Pitfall 4."""
    scheduler, sample = scheduler_of(5), torch.randn(1, 2, 4, 4, 4)
    last = scheduler.timesteps[-1].item()
    with pytest.raises(ValueError, match="last step"):
        transition(scheduler, sample, last, sample)
    torch.testing.assert_close(deterministic_step(scheduler, sample, last, sample), 0.8 * sample)
    with pytest.raises(ValueError, match="Timestep 123.0 is none of the scheduler's"):
        transition(scheduler, sample, 123.0, sample)


def test_a_rollout_is_replayed_with_a_ratio_of_exactly_one():
    """Pitfall 1: every stochastic step, the one from pure noise included."""
    torch.manual_seed(1)
    network = torch.nn.Conv3d(2, 2, 3, padding=1)
    scheduler, initial = scheduler_of(6, 3.0), torch.randn(3, 2, 4, 4, 4)

    def predict(sample: torch.Tensor, timestep: float) -> torch.Tensor:
        return network(sample) + 1e-3 * timestep

    seen = rollout(predict, scheduler, initial, generators_for([(i,) for i in range(3)]), range(5), range(5), 0.7)
    for index, state, following, old in zip(seen.steps, *seen[1:4], strict=True):
        t = scheduler.timesteps[index].item()
        assert torch.equal(log_prob(following, transition(scheduler, predict(state, t), t, state, 0.7)), old)
    assert (seen.next_states - seen.states).std() > 0.1 and seen.final.isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler cannot be used for PPO.*no Gaussian"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "other steps than PPO trains"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True; expected both False"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
    ],
)
def test_schedulers_that_are_no_policy_are_refused_with_the_reason(scheduler, message):
    """Pitfall 6."""
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler, 1.0)


def test_a_flow_without_noise_is_no_policy():
    with pytest.raises(ValueError, match=r"eta must lie in \(0, 1\], found 0.0"):
        check_scheduler(flow_scheduler(), 0.0)


# The pipeline


class TrueFlow(DiffusionUNet3D):
    """The exact velocity for data ~ N(MEAN, STD^2) in every voxel."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return DiffusionUNet3DOutput(sample=true_velocity(sample, float(torch.as_tensor(timestep).max()) / 1000))


class Stands(DiffusionUNet3D):
    """No velocity at all: what sampling starts from is what it ends at."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return DiffusionUNet3DOutput(sample=torch.zeros_like(sample))


@pytest.fixture
def flow_pipeline(tiny_pipeline) -> MedDiffusion3DPipeline:
    config = {name: tiny_pipeline.config[name] for name in ("volume_shape", "spacing", "class_names", "channel_names")}
    pipeline = MedDiffusion3DPipeline(tiny_pipeline.vae, tiny_pipeline.unet, flow_scheduler(shift=3.0), **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_loss_of_a_flow_is_the_error_of_the_velocity_at_shifted_times(flow_pipeline, brains_folder, tmp_path):
    data = DataArguments(brains_folder, "unused.json", volume_shape=list(VOLUME_SHAPE), spacing=list(SPACING))
    scans = VolumeDataset(brains_folder, ["sub-01", "sub-04"], **data.reading())
    args = LatentDiffusionConfig(
        str(tmp_path),
        copies=1,
        report_to="none",
        picture_steps=0,
        bf16=False,
        image_weighting=False,
        time_distribution="uniform",
    )
    trainer = LatentDiffusionTrainer(flow_pipeline, args, scans)
    clean, noise, prediction = (torch.randn(2, 4, 4, 4, 4) for _ in range(3))
    seen = []

    def network(sample: torch.Tensor, timestep: torch.Tensor, class_labels: None, return_dict: bool) -> tuple:
        seen.append((sample, timestep))
        return (prediction,)

    loss = trainer._denoising_loss(network, clean, None, noise, torch.tensor(0.25))
    times = torch.tensor([0.5, 0.9])  # 0.25 and 0.75 with a shift of 3
    torch.testing.assert_close(seen[0][1], 1000 * times)
    torch.testing.assert_close(seen[0][0], noise + (1 - times).view(2, 1, 1, 1, 1) * (clean - noise))
    torch.testing.assert_close(loss, (prediction - noise + clean).square().mean())


MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("scheduler_class", "changes"),
    [
        (FlowMatchEulerDiscreteScheduler, {"shift": 1.0}),
        (FlowMatchEulerDiscreteScheduler, {}),
        (DPMSolverMultistepScheduler, MULTISTEP),
        (UniPCMultistepScheduler, MULTISTEP),
    ],
)
def test_every_flow_scheduler_samples_the_distribution_of_the_true_flow(flow_pipeline, scheduler_class, changes):
    flow_pipeline.scheduler = scheduler_class.from_config(flow_pipeline.scheduler.config, **changes)
    flow_pipeline.unet = TrueFlow.from_config(dict(flow_pipeline.unet.config)).eval()
    options = {"num_samples": 64, "num_inference_steps": 100, "output_type": "latent"}
    latents = flow_pipeline(**options, generator=torch.Generator().manual_seed(0)).volumes
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(STD, abs=0.03)


def test_partial_noising_of_a_flow_starts_on_the_straight_line_to_noise(flow_pipeline, tiny_volumes):
    flow_pipeline.unet = Stands.from_config(dict(flow_pipeline.unet.config)).eval()
    options = {"volumes": tiny_volumes, "num_inference_steps": 4, "output_type": "latent"}
    clean = flow_pipeline.encode_latents(tiny_volumes)
    for strength, time in ((0.25, 0.5), (0.5, 0.75), (0.75, 0.9)):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
        start = flow_pipeline(**options, strength=strength, generator=torch.Generator().manual_seed(5)).volumes
        torch.testing.assert_close(start, (1 - time) * clean + time * noise)
    assert torch.equal(flow_pipeline(**options, strength=0.0).volumes, clean)
    whole = flow_pipeline(**options, strength=1.0, generator=torch.Generator().manual_seed(5)).volumes
    assert torch.equal(whole, noise)


def test_given_latents_are_where_a_flow_starts_and_seeds_repeat(flow_pipeline):
    noise = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    given = flow_pipeline(latents=noise, class_labels=[0, None], num_inference_steps=3, guidance_scale=2.0).volumes
    drawn = flow_pipeline(
        class_labels=[0, None], num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(3)
    ).volumes
    assert torch.equal(given, drawn) and given.shape == (2, 1, 16, 16, 16)


def test_a_flow_pipeline_is_saved_with_its_shift(flow_pipeline, tmp_path):
    flow_pipeline.save_pretrained(tmp_path)
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler and loaded.scheduler.config.shift == 3.0
    noise = torch.randn(1, 4, 4, 4, 4)
    ours, theirs = (p(latents=noise, num_inference_steps=3).volumes for p in (flow_pipeline, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler has no prediction_type"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "write the shift for your size into shift"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "must have use_flow_sigmas=True"),
        (DPMSolverMultistepScheduler.from_config(flow_scheduler().config), "predicts the velocity of a rectified flow"),
    ],
)
def test_a_scheduler_that_does_not_fit_a_flow_is_refused(flow_pipeline, scheduler, message):
    """Left alone it would sample noise without a complaint."""
    flow_pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        flow_pipeline(num_inference_steps=2)


def test_a_flow_scheduler_is_refused_where_the_network_predicts_something_else(tiny_pipeline):
    tiny_pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler .* does not fit: .* variance-preserving"):
        tiny_pipeline(num_inference_steps=2)


# --- preconditioning and logit-normal times ---


def test_preconditioning_is_that_of_karras_et_al_seen_from_a_flow():
    times, variance = torch.tensor([0.03, 0.4, 0.5, 0.97]), torch.rand(3, 2, 2, 2) * 4 + 0.1
    noisy, network = torch.randn(2, 4, 3, 2, 2, 2).double()
    factors = preconditioning(times, variance)
    velocity = factors.skip * noisy + factors.output * network
    for i, t in enumerate(times.double()):
        sigma, data = t / (1 - t), variance.double().sqrt()  # equation 7 and table 1, column EDM
        y = noisy[i] / (1 - t)  # their noisy sample
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / (sigma**2 + data**2).sqrt()
        c_in = 1 / (sigma**2 + data**2).sqrt()
        denoised = c_skip * y - c_out * network[i]  # our network says -F
        torch.testing.assert_close(velocity[i], (noisy[i] - denoised) / t, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((factors.input[i] * noisy[i]), c_in * y, rtol=1e-5, atol=1e-5)


def test_a_preconditioned_network_sees_and_must_say_unit_variance_at_every_time_and_place():
    variance = torch.tensor([0.0, 0.01, 1.0, 9.0]).view(4, 1, 1, 1)
    clean, noise = variance.sqrt() * torch.randn(20000, 4, 1, 1, 1), torch.randn(20000, 4, 1, 1, 1)
    for t in (0.02, 0.5, 1.0):
        factors = preconditioning(torch.full((20000,), t), variance)
        noisy = (1 - t) * clean + t * noise
        assert (factors.input * noisy).std(0).flatten().tolist() == pytest.approx([1.0] * 4, rel=0.03)
        rest = noise - clean - factors.skip * noisy  # what the network's part must be
        assert rest[:, 0].abs().max() < 1e-3  # nothing is left to say where nothing varies
        assert (rest / factors.output)[:, 1:].std(0).flatten().tolist() == pytest.approx([1.0] * 3, rel=0.03)
    assert preconditioning(torch.tensor([0.0]), variance).skip.isfinite().all()


def test_logit_normal_times_are_quantiles_of_a_normal_distribution_of_the_log_of_noise_over_signal():
    uniform = (torch.arange(1000) + 0.5) / 1000
    times = logit_normal_times(uniform, mean=0.4, std=1.2)
    logits = torch.log(times / (1 - times))
    assert logits.mean().item() == pytest.approx(0.4, abs=1e-2) and logits.std().item() == pytest.approx(1.2, abs=2e-2)
    assert torch.equal(times, times.sort().values) and torch.equal(times, logit_normal_times(uniform, 0.4, 1.2))
    ends = logit_normal_times(torch.tensor([0.0, 1.0]), 0.0, 1.0)
    assert 0 < ends[0] < 0.02 and 0.98 < ends[1] < 1
