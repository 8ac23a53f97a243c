"""best_of: the best of several samples by a reward."""

import numpy as np
import pytest
import torch

from diffusers_med3d.pipelines.best_of import choose


def brightness(volumes, **conditions):
    return volumes.flatten(1).mean(1)


def asked(pipeline, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    return pipeline(class_labels=["young", "old"], num_inference_steps=2, generator=generators, **options)


def test_the_best_of_three_successive_samples_of_each_place_is_kept(tiny_pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    each = [
        tiny_pipeline(class_labels=["young", "old"], num_inference_steps=2, generator=generators).volumes
        for _ in range(3)
    ]
    every = torch.stack([brightness(volumes) for volumes in each], dim=1)
    assert (every.argmax(1) > 0).any()
    expected = torch.stack([each[best][place] for place, best in enumerate(every.argmax(1))])
    output = asked(tiny_pipeline, best_of=3, reward=brightness)
    torch.testing.assert_close(output.scores, every)
    assert torch.equal(output.volumes, expected)
    alone = asked(tiny_pipeline, reward=brightness)  # is scored, and nothing is chosen
    assert torch.equal(alone.volumes, each[0]) and torch.equal(alone.scores, every[:, :1])
    assert asked(tiny_pipeline, best_of=np.int64(3), reward=brightness, output_type="np").volumes.shape == (
        2,
        1,
        16,
        16,
        16,
    )


def test_the_reward_is_told_what_was_asked_for(tiny_pipeline):
    seen = []

    def reward(volumes, class_label):
        seen.append(class_label)
        return [None, 1.0]

    with pytest.warns(UserWarning, match="none of the 2 samples for 1 of 2 volumes: the first was kept"):
        output = asked(tiny_pipeline, best_of=2, reward=reward)
    assert seen == [["young", "old"]] * 2
    assert output.scores.isnan().tolist() == [[True, True], [False, False]]
    with pytest.warns(UserWarning, match="scored none"):
        tiny_pipeline(num_samples=2, class_labels=1, num_inference_steps=2, best_of=2, reward=reward)
    assert seen[-1] == [1, 1]


def test_a_sample_without_a_score_is_kept_only_where_no_other_has_one():
    values = iter([[torch.nan, 1.0, torch.nan], [0.5, torch.nan, torch.nan], [0.4, 2.0, torch.nan]])
    numbers = iter([0.0, 1.0, 2.0])
    with pytest.warns(UserWarning, match="none of the 3 samples for 1 of 3 volumes"):
        best, _ = choose(
            lambda: torch.full((3, 1, 2, 2, 2), next(numbers)), lambda volumes: torch.tensor(next(values)), 3, {}
        )
    assert best[:, 0, 0, 0, 0].tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"best_of": 2}, "needs a reward to choose by, .* got None"),
        ({"best_of": 2, "reward": "brain-t1-reward-2d"}, "got 'brain-t1-reward-2d'. .*load_reward makes one"),
        ({"best_of": 0, "reward": brightness}, "must be a whole number of at least 1, got 0"),
        ({"best_of": 1.5, "reward": brightness}, "must be a whole number of at least 1, got 1.5"),
        (
            {"best_of": 2, "reward": lambda volumes: volumes},
            r"cannot be called .* conditions \['class_label'\]",
        ),
        ({"best_of": 2, "reward": brightness, "output_type": "latent"}, "give no latents and ask for none"),
        ({"best_of": 2, "reward": lambda volumes, **_: 3.0}, "returned 3.0 for 2 volumes; expected 2 numbers"),
    ],
)
def test_what_cannot_choose_is_refused(tiny_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        asked(tiny_pipeline, **options)
