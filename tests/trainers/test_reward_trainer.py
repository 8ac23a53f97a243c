"""Stage 3 as a whole: the spectrum on disk, the trainer, the two scripts."""

import json
import math
import runpy
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CLASS_NAMES, EXAMPLES, SPACING, VOLUME_SHAPE, run_example
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.data.training_subjects import TRAINING_SUBJECTS, read_training_subjects
from diffusers_med3d.metrics import training_above_unseen
from diffusers_med3d.models.reward import SliceRewardModel, VolumeRewardModel
from diffusers_med3d.rewards.damage import DAMAGE_NAMES, damage, gaussian_smooth
from diffusers_med3d.rewards.learned import SliceReward, VolumeReward
from diffusers_med3d.rewards.spectrum import REAL, clean_label
from diffusers_med3d.rewards.spectrum_dataset import (
    SpectrumDataset,
    _warn_of_recall,
    build_fold_spectra,
    build_spectrum,
    recall,
    subject_levels,
)
from diffusers_med3d.rewards.spectrum_scores import level_name, score_spectrum, summarise
from diffusers_med3d.trainers.reward import RewardModelConfig, RewardModelTrainer, draw_versions
from diffusers_med3d.utils.seeding import seeded

LEVELS = [0.0, 0.5, 1.0]
MODELS = pytest.mark.parametrize(
    "model", [{"kind": VolumeRewardModel}, {"kind": SliceRewardModel, "num_slices": 3}], ids=["3d", "2d"]
)
SPLIT = {
    "train": [f"sub-0{i}" for i in range(1, 6)],
    "validation": ["sub-06", "sub-07"],
    "test": ["sub-08"],
    "folds": {"a": ["sub-01", "sub-03", "sub-05"], "b": ["sub-02", "sub-04"]},
}


@pytest.fixture
def data(brains_folder, tmp_path) -> DataArguments:
    split = tmp_path / "split.json"
    split.write_text(json.dumps(SPLIT))
    return DataArguments(
        data_dir=brains_folder,
        split_file=str(split),
        volume_shape=list(VOLUME_SHAPE),
        spacing=list(SPACING),
        class_names=list(CLASS_NAMES),
    )


@pytest.fixture
def scans(data) -> VolumeDataset:
    return VolumeDataset.from_arguments(data, "b")


def build(pipeline, scans, folder, **changes):
    arguments = {"trained_on": SPLIT["folds"]["a"], "strengths": LEVELS, "num_inference_steps": 4, "batch_size": 2}
    return build_spectrum(pipeline, scans, folder=folder, **(arguments | changes))


def toy_spectrum(folder: Path, subjects: int, start: int = 0) -> SpectrumDataset:
    """Spectra whose levels differ plainly: the more noise, the smoother, as with a real generator."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 3, indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.8
    paths = []
    for subject in range(start, start + subjects):
        texture = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(subject))
        versions = [gaussian_smooth(texture, sigma) for sigma in (0.4, 0.5, 0.7, 1.0)]
        real, *versions = [torch.where(inside, (0.5 + 0.15 * v).clamp(0.05, 1), 0.0) for v in [texture, *versions]]
        path = folder / f"{subject}.safetensors"
        strengths = torch.tensor([0.0, 0.3, 0.6, 1.0])
        save_file({"real": real, "versions": torch.stack(versions), "strengths": strengths}, path)
        paths.append(path)
    return SpectrumDataset(paths)


def config(output_dir, **changes) -> RewardModelConfig:
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "picture_steps": 0,
    }
    return RewardModelConfig(**(arguments | changes))


def tiny_model(kind=VolumeRewardModel, **changes):
    torch.manual_seed(7)
    return kind(**({"channels": (8, 16), "norm_num_groups": 4, "num_members": 2} | changes))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------ the spectrum on disk


def test_a_generator_never_makes_the_spectrum_of_a_subject_it_was_trained_on(tiny_pipeline, scans, tmp_path):
    with pytest.raises(ValueError, match="sub-04.*other fold"):
        build(tiny_pipeline, scans, tmp_path / "spectrum", trained_on=["sub-01", "sub-04"])
    assert not (tmp_path / "spectrum").exists()


def test_full_samples_alone_may_be_made_by_a_generator_that_saw_the_subjects(tiny_pipeline, scans, tmp_path):
    paths = build(tiny_pipeline, scans, tmp_path / "spectrum")
    everyone = [item["subject"] for item in scans]
    full = build(tiny_pipeline, scans, tmp_path / "full", trained_on=everyone, strengths=[1.0])
    alone, joined = SpectrumDataset(full)[1], SpectrumDataset(paths, full)[1]
    assert alone["strengths"].tolist() == [1.0] and joined["strengths"].tolist() == [*LEVELS, 1.0]
    assert torch.equal(joined["versions"], torch.cat([SpectrumDataset(paths)[1]["versions"], alone["versions"]]))
    for volume in scans:  # nothing of a scan is in its full sample
        volume["volume"] = volume["volume"] * 0.5
    other = build(tiny_pipeline, scans, tmp_path / "darker", trained_on=everyone, strengths=[1.0])
    assert torch.equal(SpectrumDataset(other)[1]["versions"], alone["versions"])
    with pytest.raises(ValueError, match="1 other scans than the 2"):
        SpectrumDataset(paths, full[:1])


def test_a_generator_that_does_not_say_what_it_was_trained_on_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=TRAINING_SUBJECTS) as refusal:
        read_training_subjects(tmp_path)
    subprocess.run(str(refusal.value).partition("if there are none, ")[2], shell=True, check=True)
    assert read_training_subjects(tmp_path) == set()
    (tmp_path / TRAINING_SUBJECTS).write_text('["sub-01", 7]')
    assert read_training_subjects(tmp_path) == {"sub-01", "7"}


def test_the_spectrum_holds_the_scan_and_its_levels(tiny_pipeline, scans, tmp_path):
    paths = build(tiny_pipeline, scans, tmp_path)
    assert [path.name for path in paths] == ["sub-02-1.safetensors", "sub-04-1.safetensors"]
    item = SpectrumDataset(paths)[0]
    assert item["real"].dtype == torch.float32 and item["versions"].shape == (3, 1, *VOLUME_SHAPE)
    assert item["strengths"].tolist() == LEVELS
    scan = scans[0]["volume"].as_tensor()
    torch.testing.assert_close(item["real"], scan, atol=1e-3, rtol=0)
    vae = tiny_pipeline.vae
    with torch.no_grad():
        round_trip = vae.decode_latents(vae.encode_latents(scan[None]))[0]
    torch.testing.assert_close(item["versions"][0], round_trip, atol=2e-3, rtol=0)
    assert (item["versions"][1] - item["versions"][2]).abs().mean() > 1e-3


def test_a_killed_build_goes_on_where_it_stopped_and_ends_with_the_same_spectrum(tiny_pipeline, scans, tmp_path):
    whole = build(tiny_pipeline, scans, tmp_path / "whole")
    paths = build(tiny_pipeline, scans, tmp_path / "killed", batch_size=1)
    kept = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    (tmp_path / "killed" / "sub-04-1.999.tmp").write_bytes(b"half a file")
    assert build(tiny_pipeline, scans, tmp_path / "killed", batch_size=1) == paths
    assert paths[0].stat().st_mtime_ns == kept
    for one, other in zip(whole, paths, strict=True):
        # another batch size rounds differently
        torch.testing.assert_close(load_file(one)["versions"], load_file(other)["versions"], atol=2e-3, rtol=0)


@pytest.mark.parametrize("change", ["steps", "seed", "levels", "generator", "scan", "class"])
def test_a_spectrum_made_otherwise_is_refused_not_reused(change, tiny_pipeline, scans, tmp_path):
    build(tiny_pipeline, scans, tmp_path)
    changes = {"steps": {"num_inference_steps": 5}, "seed": {"seed": 1}, "levels": {"strengths": [0.0, 1.0]}}
    if change == "generator":
        with torch.no_grad():
            next(tiny_pipeline.unet.parameters()).add_(0.01)
    if change == "scan":
        scans[1]["volume"] = scans[1]["volume"] * 0.9
    if change == "class":
        scans[1]["class_label"] = (scans[1]["class_label"] + 1) % 3
    with pytest.raises(ValueError, match="delete .* or choose another folder"):
        build(tiny_pipeline, scans, tmp_path, **changes.get(change, {}))


def test_processes_share_the_scans_and_make_what_one_would_make(tiny_pipeline, scans, tmp_path):
    whole = build(tiny_pipeline, scans, tmp_path / "whole", batch_size=1)
    for rank, made in ((1, ["sub-04-1"]), (0, ["sub-02-1", "sub-04-1"])):
        paths = build(tiny_pipeline, scans, tmp_path / "shared", share=(rank, 2))
        assert sorted(path.stem for path in (tmp_path / "shared").iterdir()) == made
    for one, other in zip(whole, paths, strict=True):
        torch.testing.assert_close(load_file(one)["versions"], load_file(other)["versions"], atol=2e-3, rtol=0)


def test_a_subset_of_levels_keeps_both_ends_and_differs_between_subjects():
    strengths = [i / 10 for i in range(11)]
    drawn = [subject_levels(f"sub-{i}", strengths, 5, seed=0) for i in range(20)]
    assert all(levels == sorted(levels) and len(set(levels)) == 5 for levels in drawn)
    assert all(levels[0] == 0 and levels[-1] == 1 for levels in drawn)
    assert len({tuple(levels) for levels in drawn}) > 10
    assert drawn == [subject_levels(f"sub-{i}", strengths, 5, seed=0) for i in range(20)]
    assert subject_levels("sub-0", strengths, None, 0) == strengths


@pytest.mark.parametrize(
    "wrong", [{"strengths": [0.5, 1.0]}, {"strengths": [0.0]}, {"strengths": [0.0, 1.1]}, {"levels_per_subject": 1}]
)
def test_impossible_levels_are_refused(wrong, tiny_pipeline, scans, tmp_path):
    with pytest.raises(ValueError, match="got"):
        build(tiny_pipeline, scans, tmp_path, **wrong)


def test_two_scans_of_a_subject_have_a_file_each_and_the_null_class_works(tiny_pipeline, data, tmp_path):
    scans = VolumeDataset(data.data_dir, ["sub-01", "sub-08"], **data.reading())
    paths = build(tiny_pipeline, scans, tmp_path, trained_on=[])
    assert [path.name for path in paths] == [f"sub-0{name}.safetensors" for name in ("1-1", "1-2", "8-1")]
    assert SpectrumDataset(paths).subjects.tolist() == [0, 0, 2]  # which scans are of one subject


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_report_knows_a_perfect_a_constant_and_a_backward_reward(tmp_path):
    dataset = toy_spectrum(tmp_path, 3)

    def sharpness(volumes):  # a toy's realism; noise and sharpening fool it, as they should fool something this simple
        return torch.stack([(v - gaussian_smooth(v, 1.0)).square().mean() for v in volumes])

    perfect = summarise(score_spectrum(sharpness, dataset))
    assert perfect["rank_correlation"] == pytest.approx(1) and perfect["neighbours_in_order"] == 1
    assert perfect["real_above_round_trip"] == 1
    assert perfect["score/real"] > perfect["score/round_trip"] > perfect["score/full_sample"]
    assert 0 < perfect["damage_below_round_trip"] < 1
    constant = summarise(score_spectrum(lambda volumes: torch.ones(len(volumes)), dataset))
    assert constant["rank_correlation"] == 0 and constant["neighbours_in_order"] == 0
    assert constant["damage_below_round_trip"] == 0
    backward = summarise(score_spectrum(lambda volumes: -sharpness(volumes), dataset))
    assert backward["rank_correlation"] == pytest.approx(-1)


def test_a_scan_whose_score_is_nan_is_counted_named_and_left_out(tmp_path):
    args = config(tmp_path / "out", save_strategy="no")
    trainer = RewardModelTrainer(
        tiny_model(), args, toy_spectrum(tmp_path / "train", 2), toy_spectrum(tmp_path / "val", 3, 50)
    )
    whole = trainer.evaluate()
    scan, broken = trainer.eval_dataset[1]["real"], [True]

    def breaks(module, inputs, output):
        its = (inputs[0] == scan).flatten(1).all(1)
        return torch.where(its | (not broken[0]), torch.nan, output)

    trainer.reward_model.register_forward_hook(breaks)
    with pytest.warns(UserWarning, match=r"1 of 3 scans .* scan 1 \(counted from 0\) with real = nan"):
        results = trainer.evaluate()
    assert results.keys() - whole.keys() == {"eval_unjudged"} and results["eval_unjudged"] == 1
    assert all(math.isfinite(value) for value in results.values())
    broken[0] = False
    with pytest.warns(UserWarning, match="3 of 3 scans"):
        assert trainer.evaluate()["eval_rank_correlation"] == -math.inf  # never the best checkpoint


def test_the_report_scores_what_the_names_say(tmp_path):
    dataset = toy_spectrum(tmp_path, 2)
    rows = score_spectrum(lambda volumes: volumes.mean(dim=(1, 2, 3, 4)), dataset, severities=[0.3], batch_size=3)
    item = dataset[1]
    assert rows[1]["real"] == pytest.approx(item["real"].mean().item())
    assert rows[1]["strength_0.6"] == pytest.approx(item["versions"][2].mean().item())
    blurred = damage(item["real"], "blur", 0.3, seeded("any"))
    assert rows[1]["blur_0.3"] == pytest.approx(blurred.mean().item())
    assert {"full_sample", "half_swap", "cut_off_0.3", "noisy_blur_0.3"} <= set(rows[0])


# --------------------------------------------------------------------------------------------------------- the trainer


def test_a_batch_holds_versions_with_their_labels_and_ranks_within_subjects_only(tmp_path):
    dataset = toy_spectrum(tmp_path, 3)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(3)])
    args = config(tmp_path, clean_versions=3, damaged_versions=4, per_device_train_batch_size=3)
    drawn = draw_versions(batch, args, seeded(0))
    assert drawn.volumes.shape == (21, 1, 16, 16, 16) and drawn.labels.shape == (21,)
    subject = torch.arange(21) // 7
    assert not drawn.better[subject[:, None] != subject[None]].any()
    assert (drawn.labels[:, None] > drawn.labels[None])[drawn.better].all()
    clean = {level_name(s): clean_label(s) for s in (REAL, 0.0, 0.3, 0.6, 1.0)}
    for i, name in enumerate(drawn.names):
        if i % 7 < 3:
            assert drawn.labels[i].item() == pytest.approx(clean[name])
            assert (i % 7 == 0) == (name == "real") and (i % 7 == 1) == (name == "round_trip")
        else:
            assert " " in name and drawn.labels[i] < clean[name.split()[0]]
    again = draw_versions(batch, args, seeded(0))
    assert torch.equal(again.volumes, drawn.volumes) and again.names == drawn.names
    assert not torch.equal(draw_versions(batch, args, seeded(1)).volumes, drawn.volumes)


def test_every_step_ranks_the_round_trip_above_every_kind_of_damage(tmp_path):
    dataset = toy_spectrum(tmp_path, 4)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    args = RewardModelConfig(output_dir=str(tmp_path), report_to="none")  # the defaults
    damaged = {"real": 0, "round_trip": 0, "others": 0}
    for step in range(12):
        drawn = draw_versions(batch, args, seeded(step))
        beaten = set()
        for i, name in enumerate(drawn.names):
            if name == "round_trip":
                rows = drawn.better[i].nonzero().flatten().tolist()
                beaten |= {drawn.names[j].split()[1] for j in rows if " " in drawn.names[j]}
                assert all(drawn.labels[i] - drawn.labels[j] > 0.15 for j in rows if " " in drawn.names[j])
                assert drawn.better[i - 1, i] and drawn.labels[i - 1] > drawn.labels[i]  # its scan stands above it
            if " " in name:
                damaged[name.split()[0] if name.split()[0] in damaged else "others"] += 1
                subject = range(i - i % 7, i - i % 7 + 4)
                same_level = [j for j in subject if drawn.names[j] == name.split()[0]]
                assert len(same_level) == 1 and drawn.better[same_level[0], i], "nothing undamaged to compare with"
        assert beaten == set(DAMAGE_NAMES)
    assert sum(damaged.values()) == 12 * 12
    assert abs(damaged["real"] - damaged["round_trip"]) < 30 < min(damaged["real"], damaged["round_trip"])


def test_a_hemisphere_never_comes_from_another_scan_of_the_same_subject(tmp_path):
    dataset = toy_spectrum(tmp_path, 4)
    dataset.subjects = torch.tensor([0, 0, 0, 3])
    batch = torch.utils.data.default_collate([dataset[i] for i in range(4)])
    batch["real"] = torch.stack([real * light for real, light in zip(batch["real"], (1, 0.99, 0.98, 0.5), strict=True)])
    batch["versions"] = batch["real"][:, None].expand_as(batch["versions"]).clone()
    batch["real"][3] = batch["versions"][3] = torch.where(batch["real"][3] > 0, 0.5, 0.0)  # no texture, so easily known
    swapped = 0
    for step in range(6):
        drawn = draw_versions(batch, config(tmp_path, max_shift=0, symmetric_share=0.0), seeded(step))
        for name, volume in list(zip(drawn.names, drawn.volumes, strict=True))[:21]:  # of the first three scans
            if "half_swap" in name:
                swapped += 1
                own, other = sorted(side[side > 0].std().item() for side in (volume[:, :4], volume[:, -4:]))[::-1]
                assert own > 2 * other
    assert swapped
    alone = {name: tensor[:3] for name, tensor in batch.items()}
    for step in range(6):
        assert not [n for n in draw_versions(alone, config(tmp_path), seeded(step)).names if "half_swap" in n]
    dataset.subjects = torch.zeros(4, dtype=torch.long)
    assert "half_swap" not in score_spectrum(lambda volumes: volumes.flatten(1).mean(1), dataset)[0]


def test_scans_that_cannot_fill_a_step_of_all_processes_are_refused(tmp_path, monkeypatch):
    train = toy_spectrum(tmp_path, 3)
    RewardModelTrainer(tiny_model(), config(tmp_path), train)
    monkeypatch.setattr(RewardModelConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"3 scans cannot fill a step of 4 \(2 process"):
        RewardModelTrainer(tiny_model(), config(tmp_path), train)


def test_perfect_symmetry_changes_neither_label_nor_order(tmp_path):
    dataset = toy_spectrum(tmp_path, 2)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(2)])
    for share in (0.0, 1.0):
        drawn = draw_versions(batch, config(tmp_path, symmetric_share=share, max_shift=0), seeded(0))
        for i, name in enumerate(drawn.names):
            if i % 7 < 4:
                symmetric = torch.allclose(drawn.volumes[i], drawn.volumes[i].flip(1), atol=1e-6)
                assert symmetric == (share == 1.0), name
                strength = {level_name(s): s for s in (REAL, 0.0, 0.3, 0.6, 1.0)}[name]
                assert drawn.labels[i].item() == pytest.approx(clean_label(strength))


@pytest.mark.slow
@MODELS
def test_training_teaches_the_order_of_unseen_subjects_and_moves_every_weight(model, tmp_path):
    model = tiny_model(**model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = config(tmp_path / "out", max_steps=40, learning_rate=5e-3, warmup_steps=2, save_strategy="no", ema_decay=0.8)
    args.logging_steps = 10
    trainer = RewardModelTrainer(
        model, args, toy_spectrum(tmp_path / "train", 6), toy_spectrum(tmp_path / "val", 2, 50)
    )
    trainer.train()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    args.per_device_eval_batch_size = 5
    results = trainer.evaluate()
    assert max(sizes) == 5
    assert results["eval_rank_correlation"] > 0.9
    assert results["eval_score/real"] > results["eval_score/full_sample"] + 0.1
    assert results["eval_score/real"] > results["eval_score/blur_0.7"] + 0.2
    pictures = {path.name for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert pictures == {"spectrum.png", "damage.png"}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["ranking"] < logged[0]["ranking"]
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["regression"] + entry["ranking"], abs=1e-3)


@pytest.mark.slow
@MODELS
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path):
    dataset = toy_spectrum(tmp_path / "train", 5)

    def run(folder, resume=None):
        args = config(tmp_path / folder, gradient_accumulation_steps=2, ema_decay=0.5)
        trainer = RewardModelTrainer(tiny_model(**model), args, dataset)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 4
    assert torch.equal(weights(whole.model), weights(resumed.model))
    saved = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert not torch.equal(weights(whole.model), weights(tiny_model(**model)))


def test_two_batches_of_one_step_draw_different_versions(tmp_path):
    args = config(tmp_path, gradient_accumulation_steps=2)
    dataset = toy_spectrum(tmp_path / "train", 4)
    trainer = RewardModelTrainer(tiny_model(num_members=1).eval(), args, dataset)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    losses = [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]
    assert losses[0] != losses[1]
    trainer._micro_step = (-1, 0)
    assert trainer.compute_loss(trainer.model, batch).item() == losses[0]


@pytest.mark.slow
def test_what_is_saved_is_the_average_in_half_precision_and_what_a_reward_reads(tmp_path):
    dataset = toy_spectrum(tmp_path / "train", 3)
    trainer = RewardModelTrainer(
        tiny_model(), config(tmp_path / "out", ema_decay=0.95, learning_rate=1e-2, save_strategy="no"), dataset
    )
    trainer.train()
    trainer.save_model()
    volumes = dataset[0]["versions"]
    reward = VolumeReward.from_pretrained(str(tmp_path / "out"))
    with trainer.ema_weights(), torch.no_grad():
        averaged = trainer.reward_model.eval()(volumes)
    torch.testing.assert_close(reward(volumes), averaged, atol=5e-3, rtol=0)
    judged = trainer.evaluate(toy_spectrum(tmp_path / "val", 2, 50))
    scans = torch.stack([toy_spectrum(tmp_path / "val", 2, 50)[i]["real"] for i in range(2)])
    assert judged["eval_score/real"] == pytest.approx(reward(scans).mean().item(), abs=5e-3)
    assert abs(judged["eval_score/real"] - trainer.reward_model(scans).mean().item()) > 1e-2  # the trained weights'
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert trainer.reward_model.dtype == torch.float32
    assert not torch.allclose(weights(reward.model), weights(trainer.model), atol=1e-4)
    assert not (tmp_path / "out" / "training_args.bin").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"per_device_train_batch_size": 1},
        {"clean_versions": 1},
        {"damaged_versions": -1},
        {"min_severity": 0.0},
        {"max_shift": -1},
        {"ranking_temperature": 0.0},
        {"ranking_weight": -0.1},
        {"ranking_margin": 1.5},
        {"symmetric_share": -0.1},
    ],
)
def test_impossible_arguments_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="got"):
        config(tmp_path, **wrong)


def test_too_few_scans_for_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 scans cannot fill a step of 4 .1 process"):
        RewardModelTrainer(
            tiny_model(), config(tmp_path, per_device_train_batch_size=4), toy_spectrum(tmp_path / "t", 3)
        )


# --------------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture
def script_arguments(tiny_pipeline, data, tmp_path) -> dict[str, list]:
    common = ["--data_dir", data.data_dir, "--split_file", data.split_file]
    common += ["--volume_shape", *VOLUME_SHAPE, "--spacing", *SPACING, "--strengths", 0, 0.5, 1, "--spectrum_steps", 4]
    for fold in "ab":
        tiny_pipeline.save_pretrained(tmp_path / fold)
        (tmp_path / fold / TRAINING_SUBJECTS).write_text(json.dumps(SPLIT["folds"][fold]))
    train = [*common, "--spectrum_dir", tmp_path / "spectrum", "--channels", 8, 16, "--norm_num_groups", 4]
    train += ["--per_device_train_batch_size", 2, "--bf16", "false", "--eval_steps", 2, "--save_steps", 2]
    train += ["--logging_steps", 1, "--resume_from_checkpoint", "latest"]
    generators = ["--fold_a_model", tmp_path / "a", "--fold_b_model", tmp_path / "b"]
    return {"common": common, "train": train, "generators": generators}


@pytest.mark.slow
def test_each_fold_is_denoised_by_the_generator_of_the_other_and_the_one_to_be_tuned_adds_full_samples(
    script_arguments, data, tmp_path
):
    shutil.copytree(tmp_path / "a", tmp_path / "tuned")
    (tmp_path / "tuned" / TRAINING_SUBJECTS).write_text(json.dumps([*SPLIT["folds"]["a"], *SPLIT["folds"]["b"]]))
    scans = {part: VolumeDataset.from_arguments(data, part) for part in ("a", "b", "validation")}
    common = {"folder": tmp_path / "made", "strengths": LEVELS, "levels_per_subject": 2, "num_inference_steps": 2}
    fold_a, fold_b, tuned = (str(tmp_path / name) for name in ("a", "b", "tuned"))
    train, validation = build_fold_spectra(scans, fold_a, fold_b, tuned, **common)
    assert [path.parent.name for path in train.paths] == ["b-by-generator-a"] * 2 + ["a-by-generator-b"] * 4
    assert [path.parent.name for path in train.more] == ["b-by-generator"] * 2 + ["a-by-generator"] * 4
    assert train[0]["strengths"].tolist() == [0.0, 1.0, 1.0]  # the last is the full sample of the one to be tuned
    assert [path.parent.name for path in validation.paths] == ["validation-by-generator"] * 2
    assert validation[0]["strengths"].tolist() == LEVELS

    alone, judged_by_a = build_fold_spectra(scans, fold_a, None, None, **common)
    assert len(alone) == 2 and not alone.more
    assert judged_by_a.paths[0].parent.name == "validation-by-generator-a"
    with pytest.raises(ValueError, match="the generator of the other fold"):
        build_fold_spectra(scans, fold_b, fold_a, None, **common)


@pytest.mark.slow
def test_without_fold_generators_the_one_to_be_tuned_makes_the_spectrum_of_all_scans(
    script_arguments, tmp_path, monkeypatch
):
    subjects = [*SPLIT["folds"]["a"], *SPLIT["folds"]["b"]]
    (tmp_path / "a" / TRAINING_SUBJECTS).write_text(json.dumps(subjects))
    arguments = [*script_arguments["train"], "--model_name_or_path", tmp_path / "a", "--max_steps", 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The generator brings")  # it was trained on none of them
        run_example(monkeypatch, "train_reward.py", *arguments, "--output_dir", tmp_path / "x")
    made = {path.parent.name for path in (tmp_path / "spectrum").rglob("*.safetensors")}
    assert made == {"train-by-generator", "validation-by-generator"}
    assert len(list((tmp_path / "spectrum" / "train-by-generator").iterdir())) == 6  # all training scans
    (tmp_path / "a" / TRAINING_SUBJECTS).write_text(json.dumps([*subjects, "sub-06"]))  # judged, and seen
    with pytest.raises(SystemExit, match="error: 1 of 2 subjects were in the training set of the generator"):
        run_example(monkeypatch, "train_reward.py", *arguments, "--output_dir", tmp_path / "y")


@pytest.mark.parametrize("given", [[], ["--fold_b_model", "b"], ["--fold_b_model", "b", "--model_name_or_path", "g"]])
def test_a_spectrum_needs_a_generator_to_make_it(given, script_arguments, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "train_reward.py", *script_arguments["train"], *given, "--output_dir", tmp_path / "x")
    assert "give --fold_a_model, or --model_name_or_path without --fold_b_model" in capsys.readouterr().err


def test_a_generator_that_knows_training_scans_by_heart_is_found_out(tmp_path):
    def spectrum(name: str, error: float, levels: tuple[float, ...] = (0.0, 0.5, 1.0)) -> SpectrumDataset:
        (tmp_path / name).mkdir()
        for i in range(6):
            real = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(i)).half()
            noise = torch.randn(len(levels), 1, 8, 8, 8, generator=torch.Generator().manual_seed(50 + i))
            versions = (real + error * (1 + i / 20) * noise).half()
            tensors = {"real": real, "versions": versions, "strengths": torch.tensor(levels)}
            save_file(tensors, tmp_path / name / f"sub-{i}-1.safetensors")
        return SpectrumDataset(sorted((tmp_path / name).iterdir()))

    unseen, same, closer = spectrum("unseen", 0.1), spectrum("same", 0.1), spectrum("closer", 0.05)
    ratio, error = recall(same, unseen)
    assert ratio == pytest.approx(1, abs=1e-3) and 0.05 < error < 0.2
    assert recall(closer, unseen)[0] == pytest.approx(0.25, abs=0.01)  # half the error, squared
    assert math.isnan(recall(spectrum("others", 0.1, (0.0, 1.0)), unseen)[0])  # nothing is hidden enough to be recalled
    with pytest.warns(UserWarning, match=r"0\.25 \+- .* of theirs\): it knows them by heart"):
        _warn_of_recall(*recall(closer, unseen))


@pytest.mark.slow
def test_the_training_script_runs_and_is_resumed(script_arguments, tmp_path, monkeypatch, capfd):
    output = tmp_path / "3d"
    for steps in (2, 3):
        arguments = [*script_arguments["train"], *script_arguments["generators"], "--architecture", "3d"]
        run_example(monkeypatch, "train_reward.py", *arguments, "--output_dir", output, "--max_steps", steps)
        assert "eval_rank_correlation" in capfd.readouterr().out
    made = sorted(path.parent.name + "/" + path.name for path in (tmp_path / "spectrum").rglob("*.safetensors"))
    assert made == [
        *(f"a-by-generator-b/sub-0{name}.safetensors" for name in ("1-1", "1-2", "3-1", "5-1")),
        *(f"b-by-generator-a/sub-0{name}.safetensors" for name in ("2-1", "4-1")),
        *(f"validation-by-generator-a/sub-0{name}.safetensors" for name in ("6-1", "7-1")),
    ]
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    card = (output / "README.md").read_text()
    assert "rank_correlation" in card
    assert str(tmp_path) not in card + (output / "config.json").read_text()
    assert list(output.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_the_generator_to_be_fine_tuned_adds_full_samples_and_a_reward_is_gone_on_with(
    script_arguments, tmp_path, monkeypatch
):
    tuned = tmp_path / "tuned"
    shutil.copytree(tmp_path / "a", tuned)
    (tuned / TRAINING_SUBJECTS).write_text(json.dumps([*SPLIT["folds"]["a"], *SPLIT["folds"]["b"]]))
    tiny_model().save_pretrained(tmp_path / "before")
    arguments = [*script_arguments["train"], *script_arguments["generators"], "--model_name_or_path", tuned]
    arguments += ["--init_from", tmp_path / "before", "--learning_rate", 0, "--max_steps", 1]
    run_example(monkeypatch, "train_reward.py", *arguments, "--architecture", "3d", "--output_dir", tmp_path / "after")
    before, after = (VolumeRewardModel.from_pretrained(tmp_path / name) for name in ("before", "after"))
    torch.testing.assert_close(weights(after).float(), weights(before), atol=1e-3, rtol=1e-3)
    made = {path.name for path in (tmp_path / "spectrum").iterdir()}
    assert made == {f"{part}-by-generator" for part in ("a", "b", "validation")} | {
        "a-by-generator-b",
        "b-by-generator-a",
    }
    for name, levels in (("a-by-generator/sub-01-1", [1.0]), ("validation-by-generator/sub-06-1", [0.0, 0.5, 1.0])):
        assert load_file(tmp_path / "spectrum" / f"{name}.safetensors")["strengths"].tolist() == levels


@pytest.mark.slow
def test_the_report_script_judges_both_rewards_on_unseen_subjects(script_arguments, tmp_path, monkeypatch, capsys):
    one_generator = [*script_arguments["train"], *script_arguments["generators"][:2], "--architecture", "2d"]
    one_generator += ["--max_steps", 1]
    run_example(monkeypatch, "train_reward.py", *one_generator, "--output_dir", tmp_path / "2d")
    made = {path.name for path in (tmp_path / "spectrum").iterdir()}
    assert made == {"b-by-generator-a", "validation-by-generator-a"}  # with one generator its own fold is left out
    tiny_model().save_pretrained(tmp_path / "3d")
    report = [*script_arguments["common"], "--output_dir", tmp_path / "report", "--model_name_or_path", tmp_path / "a"]
    (tmp_path / "mine.py").write_text(
        "def mean(volumes, **conditions):\n    return volumes.flatten(1).mean(1).tolist()\n"
        "CALLS = []\n"
        "def later(volumes, **conditions):\n"
        "    CALLS.append(0)\n"
        "    return [None if len(CALLS) == 1 else 0.5] * len(volumes)\n"
    )
    report += [
        "--reward_funcs",
        tmp_path / "3d",
        tmp_path / "2d",
        f"{tmp_path}/mine.py:mean",
        f"{tmp_path}/mine.py:later",
    ]
    run_example(monkeypatch, "reward_report.py", *report)
    out = capsys.readouterr().out
    assert "2 scans of the validation subjects" in out and "| score/half_swap |" in out
    assert (
        "Memorisation: of 6 training scans" in out and "VolumeReward None, SliceReward None, mean None" in out
    )  # no class on both sides
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["real"] for row in written["scores"]["later"]] == [None, 0.5]  # counted and left out
    assert "later: 1 scans without a finite score are left out" in (tmp_path / "report" / "report.md").read_text()
    assert (
        set(written["report"]) == {"VolumeReward", "SliceReward", "mean", "later"}
        and len(written["scores"]["mean"]) == 2
    )
    rewards = {
        "VolumeReward": VolumeReward.from_pretrained(str(tmp_path / "3d")),
        "SliceReward": SliceReward.from_pretrained(str(tmp_path / "2d")),
        "mean": lambda volumes: volumes.mean(),
    }
    spectrum = SpectrumDataset(sorted((tmp_path / "report" / "spectrum-validation").glob("*.safetensors")))
    for kind, reward in rewards.items():
        scores = [reward(spectrum[i]["real"][None]).item() for i in range(2)]
        assert [row["real"] for row in written["scores"][kind]] == pytest.approx(scores, abs=1e-4)
    assert {"report.md", "spectrum.png", "damage.png"} <= {path.name for path in (tmp_path / "report").iterdir()}
    (tmp_path / "a" / TRAINING_SUBJECTS).write_text(json.dumps(SPLIT["validation"]))  # by another split
    with pytest.raises(SystemExit, match="2 of 2 subjects were in the training set of"):
        run_example(monkeypatch, "reward_report.py", *report)


def test_the_report_refuses_a_severity_before_it_makes_a_spectrum():
    with pytest.raises(ValueError, match=r"severities must lie in \(0, 1\], got \[0.3, 1.5\]"):
        runpy.run_path(str(EXAMPLES / "reward_report.py"))["ReportArguments"](severities=[0.3, 1.5])


def test_a_reward_that_knows_its_training_scans_is_found_out_within_each_class():
    sets = (["sub-02", "sub-03", "sub-04"], ["sub-01", "sub-01", "sub-05", "sub-07"], [0, 0, 1], [0, 0, 1, 2])
    interval = training_above_unseen([0.9, 0.4, 0.1], [0.5, 0.4, 0.6, 0.0], *sets)
    # young: 0.9 wins twice, 0.4 loses once and ties once; middle: loses; old has no training scan
    assert interval.value == pytest.approx(2 / 3 * 2.5 / 4 + 1 / 3 * 0)
    assert interval.low < interval.value < interval.high
    assert training_above_unseen([2.0, 2.0, 2.0], [1.0] * 4, *sets).value == 1
    assert training_above_unseen([2.0], [1.0], ["sub-02"], ["sub-07"], [0], [2]) is None  # no class on both sides


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_the_training_script_takes_as_many_channels_as_the_generator_makes(kind):
    script = runpy.run_path(str(EXAMPLES / "train_reward.py"))
    arguments = script["RewardArguments"](fold_a_model="a", architecture=kind, channels=[8, 16], norm_num_groups=4)
    assert script["build"](arguments, in_channels=2)(torch.rand(1, 2, 16, 16, 16)).shape == (1,)


def test_the_training_script_refuses_generators_of_the_wrong_fold(script_arguments, tmp_path, monkeypatch):
    swapped = ["--fold_a_model", tmp_path / "b", "--fold_b_model", tmp_path / "a", "--output_dir", tmp_path / "x"]
    with pytest.raises(SystemExit, match="the generator of the other fold"):
        run_example(monkeypatch, "train_reward.py", *script_arguments["train"], *swapped, "--max_steps", 1)


def test_volumes_too_small_for_the_network_are_refused_before_the_spectrum_is_made(
    script_arguments, tmp_path, monkeypatch
):
    arguments = [*script_arguments["train"], *script_arguments["generators"], "--output_dir", tmp_path / "x"]
    arguments += ["--channels", *[8] * 5]
    with pytest.raises(SystemExit, match="every side must have at least 64 voxels"):
        run_example(monkeypatch, "train_reward.py", *arguments)
    assert not (tmp_path / "spectrum").exists()


@pytest.mark.slow
def test_a_run_is_watched_by_the_scores_of_one_scans_versions(tmp_path):
    args = config(tmp_path / "out", max_steps=2, picture_steps=2, eval_strategy="no", save_strategy="no")
    trainer = RewardModelTrainer(
        tiny_model(), args, toy_spectrum(tmp_path / "train", 6), toy_spectrum(tmp_path / "val", 2, 50)
    )
    trainer.train()
    frames = [path.name for path in sorted((tmp_path / "out" / "film").iterdir())]
    assert frames == ["spectrum_of_one_scan-000000.png", "spectrum_of_one_scan-000002.png"]
    scores = trainer.film_figures()["spectrum_of_one_scan"].axes[-1].lines[0].get_ydata()
    with torch.no_grad():
        expected = trainer.reward_model(trainer.eval_dataset[0]["real"][None]).item()
    assert scores[0] == pytest.approx(expected, abs=1e-4)
