"""Reward models and reward callables: what goes in, what comes out, what is refused."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffusers_med3d.models.reward import SliceRewardModel, VolumeRewardModel, box_filter, mirror
from diffusers_med3d.rewards.learned import SliceReward, VolumeReward

TINY = {"channels": (8, 16), "norm_num_groups": 4, "compare_sides": True}
MODELS = pytest.mark.parametrize("model_class", [VolumeRewardModel, SliceRewardModel])
PAIRS = pytest.mark.parametrize(
    ("model_class", "reward_class"), [(VolumeRewardModel, VolumeReward), (SliceRewardModel, SliceReward)]
)


def tiny(model_class, **kwargs):
    torch.manual_seed(5)
    return model_class(**TINY, **kwargs).eval()


def first_features(member, slices, axis):
    """What the head of a member is given."""
    kept = []
    handle = member.head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    member(slices, axis)
    handle.remove()
    return kept[0].detach()


@MODELS
def test_a_model_scores_every_volume_and_sees_what_is_in_it(model_class, tiny_volumes):
    scores = tiny(model_class)(tiny_volumes)
    assert scores.shape == (3,)
    assert scores.unique().numel() == 3


@MODELS
def test_the_score_is_the_mean_of_members_that_differ(model_class, tiny_volumes):
    model = tiny(model_class, num_members=3)
    members = model(tiny_volumes, return_members=True)
    assert members.shape == (3, 3)
    assert (members.std(1) > 1e-4).all()
    torch.testing.assert_close(model(tiny_volumes), members.mean(1))


@MODELS
@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 12, 20)])
def test_every_parameter_gets_a_gradient_at_any_size(model_class, shape):
    model = tiny(model_class).train()
    model(torch.rand(2, 1, *shape)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    # a bias in front of a GroupNorm with groups of one channel could be dead; none is here
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


@MODELS
def test_a_score_does_not_depend_on_the_batch(model_class, tiny_volumes):
    model = tiny(model_class)
    alone = torch.cat([model(volume[None]) for volume in tiny_volumes])
    torch.testing.assert_close(model(tiny_volumes), alone, atol=1e-5, rtol=0)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


@MODELS
def test_channels_of_a_volume_are_not_mixed_up_with_the_batch(model_class):
    model = tiny(model_class, in_channels=2)
    volumes = torch.rand(2, 2, 16, 16, 16)
    assert model(volumes).shape == (2,)
    assert not torch.allclose(model(volumes), model(volumes.flip(1)))


@MODELS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v[0], r"\(B, C, X, Y, Z\)"),
        (lambda v: v.repeat(1, 2, 1, 1, 1), "1 channel"),
        (lambda v: v[:, :, :4], "too small.*nearest that fits is"),
        (lambda v: v * 2 - 0.5, r"\[0, 1\], got values from -0.5"),
        (lambda v: (v * 255).to(torch.uint8), "uint8"),
        (lambda v: torch.where(v > 0.5, torch.nan, v), "NaN"),
        (lambda v: v[:0], "no sample"),
    ],
)
def test_unusable_volumes_are_refused_with_the_value_found(model_class, spoil, message, tiny_volumes):
    with pytest.raises(ValueError, match=message):
        tiny(model_class)(spoil(tiny_volumes))


@MODELS
@pytest.mark.parametrize(
    "wrong", [{"channels": (8, 15)}, {"channels": ()}, {"num_members": 0}, {"norm_num_groups": 3, "channels": (8,)}]
)
def test_an_impossible_architecture_is_refused(model_class, wrong):
    with pytest.raises(ValueError, match="got"):
        model_class(**{**TINY, **wrong})


@pytest.mark.parametrize("wrong", [{"num_slices": 0}, {"mass_margin": 0.5}])
def test_impossible_slices_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        SliceRewardModel(**TINY, **wrong)


def test_slices_cross_each_axis_inside_the_anatomy():
    model = tiny(SliceRewardModel, num_slices=4)
    volume = torch.zeros(1, 1, 20, 24, 28)
    volume[:, :, 2:8, 10:20, 4:26] = 0.5  # off-centre, so that a slice at a fixed place would miss it
    for axis, (first, last) in enumerate([(2, 8), (10, 20), (4, 26)]):
        positions = model.slice_positions(volume, axis)[0]
        assert ((positions >= first) & (positions < last)).all()
        assert positions.unique().numel() == 4
        expected = volume[0].movedim(1 + axis, 0)[positions]  # (N, C, H, W)
        torch.testing.assert_close(model.slices(volume, axis, positions[None])[0], expected)


def test_slices_move_while_training_and_stay_where_they_are_afterwards():
    model = tiny(SliceRewardModel, num_slices=2)
    volume = torch.rand(1, 1, 32, 32, 32)
    assert torch.equal(model.slice_positions(volume, 0), model.slice_positions(volume, 0))
    model.train()
    assert len({tuple(model.slice_positions(volume, 0)[0].tolist()) for _ in range(20)}) > 5


def test_the_slice_model_knows_which_axis_a_slice_crosses():
    model = tiny(SliceRewardModel, num_members=1)
    inputs = torch.rand(2, 3, 16, 16)
    scores = [model.members[0](inputs, axis) for axis in range(3)]
    assert not torch.allclose(scores[0], scores[1]) and not torch.allclose(scores[1], scores[2])


def test_before_training_the_axis_does_not_drown_what_a_slice_shows():
    torch.manual_seed(0)
    model = SliceRewardModel(num_members=1).eval()
    member = model.members[0]
    slices = torch.rand(8, 1, 32, 32)
    inputs, pale = (model._inputs(images, None) for images in (slices, 0.5 + 0.5 * (slices - 0.5)))
    features = [member.head[0](pooled) for pooled in (first_features(member, inputs, axis) for axis in range(3))]
    by_axis = torch.stack(features).std(0).mean()
    by_image = member.head[0](first_features(member, pale, 0)).sub(features[0]).abs().mean()
    assert by_axis < 0.5 * by_image


def test_the_mirror_stands_in_the_middle_of_the_anatomy_not_of_the_grid():
    volume = torch.zeros(2, 1, 20, 8, 8)
    half = torch.rand(1, 4, 8, 8) + 0.1
    volume[0, :, 3:11] = torch.cat([half, half.flip(1)], dim=1)  # symmetric, off-centre
    volume[1, :, 9:13] = half
    mirrored = mirror(volume)
    assert torch.equal(mirrored[0], volume[0])
    assert torch.equal(mirrored[1:], mirror(volume[1:])), "a mirror image depends on the batch"
    assert not torch.equal(mirrored[1], volume[1]) and torch.equal(mirror(mirrored)[1], volume[1])
    assert mirrored[1].sum() == pytest.approx(volume[1].sum().item(), rel=1e-5)
    edge = torch.zeros(1, 1, 6, 4, 4)
    edge[:, :, 0], edge[:, :, 5] = 1.0, 0.2  # the centre is near the first plane: what falls off the grid is lost
    assert torch.equal(mirror(edge)[0, 0, :, 0, 0], torch.tensor([0.0, 0, 1, 0, 0, 0]))


@MODELS
def test_a_model_that_compares_the_sides_sees_nothing_new_in_symmetry_and_something_in_disagreement(model_class):
    model = tiny(model_class)
    half = torch.rand(1, 1, 8, 16, 16)
    symmetric = torch.cat([half, half.flip(2)], dim=2)
    swapped = torch.cat([half, torch.rand(1, 1, 8, 16, 16)], dim=2)
    differences = []
    for volumes in (symmetric, swapped):
        seen = []
        model.members[0].stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # noqa: B023
        model(volumes)
        differences.append(torch.cat([inputs[:, 2].flatten() for inputs in seen]))
    assert (differences[0] == 0).all() and (differences[1] != 0).any()


@pytest.mark.parametrize("shape", [(2, 3, 7, 8, 9), (2, 3, 7, 8)])
def test_the_box_filter_is_the_mean_of_three_voxels_along_each_axis(shape):
    images = torch.rand(shape)
    pool = torch.nn.AvgPool3d(3, 1, 1) if len(shape) == 5 else torch.nn.AvgPool2d(3, 1, 1)
    torch.testing.assert_close(box_filter(images), pool(images))


@MODELS
def test_an_empty_volume_has_a_finite_score(model_class):
    assert torch.isfinite(tiny(model_class)(torch.zeros(1, 1, 16, 16, 16))).all()


@MODELS
def test_gradient_checkpointing_saves_memory_and_leaves_the_gradient_alone(model_class):
    volumes = torch.rand(2, 1, 16, 16, 16)
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = tiny(model_class)
        if checkpointing:
            model.enable_gradient_checkpointing()
        stored = []
        with saved_tensors_hooks(lambda t: stored.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            loss = model(volumes).sum()
        loss.backward()
        kept.append(sum(stored))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_bundled_size_is_small():
    weights = sum(p.numel() for model in (VolumeRewardModel(), SliceRewardModel()) for p in model.parameters())
    assert 2 * weights < 6e6  # bytes in half precision


@PAIRS
def test_a_saved_reward_scores_as_before(model_class, reward_class, tiny_volumes, tmp_path):
    model = tiny(model_class)
    expected = model(tiny_volumes)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")]
    reward = reward_class.from_pretrained(str(tmp_path))
    torch.testing.assert_close(reward(tiny_volumes, class_label=[0, 1, 2]), expected.detach())


@PAIRS
def test_a_reward_stored_in_half_precision_is_computed_in_float32(model_class, reward_class, tiny_volumes, tmp_path):
    model = tiny(model_class)
    expected = model(tiny_volumes).detach()
    model.half().save_pretrained(tmp_path)
    reward = reward_class.from_pretrained(str(tmp_path))
    assert reward.model.dtype == torch.float32
    torch.testing.assert_close(reward(tiny_volumes), expected, atol=5e-3, rtol=0)
    assert reward_class.from_pretrained(str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16


@PAIRS
def test_a_reward_is_frozen_without_gradient_and_deaf_to_autocast(model_class, reward_class, tiny_volumes):
    reward = reward_class(tiny(model_class).train(), batch_size=2)
    plain = reward(tiny_volumes.requires_grad_())
    assert not plain.requires_grad and not reward.model.training
    assert not any(p.requires_grad for p in reward.model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(tiny_volumes), plain)
    assert reward.__name__ == reward_class.__name__


@PAIRS
def test_a_volume_that_cannot_be_scored_gets_nan_and_the_others_their_score(model_class, reward_class, tiny_volumes):
    reward = reward_class(tiny(model_class), batch_size=2)
    expected = reward(tiny_volumes)
    broken = tiny_volumes.clone()
    broken[1, 0, 3, 3, 3] = torch.inf
    scores = reward(broken)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=0)


@PAIRS
def test_a_reward_refuses_the_wrong_rank_batch_size_and_model(model_class, reward_class, tiny_volumes):
    with pytest.raises(ValueError, match=r"\(B, C, X, Y, Z\)"):
        reward_class(tiny(model_class))(tiny_volumes[0])
    with pytest.raises(ValueError, match="batch_size"):
        reward_class(tiny(model_class), batch_size=0)
    with pytest.raises(TypeError, match=model_class.__name__):
        reward_class(torch.nn.Identity())


def test_an_unknown_bare_name_is_refused():
    with pytest.raises(ValueError, match="no-such-reward"):
        VolumeReward.from_pretrained("no-such-reward")
