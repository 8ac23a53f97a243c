"""Conditions besides the class (spacing, regions, numbers) in the trainers: diffusers_med3d.trainers.conditions."""

import datasets
import pytest
import torch
from peft import LoraConfig

from conftest import SPACING, VOLUME_SHAPE, awaken
from diffusers_med3d import DDPOConfig, DDPOTrainer, DiffusionUNetMaisi3D, MedDiffusion3DPipeline
from diffusers_med3d.trainers.conditions import call_arguments, encode_rows

ROWS = {
    "class_label": ["mri", None, "ct"],
    "top_region": ["head", "chest", "abdomen"],
    "bottom_region": ["chest", "abdomen", "pelvis"],
    "age": [0.2, 0.9, 0.5],
}


def table(**changes) -> datasets.Dataset:
    columns = ROWS | changes
    return datasets.Dataset.from_dict({name: values for name, values in columns.items() if values is not None})


@pytest.fixture
def tiny_maisi(tiny_vae, tiny_scheduler) -> MedDiffusion3DPipeline:
    """Takes spacing, both regions and an age; four classes, of which the first is the null class."""
    torch.manual_seed(5)
    unet = DiffusionUNetMaisi3D(
        channels=(8, 16), num_res_blocks=1, attention_levels=(False, True), num_head_channels=8, norm_num_groups=8,
        num_class_embeds=4, include_region=True, context_names=["age"], concat_context=True,
    )  # fmt: skip
    pipeline = MedDiffusion3DPipeline(
        tiny_vae, awaken(unet), tiny_scheduler, VOLUME_SHAPE, SPACING, class_names={"ct": 1, "mri": 3}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def brightness(volumes, **conditions):
    return volumes.mean(dim=(1, 2, 3, 4))


def ddpo(pipeline, folder, rows, peft_config=None, **options) -> DDPOTrainer:
    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=6, per_device_eval_batch_size=2,
        num_generations=4, steps_per_generation=2, num_iterations=1, gradient_accumulation_steps=2,
        num_inference_steps=4, sde_window_size=2, eval_num_inference_steps=3, learning_rate=1e-3, logging_steps=1,
        report_to="none", disable_tqdm=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    return DDPOTrainer(pipeline, brightness, DDPOConfig(**settings | options), rows, peft_config=peft_config)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- reinforcement learning ---


@pytest.mark.parametrize(("guidance_scale", "lora"), [(1.0, False), (3.0, False), (3.0, True)])
def test_rollout_update_and_reference_agree_on_the_conditions(tiny_maisi, tmp_path, guidance_scale, lora):
    trainer = ddpo(
        tiny_maisi, tmp_path, table(), LoraConfig(r=2) if lora else None, guidance_scale=guidance_scale, beta=0.1
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    logs = training_logs(trainer)
    assert [log["ratio/first_step"] < 1e-6 for log in logs] == [True, True]
    assert logs[0]["kl"] == 0.0 and logs[1]["kl"] > 0.0
    still = [name for name, p in trainer.model.named_parameters() if name in before and torch.equal(p, before[name])]
    # of one token there is nothing to choose: queries and keys of the cross-attention have no gradient
    assert [name for name in still if "attn2.to_q" not in name and "attn2.to_k" not in name] == []


@pytest.mark.parametrize("name", ["spacing", "top_region", "age"])
def test_another_condition_in_the_update_than_in_the_rollout_would_be_seen(tiny_maisi, tmp_path, name):
    trainer = ddpo(tiny_maisi, tmp_path, table(), max_steps=1)
    honest = trainer.compute_loss

    def another(model, inputs):
        asked = inputs["conditions"]
        others = asked.others | {name: asked.others[name].flip(0) if name != "spacing" else 2 * asked.others[name]}
        return honest(model, inputs | {"conditions": asked._replace(others=others)})

    trainer.compute_loss = another
    with pytest.warns(UserWarning, match="rollout and update disagree"):
        trainer.train()
    assert training_logs(trainer)[0]["ratio/first_step"] > 1e-4


@pytest.mark.parametrize("share_initial_noise", [True, False])
def test_a_rollout_changes_with_its_conditions_and_with_nothing_else_of_the_table(
    tiny_maisi, tmp_path, share_initial_noise
):
    def final(rows):
        trainer = ddpo(tiny_maisi, tmp_path, rows, share_initial_noise=share_initial_noise, beta=0.0)
        return torch.cat([chunk.trajectory.final for chunk in trainer._generate(trainer.model, 0)])

    first = final(table())
    assert torch.equal(final(table(note=["a", "b", "c"])), first)
    for change in ({"age": [0.2, 0.9, 0.6]}, {"bottom_region": ["chest", "abdomen", "head"]}):
        moved = (final(table(**change)) - first).abs().amax(dim=(1, 2, 3, 4)) > 1e-4
        assert moved.sum() == 4  # the four samples of the row that changed


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@torch.no_grad()
def test_the_policy_predicts_what_the_pipeline_predicts_for_the_same_row(tiny_maisi, tmp_path, guidance_scale):
    rows = table(age=[1, 0, 2])  # whole numbers will do
    trainer = ddpo(tiny_maisi, tmp_path, rows, guidance_scale=guidance_scale)
    latents = torch.randn(3, 4, 4, 4, 4)
    regions = {name: ROWS[name] for name in ("top_region", "bottom_region")}
    conditions = tiny_maisi.encode_conditions({**regions, "age": [1.0, 0.0, 2.0]}, SPACING, 3)
    expected = tiny_maisi.predict(latents, 500, torch.tensor([3, 0, 1]), guidance_scale, conditions)
    predicted = trainer._predict(trainer.model, latents, 500, encode_rows(tiny_maisi, rows))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_evaluation_samples_what_the_pipeline_samples_under_the_same_conditions(tiny_maisi, tmp_path):
    trainer = ddpo(tiny_maisi, tmp_path, table())
    scored = trainer.sample_and_score(table())
    assert scored.labels.tolist() == [3, 0, 1]
    noise = trainer._noise([(trainer.args.seed, 0, 3, i) for i in range(3)])
    conditions = {name: ROWS[name] for name in ("top_region", "bottom_region", "age")}
    volumes = tiny_maisi(
        class_labels=ROWS["class_label"], conditions=conditions, latents=noise, num_inference_steps=3
    ).volumes
    torch.testing.assert_close(scored.volumes, volumes, rtol=0, atol=1e-4)


# --- at the door ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"age": None},
            r"no column 'age', only \['class_label', 'top_region', 'bottom_region'\]; this network takes the "
            r"conditions \['top_region', 'bottom_region', 'age'\]",
        ),
        ({"age": [0.2, float("nan"), 0.5]}, "'age' must be finite numbers"),
        ({"age": [0.2, None, 0.5]}, "'age' must be finite numbers, got .*None"),
        ({"age": ["0.2", "old", "0.5"]}, "'age' must be finite numbers, got .*'old'"),
        ({"top_region": ["head", "toe", "chest"]}, "'top_region' must be one of .*got 'toe'"),
        ({"class_label": ["mri", "pet", "ct"]}, "unknown class 'pet'"),
        ({"spacing": [[1.0, 1.0, 1.0]] * 3}, r"column 'spacing' cannot .* pipeline's, \(12.0, 12.0, 12.0\) mm"),
    ],
)
def test_a_condition_that_is_missing_or_cannot_be_used_is_refused_before_anything_is_sampled(
    tiny_maisi, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        ddpo(tiny_maisi, tmp_path, table(**changes))


def test_a_network_without_conditions_leaves_the_other_columns_to_the_rewards(tiny_pipeline):
    with pytest.raises(ValueError, match="unknown class 'mri'"):
        encode_rows(tiny_pipeline, table())
    rows = table(class_label=["young", "old", None], spacing=[[1.0, 1.0, 1.0]] * 3)
    assert call_arguments(tiny_pipeline, rows) == {"class_labels": ["young", "old", None], "conditions": None}
    assert encode_rows(tiny_pipeline, rows).others is None
