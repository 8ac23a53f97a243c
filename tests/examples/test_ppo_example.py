"""README command 1, at the size of a test: two steps in a process of its own, then resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import EXAMPLES, run_example
from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.models.reward import SliceRewardModel, VolumeRewardModel

EXAMPLE = EXAMPLES / "ppo_finetune.py"
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLE.parent / "accelerate_configs/cpu.yaml")]


@pytest.fixture
def tiny_rewards(tmp_path) -> list[str]:
    VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward-3d")
    SliceRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward-2d")
    return ["--reward_funcs", str(tmp_path / "reward-3d"), str(tmp_path / "reward-2d")]


def launch(*flags: str, launcher: list[str] | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *(launcher or []), str(EXAMPLE), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_example_runs_and_is_resumed(tiny_pipeline_folder, tiny_rewards, tmp_path):
    out = tmp_path / "out"
    (Path(tiny_pipeline_folder) / "training_subjects.json").write_text('["sub-01"]')
    (Path(tiny_pipeline_folder) / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    flags = [
        "--model_name_or_path",
        tiny_pipeline_folder,
        *tiny_rewards,
        "--output_dir",
        str(out),
        "--eval_volumes",
        "2",
    ]
    flags += ["--per_device_train_batch_size", "6", "--steps_per_generation", "2", "--num_generations", "4"]
    flags += ["--num_inference_steps", "4", "--sde_window_size", "2", "--eval_num_inference_steps", "2"]
    flags += ["--save_steps", "1", "--bf16", "false"]
    printed = launch(*flags, "--max_steps", "2", launcher=ACCELERATE)
    for row in (
        "reward VolumeReward",
        "reward SliceReward",
        "KL to the start",
        "clip fraction",
        "diversity",
        "seconds: rollout",
    ):
        assert row in printed
    for name in (
        "model_index.json",
        "README.md",
        "results.json",
        "figures/reward_curve.png",
        "figures/before_after.png",
    ):
        assert (out / name).is_file()
    assert list(out.rglob("events.out.tfevents*"))
    card = (out / "README.md").read_text()
    assert "reward VolumeReward" in card and "license: cc-by-4.0" in card and str(tmp_path) not in card
    assert MedDiffusion3DPipeline.from_pretrained(out)(num_samples=1, num_inference_steps=2).volumes.isfinite().all()
    assert json.loads((out / "training_subjects.json").read_text()) == ["sub-01"]
    first = json.loads((out / "results.json").read_text())
    assert (first["steps"], first["max_steps"]) == (2, 2) and "| optimizer steps" in card
    assert first["volumes"] == 6 and all(len(v["difference"]) == 2 for v in first["rewards"].values())

    launch(*flags, "--max_steps", "4", "--resume_from_checkpoint", "latest")
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and [e["step"] for e in state["log_history"] if "loss" in e] == [1, 2, 3, 4]
    resumed = json.loads((out / "results.json").read_text())
    logged = [v for e in state["log_history"] for name, v in e.items() if name.startswith("seconds/")]
    assert resumed["seconds"]["fine-tuning"] == pytest.approx(sum(logged))  # both sessions
    for name, figures in first["rewards"].items():
        # the same noise; accelerate gave the first run all cores, and threads round otherwise
        assert resumed["rewards"][name]["before"] == pytest.approx(figures["before"], abs=1e-4)


@pytest.mark.slow
def test_a_run_that_cannot_go_on_ends_the_script_in_one_line(tiny_pipeline_folder, tmp_path, monkeypatch):
    (tmp_path / "blind.py").write_text("def blind(volumes, **conditions):\n    return [None] * len(volumes)\n")
    flags = ["--model_name_or_path", tiny_pipeline_folder, "--reward_funcs", f"{tmp_path}/blind.py:blind"]
    flags += ["--output_dir", tmp_path / "out", "--eval_volumes", "1", "--num_inference_steps", "3", "--bf16", "false"]
    flags += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--eval_num_inference_steps", "1"]
    flags += ["--picture_steps", "0"]
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, "ppo_finetune.py", *flags)
    said = str(ended.value)
    assert said.startswith("ppo_finetune.py: stopped: Reward 'blind' has not scored any sample yet")
    assert "\n" not in said
