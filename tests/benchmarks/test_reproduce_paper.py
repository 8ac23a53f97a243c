"""benchmarks/paper/reproduce_paper.py with tiny components, its trainings as processes of two steps."""

import csv
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from conftest import CLASS_NAMES, REPOSITORY, synthetic_brain
from diffusers_med3d import MedDiffusion3DPipeline, SliceRewardModel, VolumeRewardModel, WitnessRewardModel
from diffusers_med3d.hub.cards import missing
from diffusers_med3d.rewards.loading import load_reward
from diffusers_med3d.schedulers.flow import flow_scheduler

EXAMPLE = REPOSITORY / "benchmarks" / "paper" / "reproduce_paper.py"
SIDE, SPACING = 32, 6.0  # the 3D features need 32 voxels a side
AGES = {"train": (25, 30, 45, 50, 65, 70), "validation": (26, 31, 46, 66, 71), "test": (27, 32, 47, 67, 72)}


@pytest.fixture
def command(tiny_pipeline, tmp_path) -> list[str]:
    """A folder of sixteen brains with a split, a base and two rewards; the flags of a very small experiment."""
    split: dict = {part: [] for part in AGES}
    rows = [("file_name", "participant_id", "age")]
    for part, ages in AGES.items():
        for age in ages:
            subject = f"sub-{age}"
            split[part].append(subject)
            rows.append((f"{subject}.nii.gz", subject, age))
            image = nibabel.Nifti1Image(synthetic_brain((SIDE,) * 3, age), np.diag([SPACING] * 3 + [1.0]))
            (tmp_path / "data").mkdir(exist_ok=True)
            nibabel.save(image, tmp_path / "data" / f"{subject}.nii.gz")
    with open(tmp_path / "data" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    split["folds"] = {"a": split["train"][::2], "b": split["train"][1::2]}
    (tmp_path / "split.json").write_text(json.dumps(split))

    base = MedDiffusion3DPipeline(
        **tiny_pipeline.components, volume_shape=[SIDE] * 3, spacing=[SPACING] * 3, class_names=CLASS_NAMES
    )
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "training_subjects.json").write_text(json.dumps(split["train"]))
    VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward-3d")
    SliceRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward-2d")
    words = f"""--data_dir {tmp_path}/data --split_file {tmp_path}/split.json --volume_shape {SIDE} {SIDE} {SIDE}
        --spacing {SPACING} {SPACING} {SPACING} --model_name_or_path {tmp_path}/base
        --reward_funcs {tmp_path}/reward-3d {tmp_path}/reward-2d --output_dir {tmp_path}/out
        --launcher {sys.executable} --budget try
        --rl_steps 2 --sweep_steps 2 --learning_rates 1e-5 --group_sizes 2 --batch_size 6 --guidance_scales 1
        --sampling_steps 10 5 --num_samples 10 --num_synthetic 2 --classifier_seeds 1 --classifier_steps 1
        --real_per_class 2 --extractors haar-scattering-3d"""
    rl = "--bf16 false --num_inference_steps 4 --eval_num_inference_steps 2 --report_to none --picture_steps 0"
    return [str(EXAMPLE), *words.split(), f"--rl_flags={rl}"]


@pytest.fixture
def launch(command, monkeypatch, capfd):
    """The script with further flags; gives what it printed."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capfd.readouterr().out

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.long
@pytest.mark.slow
def test_arms_come_one_at_a_time_the_report_tells_what_is_missing_and_the_test_subjects_are_opened_once(
    launch, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="frozen.json is missing: run the sweep, or freeze by hand"):
        launch("--steps", "arms", "--learning_rates", "1e-5", "2e-5")
    for flag in ("steps", "arms"):
        with pytest.raises(SystemExit, match="2"):
            launch(f"--{flag}", "sweeep")
    with pytest.raises(SystemExit, match="2"):
        launch("--best_of", "1")
    with pytest.raises(FileNotFoundError, match="both-0 holds no finished training"):
        launch("--steps", "continued")

    # one arm, with settings frozen by hand
    assert launch("--steps", "sweep", "arms", "--arms", "both").count("ppo_finetune.py") == 1
    frozen = (out / "frozen.json").read_text()
    assert json.loads(frozen)["setting"] == {"learning_rate": 1e-5, "beta": 0.01, "window": 2, "group_size": 2}
    assert not list(out.rglob("checkpoint-*"))
    assert "| max_minutes | inf |" in (out / "arms" / "both-0" / "README.md").read_text()  # all steps, however slow
    with pytest.raises(ValueError, match=r"frozen.json was made with other settings.*'rl_steps': \(2, 3\)"):
        launch("--steps", "arms", "--rl_steps", "3")
    with pytest.raises(ValueError, match=r"'learning_rate': \(1e-05, 2e-05\)"):
        launch("--steps", "arms", "--learning_rates", "2e-5")
    with pytest.raises(ValueError, match=r"an experiment with other settings.*'antialias': \(False, True\)"):
        launch("--steps", "report", "--antialias", "true")
    printed = launch("--steps", "evaluate", "report")
    assert "both rewards below 3D reward alone |  | not run |" in printed
    not_run = "3D reward alone; 2D reward alone; other rewards; breakdown; continued; sampler; downstream-validation."
    assert f"Not run: {not_run}" in printed
    assert "Not swept: frozen by hand." in printed and "ppo_finetune.py" not in printed

    # further ones later; what was begun with another setting is not gone on with
    begun = out / "arms" / "3d" / "setting.json"
    begun.parent.mkdir()
    begun.write_text(json.dumps(read(out / "arms" / "both-0" / "setting.json") | {"beta": 0.04}))
    with pytest.raises(ValueError, match=r"3d was begun with other settings .*'beta': \(0.04, 0.01\)"):
        launch("--steps", "arms", "--arms", "3d")
    begun.unlink()
    printed = launch("--steps", "arms", "report", "--arms", "both", "3d", "--seeds", "1", "0")
    assert printed.count("ppo_finetune.py") == 2 and "; evaluate with all that is there now." in printed
    assert (out / "frozen.json").read_text() == frozen  # the seed that is carried on is still the very first
    assert list(read(out / "arms" / "3d" / "results.json")["rewards"]) == ["VolumeReward"]
    weights = [
        MedDiffusion3DPipeline.from_pretrained(out / "arms" / f"both-{seed}").unet.out[2].conv.weight for seed in (0, 1)
    ]
    assert not torch.equal(*weights)

    printed = launch(
        "--steps", "breakdown", "arms", "continued", "sampler", "evaluate", "downstream", "report", "--arms", "3d"
    )
    assert printed.count("train_diffusion.py") == 1 and "ppo_finetune.py" not in printed
    assert read(out / "breakdown.json")["found"]["headline"].startswith("To be worked on:")
    assert (out / "breakdown" / "breakdown.png").is_file()
    continued = out / read(out / "continued.json")["found"]["best"]
    assert MedDiffusion3DPipeline.from_pretrained(continued).unet.config.num_class_embeds == 4
    assert read(continued / "setting.json")["max_steps"] >= 1
    assert read(out / "sampler.json")["found"]["best"]["num_inference_steps"] in (5, 10)

    judged = read(out / "evaluate-validation.json")["found"]
    assert {
        *("pre-trained", "both rewards, seed 0", "both rewards, seed 1", "3D reward alone", "continued pre-training"),
        *("best of 3 by reward", "best guidance and steps", "round-trip"),
    } <= set(judged["figures"][0]["sets"])
    text = (out / "report.md").read_text()
    for heading in (
        "What was wanted",
        "Where the distance comes from",
        "Sweep on validation",
        "All figures",
        "Classifier",
    ):
        assert f"## {heading}" in text
    assert "Not run: 2D reward alone; other rewards." in text
    card = (out / "brain-t1-ppo.md").read_text()
    assert missing(card) == [] and "BraTS 2019" in card and str(tmp_path) not in card + text
    assert (out / "evaluate-validation" / "report-views.png").is_file()
    assert not list(out.rglob("*test*"))  # nobody looked at the test subjects

    # a result that was not finished is made again from what is there, without training anything
    (out / "evaluate-validation.json").unlink()
    assert ".py" not in launch("--steps", "evaluate")
    assert read(out / "evaluate-validation.json")["found"] == judged

    # what was found of other weights under the same name is not taken for theirs
    arm = out / "arms" / "3d"
    arm.rename(out / "arms" / "kept")
    shutil.copytree(out / "arms" / "both-1", arm)
    with pytest.raises(ValueError, match="holds volumes made with other settings .*'generator'"):
        launch("--steps", "evaluate")
    shutil.rmtree(arm)
    (out / "arms" / "kept").rename(arm)

    launch("--open_test", "--steps", "evaluate", "downstream", "report")
    opened = (out / "test-opened.json").read_text()
    assert read(out / "evaluate-test.json")["found"]["figures"] != judged["figures"]
    assert "Judged on the test subjects" in (out / "report.md").read_text()
    (out / "arms" / "3d" / "done").unlink()  # one arm less to compare
    with pytest.raises(ValueError, match="opened on .* with another configuration"):
        launch("--open_test", "--steps", "evaluate")
    assert (out / "test-opened.json").read_text() == opened


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_freezes_the_better_setting_of_a_flow_and_of_awm_and_is_not_made_again(launch, tmp_path):
    base = MedDiffusion3DPipeline.from_pretrained(tmp_path / "base")
    parts = base.components | {"scheduler": flow_scheduler()}
    MedDiffusion3DPipeline(
        **parts, **{name: base.config[name] for name in ("volume_shape", "spacing", "class_names")}
    ).save_pretrained(tmp_path / "base")
    rates = ("--learning_rates", "1e-5", "2e-5", "--loss_type", "awm", "--windows", "3")
    trained = [line for line in launch("--steps", "sweep", *rates).splitlines() if "ppo_finetune.py" in line]
    assert len(trained) == 2
    frozen = read(tmp_path / "out" / "frozen.json")
    scores = {row["learning_rate"]: row["score"] for row in frozen["tried"]}
    assert set(scores) == {1e-5, 2e-5} and scores[frozen["setting"]["learning_rate"]] == min(scores.values())
    assert frozen["loss_type"] == "awm" and all("--forward_times 3" in line for line in trained)
    with pytest.raises(ValueError, match=r"'loss_type': \('awm', 'ddpo'\)"):
        launch("--steps", "sweep", *rates, "--loss_type", "ddpo")
    printed = launch("--steps", "sweep", "report", *rates)
    assert (
        "ppo_finetune.py" not in printed and "Not swept" not in printed and "Not run: both rewards, seed 0;" in printed
    )


def test_a_base_that_was_trained_on_subjects_that_judge_is_refused(launch, tmp_path):
    (tmp_path / "base" / "training_subjects.json").write_text(json.dumps(["sub-25", "sub-27"]))
    with pytest.raises(
        ValueError, match="1 of 10 subjects were in the training set of the base, the first is 'sub-27'"
    ):
        launch("--steps", "breakdown")


def test_the_control_with_other_rewards_needs_both_of_them(launch, capfd):
    for flags, wanted in (
        (["--arms", "other"], "--arms other needs the two rewards of --other_reward_funcs"),
        (["--other_reward_funcs", "brain-t1-reward-3d"], "take a 3D and a 2D reward, got .*brain-t1-reward-3d"),
    ):
        with pytest.raises(SystemExit):
            launch(*flags)
        assert re.search(wanted, capfd.readouterr().err)


@pytest.mark.long
@pytest.mark.slow
def test_witness_rewards_are_compared_with_the_trained_ones_that_they_take_features_from(launch, tmp_path):
    trained = [str(tmp_path / f"reward-{kind}") for kind in ("3d", "2d")]
    witness, scans = [], torch.rand(8, 1, SIDE, SIDE, SIDE)
    for name in trained:
        model = load_reward(name).model
        WitnessRewardModel.of_scans(model, scans, scans[:4] / 2, buffer_size=8).save_pretrained(f"{name}-witness")
        witness.append(f"{name}-witness")
    flags = ["--reward_funcs", *witness, "--other_reward_funcs", *trained]
    printed = launch("--steps", "arms", "breakdown", "evaluate", *flags, "--arms", "both", "other")
    assert printed.count("ppo_finetune.py") == 2 and "both rewards below other rewards" in printed
    results = [read(tmp_path / "out" / "arms" / arm / "results.json")["rewards"] for arm in ("both-0", "other")]
    assert list(results[0]) == ["WitnessReward", "WitnessReward_2"]
    assert list(results[1]) == ["VolumeReward", "SliceReward"]
    assert "by WitnessReward_2" in read(tmp_path / "out" / "breakdown.json")["found"]["table"]
