"""Rewards that return something odd, fail, hang or change what they are given: docs/reliability.md."""

import asyncio
import math
import sys
import time
import warnings

import datasets
import numpy as np
import pytest
import torch

import diffusers_med3d
from diffusers_med3d import DDPOConfig, DDPOTrainer
from diffusers_med3d.rewards.loading import load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rl import as_reward_tensor
from diffusers_med3d.utils.stopping import TrainingStopped

pytestmark = pytest.mark.slow

THREE = [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "returned",
    [
        THREE,
        tuple(THREE),
        np.array(THREE),
        np.array(THREE, np.float16),
        np.array(THREE, object),
        [np.float64(0), torch.tensor(0.5), True],
        torch.tensor(THREE)[:, None],
        np.array(THREE)[:, None],
        torch.tensor(THREE, dtype=torch.float16),
        torch.tensor(THREE, dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_one_number_for_each_volume_is_taken_in_any_form(returned):
    values = as_reward_tensor(returned, 3, "mine")
    assert values.tolist() == THREE and values.dtype == torch.float32 and not values.requires_grad


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None for 3 volumes"),
        ({0: 0.1, 1: 0.2, 2: 0.3}, r"returned a dict with the keys \[0, 1, 2\]"),
        ({"avg": THREE}, r"returned a dict with the keys \['avg'\]"),
        ({0.1, 0.2, 0.3}, "returned a set"),
        ((THREE, {"info": 1}), "returned a tuple of 2 that holds a list"),
        ((torch.tensor(THREE), {"info": 1}), r"returned a tuple of 2 that holds a Tensor of shape \(3,\)"),
        ("0.5", "returned the text '0.5'"),
        (["0.5", "1", "0"], "returned a list of 3 that holds the text '0.5'"),
        ([[0.0], [0.5], [1.0]], "returned a list of 3 that holds a list"),
        ([{"score": 1.0}] * 3, r"returned a list of 3 that holds a dict with the keys \['score'\]"),
        (0.5, "returned 0.5"),
        (torch.tensor(0.5), r"gave shape \(\)"),
        (np.float32(0.5), r"gave shape \(\)"),
        ([1.0], r"gave shape \(1,\)"),
        ([1.0] * 4, r"gave shape \(4,\)"),
        ([], r"gave shape \(0,\)"),
        (torch.zeros(1, 3), r"gave shape \(1, 3\)"),
        (torch.zeros(3, 2), r"gave shape \(3, 2\)"),
        (torch.zeros(3, dtype=torch.complex64), "gave a tensor of torch.complex64"),
        (np.zeros(3, complex), "returned a list of 3 that holds a complex"),
        (np.array(["a", "b", "c"]), "returned a list of 3 that holds the text 'a'"),
        (torch.zeros(3, device="meta"), "gave a tensor without values"),
        (iter(THREE), "returned a list_iterator"),
        (lambda: THREE, "returned a function"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_reward(returned, message):
    with pytest.raises(ValueError, match=f"Reward 'mine' {message}.*expected 3 numbers") as error:
        as_reward_tensor(returned, 3, "mine")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "huge", [[1e300] * 3, [10**400] * 3, torch.full((3,), 1e300, dtype=torch.float64), np.full(3, -1e39)]
)
def test_a_score_beyond_float32_is_refused_by_name(huge):
    with pytest.raises(
        ValueError, match="Reward 'mine' returned .*, which is beyond float32; rewards should be of order"
    ):
        as_reward_tensor(huge, 3, "mine")


def volumes_in(func, tiny_volumes, **options):
    return score([func, lambda volumes, **_: volumes.flatten(1).mean(1)], ["mine", "mean"], tiny_volumes, {}, **options)


def raises(volumes, **conditions):
    raise KeyError("age")


def hangs(volumes, **conditions):
    time.sleep(30)


async def waits(volumes, **conditions):
    await asyncio.sleep(30)


async def blocks(volumes, **conditions):
    time.sleep(30)


def leaves(volumes, **conditions):
    sys.exit(3)


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (raises, r"Reward 'mine' failed on 3 volumes with KeyError: 'age' \(test_strange_rewards.py, line \d+\)\."),
        (leaves, r"Reward 'mine' failed on 3 volumes with RuntimeError: it called sys.exit\(3\)"),
        (hangs, "Reward 'mine' took more than 0.05 seconds for 3 volumes."),
        (waits, "Reward 'mine' took more than 0.05 seconds for 3 volumes."),
        (blocks, "Reward 'mine' took more than 0.05 seconds for 3 volumes."),
    ],
)
def test_a_reward_that_fails_or_hangs_is_named_and_the_others_score(func, message, tiny_volumes, monkeypatch):
    monkeypatch.setattr("diffusers_med3d.rewards.scoring.LOOP_GRACE", 0.05)
    with pytest.warns(UserWarning, match=message) as caught:
        found = volumes_in(func, tiny_volumes, timeout=0.05 if "took" in message else 5.0, keep_going=True)
    assert found[:, 0].isnan().all() and torch.equal(found[:, 1], tiny_volumes.flatten(1).mean(1))
    assert all("\n" not in str(one.message) for one in caught)
    with pytest.raises(ValueError, match=message):
        volumes_in(func, tiny_volumes, timeout=0.05 if "took" in message else 5.0)


def test_a_time_limit_longer_than_threads_can_wait_is_no_limit(tiny_volumes):
    async def quick(volumes, **conditions):
        return [1.0, 2.0, 3.0]

    for func in (quick, lambda volumes, **conditions: [1.0, 2.0, 3.0]):
        assert volumes_in(func, tiny_volumes, timeout=1e12)[:, 0].tolist() == [1.0, 2.0, 3.0]


def test_what_a_reward_does_to_its_volumes_and_conditions_stays_its_own(tiny_volumes):
    before, conditions = tiny_volumes.clone(), {"age": [1, 2, 3]}

    def greedy(volumes, age):
        volumes -= volumes.mean()
        age.clear()
        return [0.0] * 3

    seen = []

    def second(volumes, age):
        seen.append((volumes.clone(), list(age)))
        return [0.0] * 3

    score([greedy, second], ["greedy", "second"], tiny_volumes, conditions)
    assert torch.equal(tiny_volumes, before) and torch.equal(seen[0][0], before)
    assert seen[0][1] == conditions["age"] == [1, 2, 3]


def test_a_reward_sees_no_gradient_and_works_inside_a_running_loop(tiny_volumes):
    async def notebook():
        return volumes_in(lambda volumes, **_: [float(torch.is_grad_enabled())] * 3, tiny_volumes)

    assert asyncio.run(notebook())[:, 0].tolist() == [0.0] * 3


@pytest.mark.parametrize("given", [None, [None], torch, [[raises]], {"mine": raises}, 1, ""])
def test_what_is_no_reward_is_refused_with_what_is_wanted(given):
    with pytest.raises(ValueError, match="is no reward; a reward is|is no reward .*; a reward is|is empty"):
        load_rewards(given)


def trainer(pipeline, folder, rewards, conditions=None, **options):
    defaults = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, num_generations=4, steps_per_generation=1,
        num_inference_steps=3, report_to="none", disable_tqdm=True, bf16=False, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    conditions = datasets.Dataset.from_dict({"class_label": ["young"]}) if conditions is None else conditions
    args = DDPOConfig(**{**defaults, **options})
    return DDPOTrainer(model=pipeline, reward_funcs=rewards, args=args, train_dataset=conditions)


class Flaky:
    """The mean voxel, and something else in the rollouts of a list."""

    __name__ = "flaky"

    def __init__(self, broken, how):
        self.calls, self.broken, self.how = 0, broken, how

    def __call__(self, volumes, **conditions):
        self.calls += 1
        return self.how(volumes) if self.calls - 1 in self.broken else volumes.flatten(1).mean(1)


def weights(one):
    return torch.cat([p.detach().flatten().clone() for p in one.model.parameters()])


@pytest.mark.parametrize("how", [raises, lambda volumes: [None] * 4, lambda volumes: [math.nan, math.inf] * 2])
def test_a_rollout_without_scores_has_no_influence_and_the_run_goes_on(tiny_pipeline, tmp_path, how):
    one, seen = trainer(tiny_pipeline, tmp_path, Flaky([1], how), beta=0.0, max_grad_norm=0.0), []
    one.callback_handler.callbacks[0].on_pre_optimizer_step = lambda *args, **kwargs: seen.append(
        max(float(p.grad.abs().max()) for p in one.model.parameters())
    )
    with pytest.warns(UserWarning, match="'flaky' scored none of the samples of a rollout"):
        one.train()
    assert seen[0] > 0 and seen[1] == 0 and seen[2] > 0
    logs = [row for row in one.state.log_history if "loss" in row]
    assert [row["rewards/unscored"] for row in logs] == [row["rewards/flaky/unscored"] for row in logs] == [0, 1, 0]


def test_one_sample_without_a_score_is_counted_and_has_no_influence(tiny_pipeline, tmp_path):
    one = trainer(tiny_pipeline, tmp_path, lambda volumes, **_: [0.1, math.nan, 0.2, math.inf], max_steps=1)
    one.train()
    assert one._chunks[0].advantages[1] == one._chunks[0].advantages[3] == 0 < one._chunks[0].advantages[2]
    assert one.state.log_history[0]["rewards/unscored"] == 0.5 and weights(one).isfinite().all()


@pytest.mark.parametrize(
    ("broken", "message", "steps"),
    [([0], "has not scored any sample yet", 0), ([1, 2], "has not scored a sample in 2 rollouts in a row", 2)],
)
def test_a_reward_that_keeps_failing_stops_the_run(tiny_pipeline, tmp_path, broken, message, steps):
    one = trainer(tiny_pipeline, tmp_path, Flaky(broken, raises), max_failed_rollouts=2)
    with warnings.catch_warnings(), pytest.raises(TrainingStopped, match=f"Reward 'flaky' {message}; 0 of 4 samples"):
        warnings.simplefilter("ignore")
        one.train()
    assert one.state.global_step == steps and weights(one).isfinite().all()


def test_a_reward_of_the_wrong_length_stops_the_run_before_an_update(tiny_pipeline, tmp_path):
    one = trainer(tiny_pipeline, tmp_path, Flaky([0], lambda volumes: [1.0] * 3))
    before = weights(one)
    with pytest.raises(ValueError, match=r"Reward 'flaky' gave shape \(3,\) for 4 volumes; expected 4 numbers"):
        one.train()
    assert torch.equal(before, weights(one))


def test_an_evaluation_goes_on_where_a_reward_fails(tiny_pipeline, tmp_path):
    one = trainer(tiny_pipeline, tmp_path, [raises, lambda volumes, **_: volumes.flatten(1).mean(1)])
    with pytest.warns(UserWarning, match="Reward 'raises' failed"):
        found = one.evaluate()
    assert math.isnan(found["eval_rewards/raises"]) and math.isfinite(found["eval_rewards/<lambda>"])


@pytest.mark.parametrize("rows", [[{"class_label": "young"}, {"class_label": "old"}], ({"class_label": 0},)])
def test_conditions_may_be_a_list_of_dicts(tiny_pipeline, tmp_path, rows):
    assert len(trainer(tiny_pipeline, tmp_path, raises, rows).train_dataset) == len(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (datasets.Dataset.from_dict({"class_label": [0]}).to_iterable_dataset(), "is a stream.*Dataset.from_list"),
        ({"class_label": [0]}, "must be a datasets.Dataset or a list of dicts, one per condition, got a dict"),
        (datasets.DatasetDict(), "got a DatasetDict"),
        ([0, 1], "got a list"),
        ([], "got a list"),
        ([{"class_label": 0}, {"label": 0}], r"must have the same keys, got \['class_label'\]"),
        (datasets.Dataset.from_dict({"class_label": []}), "must hold at least one condition"),
    ],
)
def test_other_conditions_are_refused_in_one_line(tiny_pipeline, tmp_path, rows, message):
    with pytest.raises(ValueError, match=f"train_dataset .*{message}|train_dataset {message}"):
        trainer(tiny_pipeline, tmp_path, raises, rows)


def test_a_module_is_called_by_its_forward_and_refused_before_sampling_if_that_takes_no_conditions(
    tiny_pipeline, tmp_path
):
    with pytest.raises(ValueError, match=r"define it as Linear\(volumes, \*\*conditions\)"):
        trainer(tiny_pipeline, tmp_path, torch.nn.Linear(16, 1))
    model = diffusers_med3d.VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1)
    assert trainer(tiny_pipeline, tmp_path, model).reward_names == ["VolumeReward"]
