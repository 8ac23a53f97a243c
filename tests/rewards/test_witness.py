"""The witness function as a reward, and rewards that carry state."""

import numpy as np
import pytest
import torch

from diffusers_med3d import (
    SliceReward,
    SliceRewardModel,
    VolumeRewardModel,
    WitnessReward,
    WitnessRewardModel,
)
from diffusers_med3d.metrics import kid, polynomial_kernel
from diffusers_med3d.models.witness import gaussian_kernel, median_distance, witness
from diffusers_med3d.rewards import StatefulReward, load_reward


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)) + shift


def volumes(seed: int, count: int, side: int = 16, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.rand(count, 1, side, side, side, generator=torch.Generator().manual_seed(seed))


def model(extractor: str = "3d", **options) -> WitnessRewardModel:
    torch.manual_seed(1)
    network = {
        "3d": lambda: VolumeRewardModel(channels=(8, 8), norm_num_groups=4),
        "2d": lambda: SliceRewardModel(channels=(8, 8), norm_num_groups=4, num_slices=3, compare_sides=True),
        "haar": lambda: "haar",
    }[extractor]()
    side = 32 if extractor == "haar" else 16
    return WitnessRewardModel.of_scans(network, volumes(0, 6, side), **options)


def test_the_witness_function_is_the_sum_of_its_definition():
    x, real, generated = features(0, 3), features(1, 4), features(2, 5, 1.0)
    found = witness(x, real, generated, lambda a, b: gaussian_kernel(a, b, 1.5))

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * 1.5**2))

    for value, row in zip(found, x.double().numpy(), strict=True):
        terms = [np.mean([k(row, other) for other in group.double().numpy()]) for group in (real, generated)]
        assert value.item() == pytest.approx(terms[0] - terms[1], abs=1e-6)
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(real.numpy()) for b in real.numpy()[:i]]
    assert min(pairs) < median_distance(real) < max(pairs)


def test_the_means_of_the_cubic_witness_differ_by_the_kid():
    """With every vector left out of its own sum the difference of the two means is the unbiased estimate."""
    real, generated = features(1, 7), features(2, 9, 0.5)

    def mean(one, other):
        rest = [torch.cat([one[:i], one[i + 1 :]]) for i in range(len(one))]
        values = [witness(one[i : i + 1], rest[i], other, polynomial_kernel) for i in range(len(one))]
        return torch.cat(values).double().mean().item()

    assert mean(real, generated) + mean(generated, real) == pytest.approx(kid(real, generated).value, rel=1e-5)


def test_equal_scans_have_no_bandwidth():
    with pytest.raises(ValueError, match="median distance 0.0; expected several that differ"):
        median_distance(torch.ones(4, 3))


@pytest.mark.parametrize("extractor", ["3d", "2d", "haar"])
def test_scans_score_above_samples_and_more_so_the_more_samples_were_seen(extractor):
    made, side = model(extractor), 32 if extractor == "haar" else 16
    reward = WitnessReward(made)
    scans, samples = volumes(0, 6, side), volumes(9, 6, side, scale=0.3)
    gaps = []
    for _ in range(2):
        gaps.append((reward(scans).mean() - reward(samples).mean()).item())
        reward.update(samples, class_label=[0] * 6)
    assert 0 < gaps[0] < gaps[1]


def test_the_buffer_holds_the_newest_samples_and_none_that_is_not_finite():
    reward = WitnessReward(model(buffer_size=4), batch_size=2)
    first, second = volumes(1, 3), volumes(2, 3)
    second[1, 0, 0, 0, 0] = torch.nan
    reward.update(first)
    reward.update(second)
    expected = reward.model.features(torch.cat([first[1:], second[[0, 2]]]))
    torch.testing.assert_close(reward.model.samples, expected)
    assert reward(second).isnan().tolist() == [False, True, False]


def test_state_is_taken_back_bit_for_bit_and_of_its_own_size_only():
    reward, other = WitnessReward(model()), WitnessReward(model())
    reward.update(volumes(3, 5))
    assert isinstance(reward, StatefulReward) and not isinstance(SliceReward, StatefulReward)
    other.load_state_dict(reward.state_dict())
    assert torch.equal(reward(volumes(4, 3)), other(volumes(4, 3)))
    with pytest.raises(ValueError, match=r"shape \(8, .*the saved one \(256, "):
        WitnessReward(model(buffer_size=8)).load_state_dict(reward.state_dict())


@pytest.mark.parametrize("extractor", ["2d", "haar"])
def test_it_is_saved_and_loaded_as_a_reward_with_features_and_no_scans(tmp_path, extractor):
    side = 32 if extractor == "haar" else 16
    made = model(extractor, kernel="cubic", buffer_size=10)
    WitnessReward(made).update(volumes(5, 4, side))
    made.save_pretrained(tmp_path / "witness")
    assert sorted(p.name for p in (tmp_path / "witness").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = load_reward(str(tmp_path / "witness"))
    assert isinstance(loaded, WitnessReward)
    assert torch.equal(loaded(volumes(6, 2, side)), WitnessReward(made)(volumes(6, 2, side)))
    with pytest.raises(ValueError, match="saved by WitnessRewardModel, not by SliceRewardModel; use WitnessReward"):
        SliceReward.from_pretrained(str(tmp_path / "witness"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel": "rbf"}, r"kernel must be one of \('gaussian', 'cubic'\), got 'rbf'"),
        ({"buffer_size": 0}, "must be at least 1, got 2, 1, 0"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_what_is_no_extractor_is_refused():
    with pytest.raises(ValueError, match="a reward model or 'haar', got 'vgg'"):
        WitnessRewardModel.of_scans("vgg", volumes(0, 3))
