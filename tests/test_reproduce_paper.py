"""examples/reproduce_paper.py with tiny components: every step once, its trainings as processes of two steps."""

import csv
import json
import runpy
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from conftest import CLASS_NAMES, synthetic_brain
from diffusers_med3d import MedDiffusion3DPipeline, SliceRewardModel, VolumeRewardModel
from diffusers_med3d.cards import missing

EXAMPLE = Path(__file__).parents[1] / "examples" / "reproduce_paper.py"
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
        --spacing {SPACING} {SPACING} {SPACING} --base {tmp_path}/base --volume_reward {tmp_path}/reward-3d
        --slice_reward {tmp_path}/reward-2d --output_dir {tmp_path}/out --launcher {sys.executable} --budget try
        --rl_steps 2 --sweep_steps 2 --learning_rates 1e-5 --group_sizes 2 --batch_size 6 --guidance_scales 1
        --sampling_steps 10 5 --num_samples 5 --num_synthetic 2 --classifier_seeds 1 --classifier_steps 1
        --real_per_class 2 --extractors haar-scattering-3d"""
    rl = "--bf16 false --num_inference_steps 4 --eval_num_inference_steps 2 --report_to none"
    return [str(EXAMPLE), *words.split(), f"--rl_flags={rl}"]


def test_the_experiment_runs_goes_on_where_it_stopped_and_opens_the_test_subjects_once(
    command, tmp_path, monkeypatch, capfd
):
    def launch(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capfd.readouterr().out

    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="frozen.json is missing"):
        launch("--steps", "arms")
    with pytest.raises(ValueError, match=r"Unknown steps \['sweeep'\]"):
        launch("--steps", "sweeep")

    printed = launch()
    assert printed.count("ppo_finetune.py") == 4 and printed.count("train_diffusion.py") == 1
    gate = json.loads((out / "gate.json").read_text())
    assert {"round_trip", "strength_0.5", "full_sample", "blur"} <= {
        path.name for path in (out / "gate" / "volumes").iterdir() if path.is_dir()
    }
    assert gate["verdict"][0]["figure"].startswith("KID")
    frozen = json.loads((out / "frozen.json").read_text())
    assert frozen["setting"] == {"learning_rate": 1e-5, "beta": 0.01, "window": 2, "group_size": 2}
    arms = json.loads((out / "arms.json").read_text())
    assert list(arms) == ["both rewards, seed 0", "3D reward alone", "2D reward alone"]
    assert not list(out.rglob("checkpoint-*"))
    only_3d = json.loads((Path(arms["3D reward alone"]) / "results.json").read_text())
    assert list(only_3d["rewards"]) == ["VolumeReward"]
    continued = json.loads((out / "controls.json").read_text())
    assert continued["continued_steps"] >= 1 and continued["num_inference_steps"] in (5, 10)
    assert MedDiffusion3DPipeline.from_pretrained(continued["continued"]).unet.config.num_class_embeds == 4

    judged = json.loads((out / "evaluate-validation.json").read_text())
    for name in (
        "pre-trained",
        "continued pre-training",
        "best of 2 by reward",
        "best guidance and steps",
        "round-trip",
    ):
        assert name in judged["figures"][0]["sets"]
    text = (out / "report.md").read_text()
    for heading in ("What was wanted", "Gate before RL", "Sweep on validation", "All figures", "Classifier"):
        assert f"## {heading}" in text
    card = (out / "brain-t1-ppo.md").read_text()
    assert missing(card) == [] and "BraTS 2019" in card and str(tmp_path) not in card + text
    assert (out / "evaluate-validation" / "report-views.png").is_file()
    assert not list(out.rglob("*test*"))  # nobody looked at the test subjects

    # a step that was not finished is done again from what is there, without training anything
    (out / "evaluate-validation.json").unlink()
    again = launch("--steps", "evaluate", "report")
    assert "ppo_finetune.py" not in again
    assert json.loads((out / "evaluate-validation.json").read_text()) == judged
    with pytest.raises(ValueError, match="an experiment with other num_samples"):
        launch("--num_samples", "10")

    launch("--open_test", "--steps", "evaluate", "downstream", "report")
    opened = (out / "test-opened.json").read_text()
    assert json.loads((out / "evaluate-test.json").read_text())["figures"] != judged["figures"]
    assert "Judged on the test subjects" in (out / "report.md").read_text()
    (out / "evaluate-test.json").unlink()
    (out / "frozen.json").write_text(json.dumps(frozen | {"setting": frozen["setting"] | {"beta": 0.04}}))
    with pytest.raises(ValueError, match="opened on .* with another configuration"):
        launch("--open_test", "--steps", "evaluate")
    assert (out / "test-opened.json").read_text() == opened
