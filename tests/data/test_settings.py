"""Settings of a data set: said once, read by every stage, and refused where two sources contradict each other."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
from datasets import Dataset

import trees
from conftest import run_example
from diffusers_med3d import (
    AutoencoderConfig,
    AutoencoderKL3D,
    AutoencoderTrainer,
    DDPOConfig,
    DDPOTrainer,
    DiffusionUNet3D,
    LatentDiffusionConfig,
    LatentDiffusionTrainer,
    MedDiffusion3DPipeline,
    SliceRewardModel,
    VolumeReward,
    VolumeRewardModel,
    VQModel3D,
    WitnessReward,
    WitnessRewardModel,
)
from diffusers_med3d.data import (
    DataArguments,
    DataSettings,
    VolumeDataset,
    check_same_settings,
    make_split,
    read_settings,
    save_split,
    settings_of,
    write_settings,
)
from diffusers_med3d.evaluation.sampling import matched_labels, sample_volumes, volume_set
from diffusers_med3d.trainers.autoencoder import AutoencoderLosses
from diffusers_med3d.trainers.diffusion import default_scheduler

SAID = DataSettings(volume_shape=[40, 56, 40], spacing=[1.0] * 3, label_column="grade", class_names=["LGG", "HGG"])


def arguments(folder, split="", **flags) -> DataArguments:
    return DataArguments(str(folder), str(split), **flags)


def folder_of_people(folder, scans: list[tuple[str, str]], column: str = "group"):
    """A niftifolder of one scan per (person, value of the column); all scans differ."""
    rows = [["file_name", "participant_id", column]]
    for i, (person, value) in enumerate(scans):
        trees.save(folder / "images" / f"scan{i}.nii.gz", trees.anatomy(i), step=6.0)
        rows.append([f"images/scan{i}.nii.gz", person, value])
    trees.write_csv(folder / "metadata.csv", rows)
    return folder


def test_settings_come_back_from_their_file(tmp_path):
    write_settings(SAID, tmp_path)
    assert read_settings(tmp_path) == SAID
    assert read_settings(tmp_path / "elsewhere") == DataSettings()


def test_what_no_flag_says_comes_from_the_data_set(tmp_path):
    write_settings(SAID, tmp_path)
    args = arguments(tmp_path)
    assert (args.volume_shape, args.spacing) == ([40, 56, 40], [1.0] * 3)
    assert (args.label_column, args.class_names, args.class_edges) == ("grade", ["LGG", "HGG"], [])
    assert args.notes == []


def test_a_flag_that_contradicts_the_data_set_is_refused_with_both_values(tmp_path):
    write_settings(SAID, tmp_path)
    assert arguments(tmp_path, spacing=[1, 1, 1]).spacing == [1.0] * 3
    with pytest.raises(ValueError, match=r"spacing is \[1.0, 1.0, 1.0\] by .*dataset.json, but \[2.0, .* by the flags"):
        arguments(tmp_path, spacing=[2.0] * 3)


def test_the_split_keeps_what_it_was_made_with(tmp_path):
    made = arguments(tmp_path, label_column="grade", class_names=["LGG", "HGG"], spacing=[2.0] * 3)
    save_split(
        make_split({str(i): i % 2 for i in range(8)}, [1, 1], [1, 1]), tmp_path / "s.json", made.settings_for_split()
    )
    args = arguments(tmp_path, tmp_path / "s.json")
    assert (args.label_column, args.class_names, args.spacing) == ("grade", ["LGG", "HGG"], [2.0] * 3)
    assert args.volume_shape == [64] * 3 and "volume_shape [64, 64, 64]" in args.notes[0]
    write_settings(SAID, tmp_path)
    with pytest.raises(ValueError, match=r"spacing is .* by .*s.json, but \[1.0, 1.0, 1.0\] by .*dataset.json"):
        arguments(tmp_path, tmp_path / "s.json")


def test_defaults_are_taken_last_and_printed_once(tmp_path, capsys):
    args = arguments(tmp_path / "nothing here")
    assert (args.volume_shape, args.spacing, args.class_edges) == ([64] * 3, [3.0] * 3, [35.0, 60.0])
    args.say_defaults()
    args.say_defaults()
    assert capsys.readouterr().out.count("volume_shape [64, 64, 64] and spacing [3.0, 3.0, 3.0]") == 1


def test_a_model_fills_what_nothing_else_says_and_is_refused_where_it_says_another(tmp_path, tiny_pipeline):
    args = arguments(tmp_path)
    args.adopt(settings_of(tiny_pipeline), "the pipeline")
    assert (args.volume_shape, args.spacing) == ([16] * 3, [12.0] * 3)
    with pytest.raises(ValueError, match=r"volume_shape is \[16, 16, 16\] by the pipeline, but \[24, .* by the flags"):
        arguments(tmp_path, volume_shape=[24] * 3).adopt(settings_of(tiny_pipeline), "the pipeline")


def test_settings_that_contradict_each_other_are_named():
    with pytest.raises(
        ValueError, match=r"spacing is \[2.0, 2.0, 2.0\] by the reward, but \[1.0, 1.0, 1.0\] by the gen"
    ):
        check_same_settings(SAID, DataSettings(spacing=[2, 2, 2]), ("the generator", "the reward"))
    check_same_settings(SAID, DataSettings(), ("the generator", "an old reward"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"voxel_size": [1, 1, 1]}', r"dataset.json holds \['voxel_size'\], which are no settings; known are"),
        ('{"spacing": [1, 1]}', "dataset.json: spacing must be three positive numbers"),
        ('{"spacing": [1, 1, ', "dataset.json is no JSON"),
        ('{"class_names": ["a", "b"], "class_edges": [1, 2]}', "2 classes need 1 class_edges"),
        ('{"orientation": "LPS"}', "orientation must be 'RAS'"),
    ],
)
def test_a_settings_file_with_a_mistake_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path)


def test_the_volumes_know_what_they_were_read_with(brains_folder, tmp_path):
    (tmp_path / "images").symlink_to(f"{brains_folder}/images")
    (tmp_path / "metadata.csv").write_text(open(f"{brains_folder}/metadata.csv").read())
    write_settings(
        DataSettings(volume_shape=[16] * 3, spacing=[12.0] * 3, class_names=["low", "high"], class_edges=[50]), tmp_path
    )
    dataset = VolumeDataset(tmp_path, ["sub-01", "sub-06"])
    assert dataset[0]["volume"].shape == (1, 16, 16, 16)
    assert {item["subject"]: item["class_label"] for item in dataset} == {"sub-01": 0, "sub-06": 1}
    assert json.loads(json.dumps(dataset.settings.to_dict()))["spacing"] == [12.0] * 3
    with pytest.raises(ValueError, match="spacing is .* by dataset.json, but .* by the arguments"):
        VolumeDataset(tmp_path, ["sub-01"], spacing=[6.0] * 3)


# --- the split ---


def test_a_split_that_leaves_validation_or_a_fold_empty_is_refused():
    people = {str(i): i % 2 for i in range(6)}
    with pytest.raises(ValueError, match="no subject is left for validation"):
        make_split(people, [1, 1], [0, 0])
    with pytest.raises(ValueError, match="no subject is left for fold a and fold b"):
        make_split(people, [2, 2], [1, 1])
    split = make_split({str(i): i % 3 for i in range(9)}, [1, 1, 1], [1, 1, 1])  # one of each class is left
    assert (len(split["folds"]["a"]), len(split["folds"]["b"])) == (2, 1)


def split_of(monkeypatch, folder, *flags) -> dict:
    """What make_split.py writes for the classes a and b of the column group."""
    options = ["--data_dir", folder, "--split_file", folder / "split.json", "--label_column", "group"]
    options += ["--class_names", "a", "b", "--test", 1, 1, "--validation", 1, 1]
    run_example(monkeypatch, "make_split.py", *options, *flags)
    return json.loads((folder / "split.json").read_text())


@pytest.mark.slow
def test_a_split_across_two_names_of_one_scan_is_refused_or_counts_them_as_one_person(tmp_path, monkeypatch):
    folder = folder_of_people(tmp_path, [(f"p{i}", "ab"[i % 2]) for i in range(10)])
    trees.save(folder / "images" / "scan7.nii.gz", (2 * trees.anatomy(2))[::-1], axes="LPS", step=5.0)
    with pytest.raises(SystemExit, match=r"p2 \(.*scan2.nii.gz.*\) and p7 \(.*scan7.nii.gz.*--allow_duplicates"):
        split_of(monkeypatch, folder)
    assert not (folder / "split.json").exists()
    split = split_of(monkeypatch, folder, "--allow_duplicates")
    groups = [split["test"], split["validation"], split["folds"]["a"], split["folds"]["b"]]
    assert [("p2" in group, "p7" in group) for group in groups].count((True, True)) == 1
    assert sum(len(split[part]) for part in ("train", "validation", "test")) == 10


@pytest.mark.slow
def test_a_subject_whose_scans_have_several_classes_is_named_and_has_the_commonest(tmp_path, monkeypatch, capsys):
    people = [(f"p{i}", "ab"[i % 2]) for i in range(8)]
    folder = folder_of_people(tmp_path, [*people, ("p1", "a"), ("p1", "a"), ("p0", ""), ("p0", ""), ("p9", "")])
    split_of(monkeypatch, folder)
    said = capsys.readouterr().out
    assert "1 subject(s) have scans of several classes, of which the commonest counts in the split: p1 (a, b)." in said
    # p1 is a; a scan without a label changes nothing about p0; p9 has no class and trains
    assert "train {'a': 3, 'b': 1, 'unlabelled': 1}" in said


def test_people_who_are_in_no_part_of_the_split_are_said_once(brains_folder, tmp_path, capsys):
    split = {"train": ["sub-01", "sub-04"], "validation": ["sub-02"], "test": ["sub-03"]}
    (tmp_path / "split.json").write_text(json.dumps(split | {"folds": {"a": ["sub-01"], "b": ["sub-04"]}}))
    data = arguments(brains_folder, tmp_path / "split.json", volume_shape=[16] * 3, spacing=[12.0] * 3)
    for part in ("train", "validation"):
        VolumeDataset.from_arguments(data, part)
    said = (
        f"4 subject(s) of {brains_folder} are in no part of {tmp_path / 'split.json'} and are not used: sub-05, sub-06,"
    )
    assert capsys.readouterr().out.count(said) == 1


# --- models ---


def test_models_keep_the_settings_and_old_ones_say_nothing(tmp_path):
    settings = {"volume_shape": [16] * 3, "spacing": [2.0] * 3, "class_names": ["a", "b"]}
    for model in (
        AutoencoderKL3D(channels=(8, 8), latent_channels=2, attention_levels=(False, False), data_settings=settings),
        VQModel3D(channels=(8,), num_res_channels=(8,), data_settings=settings),
        VolumeRewardModel(channels=(8, 8), num_members=1, data_settings=settings),
        SliceRewardModel(channels=(8, 8), num_members=1, data_settings=settings),
    ):
        model.save_pretrained(tmp_path / type(model).__name__)
        again = type(model).from_pretrained(tmp_path / type(model).__name__)
        assert settings_of(again) == DataSettings(**settings)
        config = tmp_path / type(model).__name__ / "config.json"
        values = json.loads(config.read_text())
        del values["data_settings"]  # as an older version wrote it
        config.write_text(json.dumps(values))
        assert settings_of(type(model).from_pretrained(config.parent)) == DataSettings()


def test_a_pipeline_says_its_own_grid_and_what_its_autoencoder_knows_of_it(tiny_pipeline):
    tiny_pipeline.vae.register_to_config(data_settings={"antialias": True, "label_column": "age"})
    found = settings_of(tiny_pipeline)
    assert (found.volume_shape, found.spacing, found.antialias) == ([16] * 3, [12.0] * 3, True)
    assert (found.class_names, found.channel_names) == (["young", "middle", "old"], ["t1"])
    assert found.label_column is None  # the classes of stage 1 need not be those of the generator


def test_a_generator_keeps_how_its_classes_are_made_and_a_later_stage_takes_it(tmp_path, tiny_pipeline):
    people = [(f"p{i}", ("young", "middle", "old")[i % 3]) for i in range(6)]
    folder = folder_of_people(tmp_path / "data", people, column="stage")
    scans = VolumeDataset(
        folder, volume_shape=[16] * 3, spacing=[12.0] * 3, label_column="stage", class_names=["young", "middle", "old"]
    )
    LatentDiffusionTrainer(tiny_pipeline, LatentDiffusionConfig(output_dir=str(tmp_path), report_to="none"), scans)
    tiny_pipeline.save_pretrained(tmp_path / "generator")
    known = settings_of(MedDiffusion3DPipeline.from_pretrained(tmp_path / "generator"))
    assert (known.label_column, known.class_names) == ("stage", ["young", "middle", "old"])
    later = arguments(folder)
    later.adopt(known, "the generator")
    assert (later.label_column, later.class_names, later.volume_shape) == ("stage", known.class_names, [16] * 3)
    said = arguments(folder, label_column="stage", class_names=["old", "young"])  # what is said wins
    said.adopt(known, "the generator")
    assert said.class_names == ["old", "young"]


def test_classes_of_other_data_are_not_those_of_a_generator_that_knows_more(tiny_pipeline):
    tiny_pipeline.register_to_config(
        data_settings={"label_column": "age", "class_names": ["low", "high"], "class_edges": [50]}
    )
    found = settings_of(tiny_pipeline)
    assert (found.class_names, found.label_column) == (["young", "middle", "old"], None)


def test_a_reward_of_another_grid_does_not_fine_tune_a_generator(tiny_pipeline, tmp_path):
    reward = VolumeRewardModel(
        channels=(8, 8),
        norm_num_groups=4,
        num_members=1,
        data_settings={"volume_shape": [16] * 3, "spacing": [3.0] * 3},
    )
    with pytest.raises(
        ValueError,
        match=r"spacing is \[3.0, 3.0, 3.0\] by the reward VolumeReward, but \[12.0, 12.0, 12.0\] by the gen",
    ):
        DDPOTrainer(
            model=tiny_pipeline,
            reward_funcs=[VolumeReward(reward)],
            args=DDPOConfig(output_dir=str(tmp_path), report_to="none", picture_steps=0),
            train_dataset=Dataset.from_dict({"class_label": [0]}),
        )


def test_a_learned_reward_of_another_size_fine_tunes_with_a_warning_and_a_witness_does_not(tiny_pipeline, tmp_path):
    settings = {"volume_shape": [32] * 3, "spacing": [12.0] * 3}
    model = VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1, data_settings=settings)

    def make(reward):
        args = DDPOConfig(output_dir=str(tmp_path), report_to="none", picture_steps=0)
        DDPOTrainer(tiny_pipeline, [reward], args, Dataset.from_dict({"class_label": [0]}))

    with pytest.warns(UserWarning, match=r"VolumeReward was trained on volumes of \[32, 32, 32\] voxels and"):
        make(VolumeReward(model))
    witness = WitnessRewardModel.of_scans(model, torch.rand(3, 1, 32, 32, 32))
    with pytest.raises(ValueError, match=r"volume_shape is \[32, 32, 32\] by the reward WitnessReward, but \[16"):
        make(WitnessReward(witness))


def test_scans_of_another_grid_do_not_train_a_generator(tiny_pipeline, brains_folder, tmp_path):
    scans = VolumeDataset(brains_folder, ["sub-01"], volume_shape=[16] * 3, spacing=[11.0] * 3)
    with pytest.raises(
        ValueError, match=r"spacing is \[11.0, 11.0, 11.0\] by the scans, but \[12.0, .* by the pipeline"
    ):
        LatentDiffusionTrainer(tiny_pipeline, LatentDiffusionConfig(output_dir=str(tmp_path)), scans)


def test_an_autoencoder_remembers_the_scans_it_was_trained_on(brains_folder, tmp_path):
    scans = VolumeDataset(brains_folder, ["sub-01", "sub-06"], volume_shape=[16] * 3, spacing=[12.0] * 3)
    vae = AutoencoderKL3D(channels=(8, 8), latent_channels=2, attention_levels=(False, False))
    args = AutoencoderConfig(output_dir=str(tmp_path), crop_size=16, max_steps=1, report_to="none", picture_steps=0)
    AutoencoderTrainer(vae, args, scans).save_pretrained(tmp_path / "vae")
    known = settings_of(AutoencoderKL3D.from_pretrained(tmp_path / "vae"))
    assert known == scans.settings
    later = arguments(tmp_path / "no flags")
    later.adopt(known, "the autoencoder")
    assert (later.volume_shape, later.spacing) == ([16] * 3, [12.0] * 3)


# --- stacks of few slices ---


@pytest.mark.parametrize("crop_size", [16, 0])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_stack_of_eight_slices_trains_when_the_discriminator_comes_in(tmp_path, crop_size, kind):
    torch.manual_seed(0)
    voxels = np.zeros((32, 32, 8), np.float32)
    voxels[4:28, 4:28, 1:7] = 100 + 50 * np.random.default_rng(0).random((24, 24, 6))
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([4.0, 4.0, 12.0, 1.0])), tmp_path / "a.nii.gz")
    (tmp_path / "metadata.csv").write_text("file_name,participant_id\na.nii.gz,p\n")
    scans = VolumeDataset(tmp_path, volume_shape=[32, 32, 8], spacing=[4.0, 4.0, 12.0])
    if kind == "kl":
        model = AutoencoderKL3D(channels=(8, 8), latent_channels=2, attention_levels=(False, False))
    else:
        model = VQModel3D(channels=(8,), num_res_channels=(8,), num_embeddings=8, embedding_dim=2)
    args = AutoencoderConfig(
        output_dir=str(tmp_path / "out"), crop_size=crop_size, adversarial_start=0, report_to="none", picture_steps=0
    )
    trainer = AutoencoderTrainer(model, args, scans)
    crop = trainer.crops.draw(torch.tensor([0]))
    assert crop.shape == (1, 1, *((16, 16, 8) if crop_size else (32, 32, 8)))
    losses = AutoencoderLosses(model, args)(crop, adversarial=True)
    losses["loss"].backward()
    assert torch.isfinite(losses["discriminator"]) and torch.isfinite(losses["adversarial"])


# --- no classes ---


@pytest.mark.slow
def test_scans_without_classes_train_a_generator_without_classes_and_judge_it(brains_folder, tmp_path, tiny_vae):
    data = arguments(brains_folder, volume_shape=[16] * 3, spacing=[12.0] * 3, class_names=[])
    scans = VolumeDataset(brains_folder, ["sub-01", "sub-06"], **data.reading())
    unet = DiffusionUNet3D(
        in_channels=4, out_channels=4, channels=(8, 16), num_res_blocks=1, attention_levels=(False, True),
        num_head_channels=8, norm_num_groups=8, num_class_embeds=None,
    )  # fmt: skip
    pipeline = MedDiffusion3DPipeline(
        tiny_vae, unet, default_scheduler("v_prediction"), volume_shape=[16] * 3, spacing=[12.0] * 3
    )
    args = LatentDiffusionConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        copies=1,
        per_device_train_batch_size=2,
        report_to="none",
        picture_steps=0,
    )
    LatentDiffusionTrainer(pipeline, args, scans).train()
    reference = volume_set(scans)
    labels = matched_labels(reference.labels, 2)
    samples = sample_volumes(pipeline, labels, tmp_path / "samples", data, num_inference_steps=2)
    assert samples.volumes.shape[1:] == reference.volumes.shape[1:] and labels == [0, 0]


def test_people_without_classes_are_split_as_one_group(brains_folder, tmp_path, monkeypatch):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "images").symlink_to(f"{brains_folder}/images")
    lines = open(f"{brains_folder}/metadata.csv").read().splitlines()
    (tmp_path / "dataset" / "metadata.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    options = ["--data_dir", tmp_path / "dataset", "--split_file", tmp_path / "split.json"]
    run_example(monkeypatch, "make_split.py", *options, "--test", 2, "--validation", 2)
    split = json.loads((tmp_path / "split.json").read_text())
    assert [len(split[part]) for part in ("train", "validation", "test")] == [4, 2, 2]
    assert split["settings"]["class_names"] == []


def test_a_file_that_is_no_volume_is_refused_before_there_is_a_split(brains_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "dataset"
    shutil.copytree(brains_folder, folder)
    path = min((folder / "images").iterdir())
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8), np.float32), np.eye(4)), path)
    options = [
        "--data_dir",
        folder,
        "--split_file",
        tmp_path / "split.json",
        "--test",
        1,
        1,
        1,
        "--validation",
        1,
        0,
        0,
    ]
    with pytest.raises(SystemExit, match=r"must have 3 or 4 axes, got shape \(8, 8\)"):
        run_example(monkeypatch, "make_split.py", *options, "--validation", 1, 0, 0)
    assert not (tmp_path / "split.json").exists()
