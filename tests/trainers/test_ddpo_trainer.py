import asyncio
import functools
import inspect
import json
import math
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_med3d import (
    DiffusionUNet3D,
    MedDiffusion3DPipeline,
    VolumeRewardModel,
    WitnessReward,
    WitnessRewardModel,
    viz,
)
from diffusers_med3d.pipelines.lora import LORA_FILE
from diffusers_med3d.rl import clipped_loss, group_advantages, log_prob, rollout, transition
from diffusers_med3d.trainers import ddpo_rollout
from diffusers_med3d.trainers.base import last_checkpoint
from diffusers_med3d.trainers.ddpo import DDPOTrainer
from diffusers_med3d.trainers.ddpo_config import DDPOConfig
from diffusers_med3d.trainers.ddpo_report import compare, table
from diffusers_med3d.trainers.lora import add_lora, default_targets
from diffusers_med3d.utils.stopping import TrainingStopped

CONDITIONS = datasets.Dataset.from_dict({"class_label": [0, 1, 2]})


def brightness(volumes, **conditions):
    return volumes.mean(dim=(1, 2, 3, 4))


def contrast(volumes, **conditions):
    return [v.std().item() for v in volumes]


def make_args(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=6,
        per_device_eval_batch_size=3,
        num_generations=4,
        steps_per_generation=2,
        num_inference_steps=4,
        sde_window_size=2,
        eval_num_inference_steps=3,
        learning_rate=1e-3,
        ema_decay=0.5,
        report_to="none",
        picture_steps=0,
        disable_tqdm=True,
        bf16=False,
        save_strategy="no",
    )
    return DDPOConfig(**{**defaults, **options})


def make_trainer(pipeline, folder, rewards=(brightness,), peft_config=None, conditions=CONDITIONS, **options):
    return DDPOTrainer(
        model=pipeline,
        reward_funcs=list(rewards),
        args=make_args(folder, **options),
        train_dataset=conditions,
        peft_config=peft_config,
    )


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def unet_copy(pipeline):
    unet = DiffusionUNet3D.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    return unet.eval()


def raised(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


# What is trained


@pytest.mark.slow
def test_every_parameter_moves(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    # the null class is the only thing that unguided sampling of real classes never uses; it is one row of a table
    assert raised(before, after) == list(before)


def test_the_frozen_parts_do_not_move(tiny_pipeline, tmp_path):
    before = {k: v.clone() for k, v in tiny_pipeline.vae.state_dict().items()}
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=1)
    reference = {k: v.clone() for k, v in trainer.reference.state_dict().items()}
    trainer.train()
    assert all(torch.equal(before[k], v) for k, v in tiny_pipeline.vae.state_dict().items())
    assert all(torch.equal(reference[k], v) for k, v in trainer.reference.state_dict().items())


@pytest.mark.slow
def test_a_reward_that_can_be_reached_rises(tiny_pipeline, tmp_path):
    trainer = make_trainer(
        tiny_pipeline, tmp_path, max_steps=16, learning_rate=3e-3, beta=0.0, num_generations=8,
        per_device_train_batch_size=12, gradient_accumulation_steps=2, eval_num_inference_steps=4,
    )  # fmt: skip
    before = trainer.sample_and_score(CONDITIONS, 4).rewards
    trainer.train()
    gain = trainer.sample_and_score(CONDITIONS, 4).rewards - before
    assert gain.mean() > 0.002


# The ratio


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_ratio_is_one_before_the_first_update_of_every_rollout(tiny_pipeline, tmp_path, guidance_scale, bf16):
    """docs/pitfalls.md, 1, 8 (bf16) and 11 (guidance in rollout and update); the reference is asked alike (20)."""
    trainer = make_trainer(tiny_pipeline, tmp_path, guidance_scale=guidance_scale, bf16=bf16, max_steps=6)
    trainer.train()
    deviations = [log["ratio/first_step"] for log in training_logs(trainer) if "ratio/first_step" in log]
    assert len(deviations) == 3  # two updates per rollout, the first of each is on-policy
    assert max(deviations) < 1e-6
    assert training_logs(trainer)[0]["kl"] == 0.0 < training_logs(trainer)[-1]["kl"]
    for log in training_logs(trainer):
        assert ("ratio/max_deviation" in log) == ("clip_ratio" in log)  # logged after an update, where epsilon can act
        if "clip_ratio" in log:
            assert log["ratio/max_deviation"] >= abs(log["ratio/mean"] - 1) > 1e-6


@pytest.mark.slow
def test_guidance_left_out_of_the_update_would_be_seen(tiny_pipeline, tmp_path):
    """Pitfall 11."""
    trainer = make_trainer(tiny_pipeline, tmp_path, guidance_scale=3.0, max_steps=1)
    honest = trainer.compute_loss

    def without_guidance(model, inputs):
        trainer.args.guidance_scale = 1.0
        return honest(model, inputs)

    trainer.compute_loss = without_guidance
    with pytest.warns(UserWarning, match="rollout and update disagree"):
        trainer.train()
    assert training_logs(trainer)[0]["ratio/first_step"] > 1e-4


@pytest.mark.slow
def test_dropout_is_off_in_rollout_and_update(tiny_pipeline, tmp_path):
    """Pitfall 10: a UNet whose blocks drop half of their activations in training mode."""
    for block in tiny_pipeline.unet.down_blocks:
        block.resnets[0].conv1 = torch.nn.Sequential(block.resnets[0].conv1, torch.nn.Dropout(0.5))
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=1, beta=0.0)
    trainer.train()
    assert training_logs(trainer)[0]["ratio/first_step"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["ddpm", "flow", "less noise", "all stochastic", "subset", "shared noise", "own noise", "offload", "no labels"],
)
def test_variants_of_the_rollout_train_with_a_ratio_of_one(tiny_pipeline, tmp_path, kind):
    options = {
        "less noise": {"eta": 0.5, "beta": 0.0},
        "all stochastic": {"sde_window_size": 0},
        "subset": {"sde_window_size": 0, "timestep_fraction": 0.5},
        "shared noise": {"share_initial_noise": True},
        "own noise": {"share_initial_noise": False},
        "offload": {"offload_trajectories": True},
    }.get(kind, {})
    conditions = CONDITIONS if kind != "no labels" else datasets.Dataset.from_dict({"class_label": [None] * 3})
    if kind == "ddpm":
        config = {k: v for k, v in tiny_pipeline.scheduler.config.items() if k != "set_alpha_to_one"}
        tiny_pipeline.scheduler = DDPMScheduler.from_config(config)
    if kind == "flow":
        scheduler, options = FlowMatchEulerDiscreteScheduler(shift=3.0), {"sde_window_size": 0}
        tiny_pipeline = MedDiffusion3DPipeline(tiny_pipeline.vae, tiny_pipeline.unet, scheduler, volume_shape=[16] * 3)
    trainer = make_trainer(tiny_pipeline, tmp_path, conditions=conditions, max_steps=1, **options)
    trainer.train()
    assert training_logs(trainer)[0]["ratio/first_step"] < 1e-6
    states = trainer._chunks[0].trajectory.states  # samples 0 and 3 are of one condition
    if kind != "subset":  # whose first trained step need not be the first of the window
        assert torch.equal(states[0, 0], states[0, 3]) == (kind != "own noise")


# The forward-process objective

AWM = {"loss_type": "awm", "forward_times": 3}


def test_awm_has_a_ratio_of_one_and_keeps_clean_latents_alone(tiny_pipeline, tmp_path):
    """With a sampler that has no step densities, and guidance. A rollout of more steps keeps no more."""
    tiny_pipeline.scheduler = DPMSolverMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    trainer = make_trainer(tiny_pipeline, tmp_path, **AWM, num_inference_steps=7, guidance_scale=2.0)
    trainer.train()
    first, second = training_logs(trainer)
    assert first["ratio/first_step"] < 1e-6 and first["kl"] == 0.0
    assert second["kl"] > 0 and second["ratio/max_deviation"] > 1e-6 and second["clip_ratio"] <= 1
    samples = trainer._chunks[0].trajectory
    tensors = {name: tuple(v.shape) for name, v in samples._asdict().items() if torch.is_tensor(v)}
    assert tensors == {"final": (6, 4, 4, 4, 4), "log_probs": (3, 6)}
    assert not torch.equal(samples.final[0], samples.final[3])  # one condition, own noise


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vp", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("flow", "lora"))])
def test_awm_raises_a_reward_that_can_be_reached(tiny_pipeline, tmp_path, kind):
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        tiny_pipeline = MedDiffusion3DPipeline(tiny_pipeline.vae, tiny_pipeline.unet, scheduler, volume_shape=[16] * 3)
    trainer = make_trainer(
        tiny_pipeline, tmp_path, max_steps=16, learning_rate=3e-3, beta=0.0, num_generations=8, epsilon=1.0,
        per_device_train_batch_size=12, gradient_accumulation_steps=2, eval_num_inference_steps=4, **AWM,
        peft_config=LoraConfig(r=4, lora_alpha=8) if kind == "lora" else None,
    )  # fmt: skip
    before = trainer.sample_and_score(CONDITIONS, 4).rewards
    trainer.train()
    gain = trainer.sample_and_score(CONDITIONS, 4).rewards - before
    assert gain.mean() > 0.002


@pytest.mark.parametrize(
    "options, named",
    [
        ({"loss_type": "awm", "eta": 0.5}, "eta cannot act with loss_type='awm'"),
        ({"loss_type": "awm", "share_initial_noise": True}, "share_initial_noise cannot act"),
        ({"forward_times": 3}, "forward_times cannot act with loss_type='ddpo'"),
        ({"loss_type": "nft"}, r"loss_type must be one of \('ddpo', 'awm'\), got 'nft'"),
    ],
)
def test_what_cannot_act_with_a_loss_type_is_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        make_args(tmp_path, **options)


@pytest.mark.slow
def test_training_again_starts_with_a_new_rollout(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=1)
    for _ in range(2):
        trainer.train()
        assert training_logs(trainer)[-1]["ratio/first_step"] < 1e-6


@pytest.mark.slow
def test_the_kl_is_zero_at_the_start_and_grows(tiny_pipeline, tmp_path):
    """Pitfall 20."""
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=4)
    honest, expected = trainer.compute_loss, []

    def record(model, inputs):
        t, states, labels = inputs["timestep"], inputs["states"], inputs["conditions"].class_labels
        with torch.no_grad():
            policy, reference = (
                transition(trainer.scheduler, unet(states, t, labels).sample, t, states)
                for unet in (model, trainer.reference)
            )
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(*(normal(step.mean, step.std) for step in (policy, reference)))
        expected.append(kl.mean().item())
        return honest(model, inputs)

    trainer.compute_loss = record
    trainer.train()
    kl = [log["kl"] for log in training_logs(trainer)]
    assert kl[0] == 0.0 and kl[-1] > 0.0
    means = torch.tensor(expected).view(4, 2).mean(1)  # two trained steps per optimizer step
    assert kl == pytest.approx(means.tolist(), rel=1e-3, abs=1e-9)


@pytest.mark.slow
def test_beta_changes_the_gradient(tiny_pipeline, tmp_path):
    """Pitfall 20: a KL inside no_grad would be logged and do nothing."""
    gradients = {}
    start = {k: v.clone() for k, v in tiny_pipeline.unet.state_dict().items()}
    for beta in (1e-9, 100.0):
        tiny_pipeline.unet.load_state_dict(start)
        trainer = make_trainer(tiny_pipeline, tmp_path, beta=beta, max_steps=2, max_grad_norm=0.0)
        trainer.train()
        gradients[beta] = [log["grad_norm"] for log in training_logs(trainer)]
    assert gradients[1e-9][0] == pytest.approx(gradients[100.0][0], rel=1e-4)  # at the start the KL is flat
    assert gradients[100.0][1] > 1.01 * gradients[1e-9][1]


# Counting


@pytest.mark.slow
def test_optimizer_steps_are_counted_in_samples_not_in_timesteps(tiny_pipeline, tmp_path):
    """Pitfall 18: 3 rows, one rollout per epoch of 2 x 6 samples, 2 passes: 4 optimizer steps; with accumulation 2."""
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=-1, num_train_epochs=1, num_iterations=2)
    trainer.train()
    assert trainer.state.global_step == 4
    trainer = make_trainer(
        tiny_pipeline, tmp_path, max_steps=-1, num_train_epochs=1, num_iterations=2, gradient_accumulation_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def gradient_of_one_step(trainer):
    gradients = {}

    def keep(*args, **kwargs):
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    trainer.callback_handler.callbacks[0].on_pre_optimizer_step = keep
    trainer.train()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "batches"), [(12, 1), (3, 4)])
def test_the_gradient_of_a_step_is_that_of_the_mean_over_all_samples_and_trained_steps(
    tiny_pipeline, tmp_path, batch_size, batches
):
    """Pitfall 18: 12 samples at once, or 4 batches of 3; never a sum over batches or timesteps."""
    trainer = make_trainer(
        tiny_pipeline, tmp_path, max_steps=1, max_grad_norm=0.0, learning_rate=0.0, beta=0.0,
        per_device_train_batch_size=batch_size, steps_per_generation=batches, gradient_accumulation_steps=batches,
    )  # fmt: skip
    gradients = gradient_of_one_step(trainer)
    losses = []
    for chunk in trainer._chunks:
        path = chunk.trajectory
        for w, index in enumerate(path.steps):
            t = int(trainer.scheduler.timesteps[index])
            step = transition(
                trainer.scheduler,
                trainer.model(path.states[w], t, chunk.conditions.class_labels).sample,
                t,
                path.states[w],
            )
            new = log_prob(path.next_states[w], step)
            losses.append(clipped_loss(new, path.log_probs[w], chunk.advantages, trainer.args.epsilon)[0])
    assert sum(len(loss) for loss in losses) == 12 * 2
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    expected = torch.autograd.grad(torch.cat(losses).mean(), parameters)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=2e-3 * float(gradient.abs().max()) + 1e-5)
    assert max(gradient.abs().max() for gradient in expected) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "rollouts"), [(1, 1), (2, 2)])
def test_every_transition_is_used_once_per_pass(tiny_pipeline, tmp_path, accumulation, rollouts):
    """Pitfalls 18 and 19: four optimizer steps are two passes over one rollout, or, accumulating 2, over two."""
    trainer = make_trainer(
        tiny_pipeline,
        tmp_path,
        max_steps=4,
        num_iterations=2,
        sde_window_size=0,
        beta=0.0,
        gradient_accumulation_steps=accumulation,
        share_initial_noise=False,
    )
    honest, seen = trainer.compute_loss, []

    def record(model, inputs):
        seen.extend((inputs["timestep"], s.sum().item()) for s in inputs["states"])
        return honest(model, inputs)

    trainer.compute_loss = record
    trainer.train()
    transitions = rollouts * 12 * 3  # samples x stochastic steps of 4
    assert len(seen) == 2 * transitions
    assert len(set(seen)) == transitions and all(seen.count(s) == 2 for s in set(seen))


def test_conditions_are_repeated_to_fill_rollouts_and_permuted(tiny_pipeline, tmp_path):
    conditions = datasets.Dataset.from_dict({"class_label": [0, 1, 2, 0, 1]})
    trainer = make_trainer(tiny_pipeline, tmp_path, conditions=conditions)
    assert trainer.rollouts_per_epoch == 2 and trainer.conditions_per_rollout == 3
    first_epoch = trainer._condition_rows(0) + trainer._condition_rows(1)
    assert set(first_epoch) == {0, 1, 2, 3, 4} and len(first_epoch) == 6
    assert trainer._condition_rows(0) == first_epoch[:3]
    assert len({tuple(trainer._condition_rows(2 * e)) for e in range(8)}) > 1


# Rewards


@pytest.mark.slow
def test_async_and_plain_rewards_with_missing_scores_are_weighed(tiny_pipeline, tmp_path):
    """Pitfall 14."""
    seen = {}

    async def slow(volumes, class_label, **conditions):
        await asyncio.sleep(0.01)
        seen.update(labels=class_label, shape=tuple(volumes.shape))
        return [None if i == 0 else float(v.mean()) for i, v in enumerate(volumes)]

    trainer = make_trainer(tiny_pipeline, tmp_path, [slow, contrast], reward_weights=[1.0, 0.5], max_steps=1)
    trainer.train()
    assert seen["shape"] == (12, 1, 16, 16, 16) and sorted(seen["labels"]) == [0] * 4 + [1] * 4 + [2] * 4
    assert seen["labels"] == torch.cat([chunk.conditions.class_labels for chunk in trainer._chunks]).tolist()
    assert trainer._chunks[0].advantages[0] == 0 and (trainer._chunks[0].advantages[1:] != 0).all()
    log = training_logs(trainer)[0]
    assert log["rewards/unscored"] == pytest.approx(1 / 12)
    for key in ("rewards/slow/mean", "rewards/slow/std", "rewards/contrast/mean", "rewards/contrast/frac_zero_std",
                "quality/sharpness", "quality/diversity", "seconds/rollout", "seconds/decode", "seconds/reward",
                "seconds/update"):  # fmt: skip
        assert key in log


@pytest.mark.slow
def test_advantages_compare_samples_of_one_condition(tiny_pipeline, tmp_path):
    """A reward that only says which class was asked for prefers nothing."""

    def class_itself(volumes, class_label):
        return [100.0 * c for c in class_label]

    trainer = make_trainer(tiny_pipeline, tmp_path, [class_itself], max_steps=1)
    trainer.train()
    assert trainer._chunks and all((chunk.advantages == 0).all() for chunk in trainer._chunks)
    assert training_logs(trainer)[0]["rewards/class_itself/frac_zero_std"] == 1.0


@pytest.mark.slow
def test_a_brighter_sample_of_a_condition_has_the_higher_advantage(tiny_pipeline, tmp_path):
    """Pitfall 15: rewards and advantages come back in the order of the samples."""
    seen = []

    def recorded(volumes, **conditions):
        seen.append(brightness(volumes))
        return seen[-1]

    trainer = make_trainer(tiny_pipeline, tmp_path, [recorded], max_steps=1)
    trainer.train()
    labels = torch.cat([chunk.conditions.class_labels for chunk in trainer._chunks])
    advantages = torch.cat([chunk.advantages for chunk in trainer._chunks])
    for label in range(3):
        assert (labels == label).sum() == 4
        assert torch.equal(seen[0][labels == label].argsort(), advantages[labels == label].argsort())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "group", "advantage_clip": 0.7},
        {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": [1.0, 3.0]},
    ],
)
def test_advantages_are_those_of_the_options(tiny_pipeline, tmp_path, options):
    """Pitfalls 14 and 23: which rewards count how much, and where advantages are clipped."""
    seen = []

    def recorded(volumes, **conditions):
        seen.append(torch.stack([brightness(volumes), torch.tensor(contrast(volumes))], dim=1))
        return seen[-1][:, 0]

    trainer = make_trainer(tiny_pipeline, tmp_path, [recorded, contrast], max_steps=1, **options)
    trainer.train()
    grouped = seen[0].view(4, 3, 2).transpose(0, 1).reshape(12, 2)  # samples 0, 3, 6, 9 are of one condition
    names = {"multi_objective_aggregation": "aggregation", "reward_weights": "weights", "advantage_clip": "clip"}
    expected = group_advantages(grouped, 4, **{names.get(name, name): value for name, value in options.items()})
    advantages = torch.cat([chunk.advantages for chunk in trainer._chunks])
    torch.testing.assert_close(advantages, expected.values.view(3, 4).T.reshape(-1))
    assert not torch.allclose(expected.values, group_advantages(grouped, 4).values, atol=1e-2)


def test_two_rewards_of_one_name_are_told_apart(tiny_pipeline, tmp_path):
    rewards = [contrast, contrast, functools.partial(functools.partial(brightness, scale=2), offset=1)]
    assert make_trainer(tiny_pipeline, tmp_path, rewards).reward_names == ["contrast", "contrast_2", "brightness"]


@pytest.mark.parametrize(("epsilon", "word"), [(1e-9, "always"), (1.0, "never")])
def test_a_clip_range_that_cannot_be_right_is_reported(tiny_pipeline, tmp_path, epsilon, word):
    """Pitfall 3."""
    trainer = make_trainer(tiny_pipeline, tmp_path, epsilon=epsilon)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            trainer._watch({"clip_ratio": float(word == "always")})
    assert sum(f"{word} acts" in str(w.message) for w in caught) == 1


# Refusals


def test_a_scheduler_without_density_is_refused(tiny_pipeline, tmp_path):
    """Pitfall 6."""
    tiny_pipeline.scheduler = DPMSolverMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler cannot be used for PPO"):
        make_trainer(tiny_pipeline, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "eta must lie"),
        ({"num_generations": 5}, r"= 12 samples must be a multiple of num_generations \(5\)"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"gradient_accumulation_steps": 3}, "must be a multiple of gradient_accumulation_steps"),
        ({"sde_window_size": 4}, "window of 4 steps does not fit"),
        ({"sde_window_range": [2, 4]}, "must lie in"),
        ({"reward_weights": [1.0, 2.0]}, "2 reward_weights"),
        ({"scale_rewards": "yes"}, "scale_rewards must be one of"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": math.nan}, "epsilon must be a number, got nan"),
        ({"beta": math.nan}, "beta must be a number, got nan"),
        ({"beta": "2"}, "beta must be a number, got '2'"),
        ({"beta": math.inf}, "beta must be finite and at least 0.0, got inf"),
        ({"advantage_clip": math.nan}, "advantage_clip must be a number, got nan"),
        ({"reward_weights": [math.nan]}, r"reward_weights\[0\] must be a number, got nan"),
        ({"reward_weights": [math.inf]}, r"reward_weights must be finite, got \[inf\]"),
        ({"reward_weights": "1"}, "reward_weights must be a list of numbers, got '1'"),
        ({"num_generations": "2"}, "num_generations must be a whole number, got '2'"),
        ({"num_inference_steps": 3.5}, "num_inference_steps must be a whole number, got 3.5"),
        ({"sde_window_size": 1.5}, "sde_window_size must be a whole number, got 1.5"),
        ({"sde_window_range": [0, 1.5]}, r"sde_window_range\[1\] must be a whole number, got 1.5"),
        ({"decode_batch_size": 2.5}, "decode_batch_size must be a whole number, got 2.5"),
        ({"share_initial_noise": "no"}, "share_initial_noise must be True or False, got 'no'"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1, got 0"),
        ({"timestep_fraction": 0.0}, "timestep_fraction must lie"),
        ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model needs beta > 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_door(tiny_pipeline, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_pipeline, tmp_path, **options)


def test_unknown_labels_and_missing_conditions_are_refused_at_the_door(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="ancient"):
        make_trainer(tiny_pipeline, tmp_path, conditions=datasets.Dataset.from_dict({"class_label": ["ancient"]}))
    misspelt = datasets.Dataset.from_dict({"class_lable": [0]})
    with pytest.raises(ValueError, match=r"no column 'class_label', only \['class_lable'\], and this generator has"):
        make_trainer(tiny_pipeline, tmp_path, conditions=misspelt)
    with pytest.raises(ValueError, match="at least one condition"):
        make_trainer(tiny_pipeline, tmp_path, conditions=None)
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make_trainer(tiny_pipeline, tmp_path, rewards=())
    with pytest.raises(ValueError, match=r"Nothing to sample: 3 condition\(s\), 0 sample\(s\) of each"):
        make_trainer(tiny_pipeline, tmp_path).sample_and_score(CONDITIONS, 0)


# Evaluation, saving, resuming


@pytest.mark.slow
def test_the_saved_pipeline_is_the_averaged_one_and_loads(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", max_steps=4)
    trainer.train()
    raw = weights(trainer)
    trainer.save_pretrained(tmp_path / "saved")
    trainer.save_model()
    assert not raised(raw, weights(trainer))
    for folder in (tmp_path / "saved", tmp_path / "run"):
        loaded = MedDiffusion3DPipeline.from_pretrained(folder)
        with trainer.ema_weights():
            averaged = weights(trainer)
        assert not raised(dict(loaded.unet.named_parameters()), averaged)
        assert len(raised(raw, averaged)) == len(raw)
        assert loaded.config.class_names == tiny_pipeline.config.class_names
        assert loaded(num_samples=1, num_inference_steps=2).volumes.shape == (1, 1, 16, 16, 16)
    assert not list((tmp_path / "run").glob("*.bin"))


@pytest.mark.slow
def test_evaluation_repeats_itself_and_uses_the_averaged_weights(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    first = trainer.evaluate()
    assert trainer.evaluate()["eval_rewards/brightness"] == first["eval_rewards/brightness"]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_rewards/brightness" in entry][-1]
    scored = trainer.sample_and_score(CONDITIONS)
    assert logged["eval_rewards/brightness"] == pytest.approx(scored.rewards.mean().item(), abs=1e-6)
    with trainer.ema_weights():
        trainer.ema, ema = None, trainer.ema
        assert torch.equal(trainer.sample_and_score(CONDITIONS).rewards, scored.rewards)
        trainer.ema = ema
    assert (tmp_path / "figures" / "eval_samples.png").is_file()


def test_evaluation_of_a_sample_does_not_depend_on_how_many_are_made(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path)
    many = trainer.sample_and_score(CONDITIONS.select([0]), 5)
    few = trainer.sample_and_score(CONDITIONS.select([0]), 2)
    torch.testing.assert_close(many.volumes[:2], few.volumes, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_out_of_time_ends_with_its_rollout_and_leaves_a_checkpoint(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=8, max_minutes=1e-6)
    trainer.train()
    assert trainer.state.global_step == 2  # the updates of one rollout
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class Novelty:
    """A stateful reward as a user writes it: the distance to a running mean of all samples."""

    def __init__(self) -> None:
        self.mean, self.rollouts = torch.zeros(1, 16, 16, 16), []

    def __call__(self, volumes, **conditions):
        return (volumes - self.mean).square().flatten(1).mean(1)

    def update(self, volumes, class_label):
        self.rollouts.append((volumes, class_label))
        self.mean = 0.5 * self.mean + 0.5 * volumes.mean(0)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def small_witness():
    torch.manual_seed(2)
    network = VolumeRewardModel(channels=(8, 8), norm_num_groups=4)
    return WitnessReward(WitnessRewardModel.of_scans(network, torch.rand(4, 1, 16, 16, 16), buffer_size=20))


@pytest.mark.slow
def test_a_stateful_reward_sees_every_rollout_before_it_scores_it(tiny_pipeline, tmp_path):
    reward = Novelty()
    trainer = make_trainer(tiny_pipeline, tmp_path, [reward], max_steps=4)
    before = trainer.sample_and_score(CONDITIONS)
    assert not trainer.args.share_initial_noise and reward.mean.abs().max() == 0  # an evaluation leaves it as it is
    trainer.train()
    assert [tuple(seen.shape) for seen, _ in reward.rollouts] == [(12, 1, 16, 16, 16)] * 2
    for index, (_, labels) in enumerate(reward.rollouts):
        assert labels == trainer._condition_rows(index) * 4  # conditions are their own rows here
    assert trainer.sample_and_score(CONDITIONS).rewards.mean() < before.rewards.mean()  # nothing is new any more
    with pytest.raises(ValueError, match="share_initial_noise must be False with Novelty"):
        make_trainer(tiny_pipeline, tmp_path, [Novelty()], share_initial_noise=True)


SLOW_VARIANTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "synced reference", "awm", "stateful")]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["full", *SLOW_VARIANTS])
def test_resuming_repeats_the_run_exactly(tiny_pipeline_folder, tmp_path, variant):
    """Pitfall 21: 2 + 2 rollouts are 4 rollouts: weights, average, rewards, logs."""
    options = dict(max_steps=8, save_strategy="steps", save_steps=1, lr_scheduler_type="linear", save_total_limit=10)
    options |= {"synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 3}}.get(variant, {})
    options |= AWM if variant == "awm" else {}

    def make(folder):
        lora = LoraConfig(r=2, lora_alpha=4) if variant == "lora" else None
        pipeline = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
        rewards = [brightness, contrast] if variant != "stateful" else [Novelty(), small_witness()]
        return make_trainer(pipeline, folder, rewards, lora, **options)

    whole = make(tmp_path / "whole")
    whole.train()
    saved = sorted(p.name for p in (tmp_path / "whole").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{i}" for i in (2, 4, 6, 8)]  # between rollouts only

    torch.manual_seed(12345)
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert not raised(weights(whole), weights(resumed))
    for ours, theirs in zip(whole.ema.shadow_params, resumed.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    exact = [k for k in training_logs(whole)[-1] if not k.startswith("seconds")]
    assert len(training_logs(resumed)) == len(training_logs(whole)) == 8
    for ours, theirs in zip(training_logs(whole), training_logs(resumed), strict=True):
        assert {k: ours.get(k) for k in exact} == {k: theirs.get(k) for k in exact}
    assert resumed.state.global_step == 8
    for ours, theirs in zip(whole.stateful.values(), resumed.stateful.values(), strict=True):
        theirs = theirs.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_skipped_steps=0)
    torch.nn.init.constant_(next(tiny_pipeline.unet.parameters()), torch.nan)
    with pytest.raises(
        TrainingStopped, match="'brightness' has not scored any sample yet; 12 of 12 samples are not finite"
    ):
        trainer.train()


def test_a_sample_of_nan_in_an_evaluation_is_counted_and_the_others_are_judged(tiny_pipeline, tmp_path):
    def blind(volumes, **conditions):
        return [0.5] * (len(volumes) - 1) + [None]

    trainer = make_trainer(tiny_pipeline, tmp_path, rewards=[brightness, blind], num_generations_eval=2)
    decode, calls = trainer.decode, []

    def broken(latents):
        volumes = decode(latents)
        if not calls:
            volumes[1] = torch.nan
        calls.append(len(volumes))
        return volumes

    trainer.decode = broken
    with pytest.warns(UserWarning, match="1 of 6 samples of an evaluation are NaN or infinite"):
        results = trainer.evaluate()
    assert results["eval_unjudged"] == 1 and "nan" not in str(results.values())
    assert results["eval_rewards/brightness/unscored"] == pytest.approx(1 / 6)
    assert results["eval_rewards/blind/unscored"] == pytest.approx(2 / 6) and results["eval_rewards/blind"] == 0.5
    calls.clear()
    scored = trainer.sample_and_score(trainer.eval_dataset, 2)
    text = table(compare(trainer, scored, trainer.sample_and_score(trainer.eval_dataset, 2), {}))
    assert "| samples with NaN, left out | 1 | 0 | -1 |" in " ".join(text.split()) and "nan" not in text


@pytest.mark.slow
def test_the_reference_follows_when_asked(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=4, sync_ref_model=True, ref_model_sync_steps=2)
    trainer.train()
    assert not raised(weights(trainer), dict(trainer.reference.named_parameters()))


# LoRA


@pytest.mark.slow
def test_lora_trains_adapters_only_and_saves_what_loads(tiny_pipeline, tmp_path):
    """Pitfall 22: save -> fresh load gives the same output, and not that of the base."""
    base = unet_copy(tiny_pipeline)
    base_pipeline_folder = tmp_path / "base"
    tiny_pipeline.save_pretrained(base_pipeline_folder)
    trainer = make_trainer(tiny_pipeline, tmp_path / "run", peft_config=LoraConfig(r=4, lora_alpha=8), max_steps=4)
    before = weights(trainer)
    trainer.train()
    moved = raised(before, weights(trainer))
    assert moved == [name for name in before if ".lora_" in name]
    log = training_logs(trainer)
    assert log[0]["kl"] == 0.0 < log[-1]["kl"] and log[0]["ratio/first_step"] < 1e-6

    trainer.save_pretrained(tmp_path / "saved")
    sample, labels = torch.randn(2, 4, 4, 4, 4), torch.tensor([0, 2])
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path / "saved")
    fresh = MedDiffusion3DPipeline.from_pretrained(base_pipeline_folder)
    fresh.load_lora_weights(tmp_path / "saved")
    with torch.no_grad(), trainer.ema_weights():
        expected = trainer.model(sample, 500, labels).sample
        torch.testing.assert_close(loaded.unet(sample, 500, labels).sample, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fresh.unet(sample, 500, labels).sample, expected, rtol=1e-5, atol=1e-6)
        assert (base(sample, 500, labels).sample - expected).abs().max() > 1e-3
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "saved" / LORA_FILE))
    assert not any("lora" in name for name, _ in loaded.unet.named_parameters())


def test_default_lora_targets_leave_out_what_cannot_be_merged(tiny_unet):
    """Pitfall 17."""
    targets = default_targets(tiny_unet)
    kernels = {m.kernel_size for n, m in tiny_unet.named_modules() if n in targets and isinstance(m, torch.nn.Conv3d)}
    assert targets and (1, 1, 1) not in kernels and (3, 3, 3) in kernels
    pointwise = [
        n for n, m in tiny_unet.named_modules() if isinstance(m, torch.nn.Conv3d) and m.kernel_size == (1, 1, 1)
    ]
    assert pointwise
    with pytest.raises(ValueError, match="1x1x1"):
        add_lora(tiny_unet, LoraConfig(r=2, target_modules=pointwise))


def test_adapters_are_not_put_on_adapters(tiny_pipeline, tmp_path):
    """Pitfall 22."""
    add_lora(tiny_pipeline.unet, LoraConfig(r=2))
    with pytest.raises(ValueError, match="carries LoRA layers already"):
        make_trainer(tiny_pipeline, tmp_path, peft_config=LoraConfig(r=2))


def test_a_lora_file_that_does_not_fit_is_refused(tiny_pipeline, tiny_unet, tmp_path):
    """Pitfall 22: loading silently nothing."""
    trainer = make_trainer(
        tiny_pipeline, tmp_path / "run", peft_config=LoraConfig(r=4, target_modules=["to_q", "to_v"])
    )
    trainer.save_pretrained(tmp_path / "saved")
    other = DiffusionUNet3D(4, 4, (8, 32), 1, (False, True), 8, 8, num_class_embeds=4)
    tiny_pipeline.unet = other
    with pytest.raises(ValueError, match="does not fit this UNet: .* layers, such as: .*to_q has factors"):
        tiny_pipeline.load_lora_weights(tmp_path / "saved")


# What is written for others


@pytest.mark.slow
def test_the_card_tells_how_it_was_made(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, [brightness, contrast], max_steps=2)
    trainer.train()
    trainer.card_notes += "\n\n## Results\n\nIt moved."
    trainer.create_model_card(model_name="brain-ppo")
    card = (tmp_path / "README.md").read_text()
    assert "It moved." in card and "brightness, contrast" in card and "Never for clinical use" in card
    assert str(Path(tmp_path)) not in card


@pytest.mark.slow
def test_tensorboard_gets_the_rewards(tiny_pipeline, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert any(tag.endswith("rewards/brightness/mean") for tag in tags) and any(tag.endswith("kl") for tag in tags)


@pytest.mark.slow
def test_trajectories_are_offloaded_and_only_one_rollout_is_kept(tiny_pipeline, tmp_path, monkeypatch):
    """Pitfall 24; where the device is a CPU, only what `rollout` is told shows that they are offloaded."""
    told = []

    def record(*args, **kwargs):
        told.append(inspect.signature(rollout).bind(*args, **kwargs).arguments.get("storage_device"))
        return rollout(*args, **kwargs)

    monkeypatch.setattr(ddpo_rollout, "rollout", record)
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=4, offload_trajectories=True, sde_window_size=1)
    trainer.train()
    assert len(trainer._chunks) == 2 and set(told) == {"cpu"}
    for chunk in trainer._chunks:
        assert chunk.trajectory.states.shape == (1, 6, 4, 4, 4, 4) and chunk.trajectory.states.device.type == "cpu"


def test_volumes_are_decoded_in_chunks_with_the_statistics_applied_once(tiny_pipeline, tmp_path):
    """Pitfalls 24 and 25."""
    trainer = make_trainer(tiny_pipeline, tmp_path, decode_batch_size=2)
    sizes, honest = [], tiny_pipeline.vae.decode_latents
    tiny_pipeline.vae.decode_latents = lambda latents: sizes.append(len(latents)) or honest(latents)
    latents = torch.randn(5, 4, 4, 4, 4)
    torch.testing.assert_close(trainer.decode(latents), honest(latents), rtol=1e-4, atol=1e-4)
    assert sizes == [2, 2, 1]


def test_decoding_in_slabs_gives_the_volumes_of_the_whole_decode(tiny_pipeline, tiny_vq, tmp_path):
    latents = torch.randn(2, 4, 4, 4, 4)
    whole = make_trainer(tiny_pipeline, tmp_path).decode(latents)
    trainer = make_trainer(tiny_pipeline, tmp_path, decode_num_splits=2)
    assert trainer.pipeline.vae.num_splits == 2
    torch.testing.assert_close(trainer.decode(latents), whole, atol=1e-5, rtol=1e-5)
    tiny_pipeline.register_modules(vae=tiny_vq)
    with pytest.raises(ValueError, match="decode_num_splits must be 1 for a VQModel3D, got 2"):
        make_trainer(tiny_pipeline, tmp_path, decode_num_splits=2)


def test_by_default_a_rollout_makes_three_optimizer_steps_so_that_the_clip_range_acts(tmp_path):
    for accumulation in (1, 2):
        args = DDPOConfig(output_dir=str(tmp_path), gradient_accumulation_steps=accumulation)
        assert args.steps_per_generation == 3 * accumulation
        assert args.per_device_train_batch_size * args.steps_per_generation % args.num_generations == 0
        assert args.max_steps % 3 == 0 and args.save_steps % 3 == 0  # checkpoints lie between two rollouts


def test_every_field_is_a_flag_with_an_explanation(capsys):
    from dataclasses import fields

    from transformers import HfArgumentParser

    parser = HfArgumentParser(DDPOConfig)
    explained = {field.name: field.metadata.get("help") for field in fields(DDPOConfig) if field.init}
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert len(explained) > 100
    assert [name for name, said in explained.items() if f"--{name} " not in text or not said] == []
    (args,) = parser.parse_args_into_dataclasses(
        ["--num_generations", "4", "--reward_weights", "1", "0.5", "--sde_window_range", "1", "5", "--beta", "0"]
    )
    assert (args.num_generations, args.reward_weights, args.sde_window_range, args.beta) == (4, [1.0, 0.5], [1, 5], 0.0)
    json.dumps(args.to_dict())


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_only_where_evaluations_meet_checkpoints(tiny_pipeline, tmp_path):
    options = {
        "steps_per_generation": 2,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/brightness",
        "max_steps": 4,
    }
    with pytest.raises(
        ValueError, match="eval_steps must be a whole multiple of 2 to keep the best checkpoint.* got 1"
    ):
        make_trainer(tiny_pipeline, tmp_path, eval_steps=1, save_steps=1, **options)
    trainer = make_trainer(tiny_pipeline, tmp_path, eval_steps=2, save_steps=2, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.rpartition("-")[2] in ("2", "4")


@pytest.mark.slow
def test_a_run_is_watched_by_samples_of_the_same_noise(tiny_pipeline, tmp_path):
    trainer = make_trainer(tiny_pipeline, tmp_path, max_steps=2, picture_steps=2)
    state = torch.get_rng_state()
    first, again = (viz.png_bytes(trainer.film_figures()["samples"]) for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), state)
    trainer.train()
    frames = sorted((tmp_path / "film").iterdir())
    assert [path.name for path in frames] == ["samples-000000.png", "samples-000002.png"]
    assert frames[0].read_bytes() != frames[1].read_bytes()


def test_a_run_is_resumed_with_its_generator_and_its_rewards_only(tiny_pipeline_folder, tmp_path):
    def make(rewards=(brightness,), shift=0.0, **options):
        pipeline = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
        pipeline.unet.conv_in.conv.bias.data += shift
        return make_trainer(pipeline, tmp_path / "run", rewards, save_strategy="steps", save_steps=1, **options)

    make(max_steps=1).train()
    with pytest.raises(ValueError, match=r"other rewards: \['brightness'\] there, \['contrast'\] here"):
        make(rewards=(contrast,), max_steps=2).train(resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="other weights at the start"):
        make(shift=0.1, max_steps=2).train(resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match=r"other arguments: learning_rate \(.* before, now 0.5\)"):
        make(learning_rate=0.5, max_steps=2).train(resume_from_checkpoint="latest")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(learning_rate=0.5, max_steps=2).train(resume_from_checkpoint="latest")  # a finished run
