"""Rewards as a user gives them: names, folders, functions by name, callables, models."""

import datasets
import pytest
import torch

from diffusers_med3d import DDPOConfig, DDPOTrainer, SliceReward, SliceRewardModel, VolumeReward, VolumeRewardModel
from diffusers_med3d.rewards.loading import default_rewards, load_reward, load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rl import reward_names
from diffusers_med3d.utils.importing import load_function

MINE = """
import asyncio
from beside import FACTOR

LIMIT = 3

def brightness(volumes, **conditions):
    return FACTOR * volumes.flatten(1).mean(1)

async def slow_darkness(volumes, **conditions):
    await asyncio.sleep(0)
    return [-volume.mean().item() for volume in volumes]

def without_conditions(volumes):
    return [0.0] * len(volumes)

class Judge:
    def __call__(self, volumes, **conditions):
        return [1.0] * len(volumes)
"""


def tiny_model(kind=VolumeRewardModel):
    return kind(channels=(8, 8), norm_num_groups=4, num_members=1).eval()


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "my_rewards.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("FACTOR = 2.0\n")
    return str(tmp_path / "my_rewards.py")


def test_every_form_of_a_reward_is_taken_and_all_of_them_are_mixed(mine, tmp_path, tiny_volumes, monkeypatch):
    for name, kind in (("3d", VolumeRewardModel), ("2d", SliceRewardModel)):
        tiny_model(kind).save_pretrained(tmp_path / name)
    (tmp_path / "in_a_module.py").write_text("def size(volumes, **conditions):\n    return [8.0] * len(volumes)\n")
    monkeypatch.chdir(tmp_path)
    rewards = load_rewards(
        [
            *(str(tmp_path / "3d"), tmp_path / "2d", f"{mine}:brightness", f"{mine}:slow_darkness"),
            *("in_a_module:size", tiny_model(SliceRewardModel), lambda volumes, **conditions: [7.0] * len(volumes)),
        ]
    )
    assert [type(reward) for reward in rewards[:2]] == [VolumeReward, SliceReward]
    names = reward_names(rewards)
    assert names == [
        *("VolumeReward", "SliceReward", "brightness", "slow_darkness", "size", "SliceReward_2", "<lambda>"),
    ]
    found = score(rewards, names, tiny_volumes, {"class_label": [0, 1, 2]})
    means = tiny_volumes.flatten(1).mean(1)
    torch.testing.assert_close(found[:, 2:4], torch.stack([2 * means, -means], dim=1))
    assert found.shape == (3, 7) and found[:, 4].tolist() == [8.0] * 3 and found[:, 6].tolist() == [7.0] * 3
    assert load_rewards(f"{mine}:brightness") == [load_reward(f"{mine}:brightness")]  # the file is executed once


def test_a_bundled_reward_is_loaded_by_its_name_and_its_class_comes_from_its_config():
    assert isinstance(load_reward("brain-t1-reward-2d"), SliceReward)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("brain-t2-reward", "'brain-t2-reward' is no reward .*no bundled checkpoint"),
        ("brain-t1", "'brain-t1' is no reward .*config.json"),
        ("{mine}:symmetry", "has no function 'symmetry'; its functions: brightness, slow_darkness, without_conditions"),
        ("{mine}:LIMIT", "has a int in place of a function 'LIMIT'"),
        ("{mine}:Judge", "has a type in place of a function 'Judge'"),
        ("nowhere.py:f", "no such file: nowhere.py"),
        ("nowhere:f", "No module named 'nowhere'"),
        (3.0, "3.0 is no reward; a reward is a bundled"),
        (VolumeReward, "VolumeReward'> is no reward"),
        ([], "reward_funcs is empty"),
    ],
)
def test_anything_else_is_refused_with_what_came_and_what_is_wanted(mine, given, message):
    given = given.format(mine=mine) if isinstance(given, str) else given
    with pytest.raises((ValueError, OSError, ImportError), match=message):
        load_rewards(given)


def test_a_folder_of_something_else_is_refused(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a AutoencoderKL3D, which is no reward"):
        load_reward(tmp_path)


def test_the_default_rewards_are_for_the_bundled_brains_alone():
    assert default_rewards("brain-t1") == ["brain-t1-reward-3d", "brain-t1-reward-2d"]
    with pytest.raises(ValueError, match="not for outputs/hippocampus; name its rewards with --reward_funcs"):
        default_rewards("outputs/hippocampus")


def test_a_name_without_a_colon_names_no_function():
    with pytest.raises(ValueError, match="expected file.py:function or package.module:function, got 'my_rewards'"):
        load_function("my_rewards")


def trainer(pipeline, folder, rewards, **options):
    args = DDPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=4, steps_per_generation=1,
        num_inference_steps=3, report_to="none", disable_tqdm=True, bf16=False, save_strategy="no", **options,
        picture_steps=0,
    )  # fmt: skip
    conditions = datasets.Dataset.from_dict({"class_label": ["young", "old"]})
    return DDPOTrainer(model=pipeline, reward_funcs=rewards, args=args, train_dataset=conditions)


@pytest.mark.slow
def test_the_trainer_takes_them_mixed_and_a_single_one(tiny_pipeline, mine, tmp_path):
    both = trainer(tiny_pipeline, tmp_path, [f"{mine}:brightness", tiny_model()], reward_weights=[1.0, 0.5])
    both.train()
    assert {"rewards/brightness/mean", "rewards/VolumeReward/mean"} <= set(both.state.log_history[0])
    assert trainer(tiny_pipeline, tmp_path, f"{mine}:brightness").reward_names == ["brightness"]


def test_a_function_that_cannot_take_the_conditions_is_refused_before_anything_is_sampled(
    tiny_pipeline, mine, tmp_path
):
    with pytest.raises(ValueError, match=r"define it as without_conditions\(volumes, \*\*conditions\)"):
        trainer(tiny_pipeline, tmp_path, f"{mine}:without_conditions")
