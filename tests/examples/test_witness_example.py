"""make_witness.py, and a fine-tuning with the forward-process objective by the reward that it made."""

import json

import pytest

from conftest import SPLIT, run_example
from diffusers_med3d.models.reward import SliceRewardModel
from diffusers_med3d.rewards import WitnessReward, load_reward


@pytest.mark.slow
def test_a_witness_is_made_and_fine_tunes_the_generator(
    brains_folder, tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    SliceRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).save_pretrained(tmp_path / "reward-2d")
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    scans = ("--data_dir", brains_folder, "--split_file", tmp_path / "split.json")
    model = ("--model_name_or_path", tiny_pipeline_folder)
    run_example(
        monkeypatch, "make_witness.py", *scans, *model, "--extractor", tmp_path / "reward-2d", "--num_samples", 5,
        "--num_inference_steps", 2, "--buffer_size", 20, "--output_dir", tmp_path / "witness",
    )  # fmt: skip
    assert "features of 5 training scans and 5 samples" in capsys.readouterr().out
    reward = load_reward(str(tmp_path / "witness"))
    assert isinstance(reward, WitnessReward) and reward.model.config.data_settings["volume_shape"] == [16, 16, 16]
    assert len(reward.model.scans) == 5 and reward.state_dict()["num_samples"] == 5
    run_example(
        monkeypatch, "ppo_finetune.py", *model, "--reward_funcs", tmp_path / "witness", "--output_dir",
        tmp_path / "tuned", "--loss_type", "awm", "--max_steps", 1, "--save_steps", 1, "--eval_volumes", 2,
        "--per_device_train_batch_size", 6, "--steps_per_generation", 2, "--num_generations", 4, "--report_to", "none",
        "--num_inference_steps", 2, "--eval_num_inference_steps", 2, "--picture_steps", 0, "--bf16", "false",
    )  # fmt: skip
    assert "reward WitnessReward" in capsys.readouterr().out
    assert (tmp_path / "tuned" / "checkpoint-1" / "reward_0.safetensors").is_file()
