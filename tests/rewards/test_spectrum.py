"""Labels, order, damage and loss of the spectrum that reward models learn from."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_med3d.data.transforms import FOREGROUND_THRESHOLD, shift_volume
from diffusers_med3d.rewards.damage import (
    DAMAGE_NAMES,
    DAMAGES,
    HALF_SWAP,
    HALF_SWAP_SEVERITY,
    augment,
    bias_field,
    brightness,
    clear_haze,
    contrast,
    damage,
    gaussian_smooth,
    mirror_hemisphere,
    nearest_in_brightness,
    swap_hemisphere,
)
from diffusers_med3d.rewards.spectrum import (
    REAL,
    check_strengths,
    clean_label,
    damaged_label,
    dominance,
    neighbours_in_order,
    partial_noising,
    rank_correlation,
    spectrum_loss,
)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def brain(number=0, side=24):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 3, indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.7
    texture = gaussian_smooth(torch.randn((1, side, side, side), generator=seed(number)), 0.7)
    return torch.where(inside, (0.5 + 0.6 * texture).clamp(0.05, 0.95), 0.0)


def high_frequency(volume):
    return (volume - gaussian_smooth(volume, 1.0)).square().mean().item()


# --------------------------------------------------------------------------------------------------- labels and order


def test_labels_fall_from_real_over_round_trip_to_full_sample_and_damage_is_below_the_round_trip():
    labels = [clean_label(s) for s in (REAL, 0.0, 0.1, 0.5, 0.9, 1.0)]
    assert labels == sorted(labels, reverse=True) and len(set(labels)) == 6
    assert labels[0] == 1.0 and labels[1] == 0.95
    for strength in (REAL, 0.0, 0.5, 1.0):
        damaged = [damaged_label(strength, severity) for severity in (0.2, 0.5, 1.0)]
        assert damaged == sorted(damaged, reverse=True)
        assert damaged[0] < clean_label(max(strength, 0.0))
    assert damaged_label(1.0, 0.5) > 0  # a damaged sample can still fall further
    with pytest.raises(ValueError, match="1.2"):
        clean_label(1.2)


def test_only_what_is_beyond_doubt_is_ranked():
    #         real   round  half   half+blur .3  real+blur .3  real+blur .6  real+noise .6
    strengths = torch.tensor([REAL, 0.0, 0.5, 0.5, REAL, REAL, REAL])
    severities = torch.tensor([0, 0, 0, 0.3, 0.3, 0.6, 0.6])
    kinds = torch.tensor([-1, -1, -1, 0, 0, 0, 1])
    expected = torch.tensor(
        [
            [0, 1, 1, 1, 1, 1, 1],  # the scan beats everything
            [0, 0, 1, 1, 1, 1, 1],  # the round-trip everything but the scan, damaged scans included
            [0, 0, 0, 1, 0, 0, 0],  # a partial noising its own damage; against a damaged scan nobody knows
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 1, 0],  # less noise under the same damage, less damage of the same kind
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ]
    ).bool()
    assert torch.equal(dominance(strengths, severities, kinds), expected)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", DAMAGE_NAMES)
@pytest.mark.parametrize("severity", [0.2, 1.0])
def test_damage_changes_the_volume_and_keeps_shape_range_and_what_lies_outside(kind, severity):
    volume, other = brain(0), brain(1)
    before = volume.clone()
    damaged = damage(volume, kind, severity, seed(), other)
    assert damaged.shape == volume.shape and damaged.dtype == volume.dtype
    assert (damaged - volume).abs().mean() > 1e-3
    assert damaged.min() >= 0 and damaged.max() <= 1 and torch.isfinite(damaged).all()
    assert torch.equal(volume, before), "the input was changed in place"
    outside = (volume == 0) & (other == 0)
    if kind == HALF_SWAP:  # the foreign half may lie two voxels beside its place
        outside = (volume == 0) & (F.max_pool3d(other[None], 5, 1, 2)[0] == 0)
    if kind == "shuffle_blocks":  # a block of the rim brings its own background along, but never leaves the brain's box
        outside = outside & False
        outside[:, 0], outside[:, -1] = True, True
    assert (damaged[outside] == 0).all()


@pytest.mark.parametrize("kind", DAMAGE_NAMES)
def test_the_same_seed_gives_the_same_damage(kind):
    volume, other = brain(0), brain(1)
    first, again = (damage(volume, kind, 0.5, seed(3), other) for _ in range(2))
    assert torch.equal(first, again)
    drawn = kind not in ("blur", "oversharpen")
    others = [damage(volume, kind, 0.5, seed(number), other) for number in range(4, 10)]
    assert any(not torch.equal(first, damaged) for damaged in others) == drawn


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_more_severe_damage_changes_more(kind):
    volume = brain(0)
    change = [
        sum((damage(volume, kind, severity, seed(n)) - volume).abs().mean().item() for n in range(4))
        for severity in (0.2, 0.6, 1.0)
    ]
    assert change[0] < change[1] < change[2]


def test_blur_takes_fine_detail_away_and_noise_and_sharpening_add_it():
    volume = brain(0)
    power = {kind: high_frequency(damage(volume, kind, 0.5, seed())) for kind in DAMAGES}
    assert power["blur"] < 0.7 * high_frequency(volume)
    assert power["noise"] > 1.1 * high_frequency(volume)
    assert power["oversharpen"] > 1.5 * high_frequency(volume)
    assert power["thick_slices"] < high_frequency(volume)
    assert power["noisy_blur"] > 2 * power["blur"]


def test_blocks_change_places_without_losing_a_voxel():
    volume = brain(0)
    shuffled = damage(volume, "shuffle_blocks", 1.0, seed())
    assert torch.equal(shuffled.flatten().sort().values, volume.flatten().sort().values)


def test_a_cut_removes_the_outer_part_on_one_side_only():
    volume = brain(0)
    removed = (volume > FOREGROUND_THRESHOLD) & (damage(volume, "cut_off", 0.5, seed()) == 0)
    assert 0.02 < removed.sum() / (volume > FOREGROUND_THRESHOLD).sum() < 0.5
    spans = [int(removed.amax([d for d in range(4) if d != 1 + axis]).sum()) for axis in range(3)]
    assert min(spans) == 5 or min(spans) == 6  # 30 % of about 19 occupied planes


@pytest.mark.parametrize("shift", [0, 3])
def test_a_half_swap_joins_the_hemispheres_of_two_subjects_near_the_midline(shift):
    volume, other = brain(0), 0.6 * brain(1)
    moved = shift_volume(other, (shift, 0, 0))  # the other subject's midline lies elsewhere
    seams, places, middle = set(), set(), volume.shape[1] // 2
    for number in range(12):
        swapped = swap_hemisphere(volume, moved, seed(number))
        own = (swapped == volume).all(dim=(0, 2, 3)).tolist()
        if own[-1] and not own[middle - 5]:  # the right half is the subject's own: turn it to the left
            own, swapped, reference, source = own[::-1], swapped.flip(1), volume.flip(1), other.flip(1)
        else:
            reference, source = volume, other
        seam = own.index(False)
        seams.add(seam - middle)
        foreign = swapped[:, seam:]
        overlap = {
            by: torch.corrcoef(torch.stack([foreign.flatten(), shift_volume(source, by)[:, seam:].flatten()]))[
                0, 1
            ].item()
            for by in itertools.product(range(-2, 3), repeat=3)
        }
        place = max(overlap, key=overlap.get)
        places.add(place)
        assert overlap[place] > 0.97, "what stands there is not the other subject"
        assert brightness(foreign) == pytest.approx(brightness(reference[:, seam:]), rel=0.02)
    assert min(seams) >= -3 and max(seams) <= 3 and len(seams) > 3
    assert len(places) > 6
    assert damaged_label(REAL, HALF_SWAP_SEVERITY) < clean_label(0.0)


def test_a_mirrored_half_makes_a_volume_symmetric_and_keeps_one_side():
    volume = shift_volume(brain(0), (2, 0, 0))
    symmetric = [mirror_hemisphere(volume, seed(number)) for number in range(6)]
    middle = 14
    for one in symmetric:
        torch.testing.assert_close(one[:, middle : middle + 10], one[:, middle - 10 : middle].flip(1))
    kept = {(one[:, :middle] == volume[:, :middle]).all().item() for one in symmetric}
    assert kept == {True, False}


def test_the_partner_of_a_half_swap_is_the_subject_of_nearest_brightness():
    light = torch.tensor([brightness(scale * brain(0)) for scale in (1.0, 0.3, 0.85, 0.5)])
    assert [nearest_in_brightness(light, torch.arange(4), scan) for scan in range(4)] == [2, 3, 0, 1]
    of_one = torch.tensor([0, 1, 0, 1])  # scans 0 and 2 are of one subject, 1 and 3 of another
    assert [nearest_in_brightness(light, of_one, scan) for scan in range(4)] == [3, 2, 3, 2]
    assert brightness(torch.zeros(1, 4, 4, 4)) == 0


def test_a_bias_field_has_its_amplitude_where_the_anatomy_is():
    volume = 0.5 * brain(0, side=32)
    for severity, wanted in ((0.3, 0.44), (1.0, 1.0)):
        for number in range(3):
            changed = bias_field(volume, severity, seed(number))
            inside = (volume > FOREGROUND_THRESHOLD) & (changed < 1)
            log_field = (changed[inside] / volume[inside]).log()
            spread = log_field.max() - log_field.min()  # the mean of 1 takes a constant away
            assert 0.9 * wanted < spread < 2.01 * wanted
            assert changed.mean() == pytest.approx(volume.mean().item(), rel=0.05)


def test_contrast_is_stretched_or_pressed_together_about_the_mean_of_the_anatomy():
    volume = 0.3 + 0.4 * brain(0)
    volume[brain(0) <= FOREGROUND_THRESHOLD] = 0
    inside = volume > FOREGROUND_THRESHOLD
    ratios = []
    for number in range(8):
        changed = contrast(volume, 0.5, seed(number))
        assert brightness(changed) == pytest.approx(brightness(volume), abs=0.02)
        ratios.append((changed[inside].std() / volume[inside].std()).item())
    stretch = math.exp(0.26 + 0.84 * 0.5)
    assert min(ratios) == pytest.approx(1 / stretch, rel=0.01)
    assert 1.5 < max(ratios) <= stretch * 1.001  # what leaves [0, 1] is clipped


def test_damage_of_an_empty_volume_is_finite():
    empty = torch.zeros(1, 16, 16, 16)
    for kind in DAMAGE_NAMES:
        assert torch.isfinite(damage(empty, kind, 0.5, seed(), empty)).all(), kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blur", 0.0), "severity"),
        (("blur", 1.5), "1.5"),
        (("melt", 0.5), "melt.*expected one of"),
        ((HALF_SWAP, 0.5), "another subject"),
    ],
)
def test_impossible_damage_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        damage(brain(), *arguments, seed())
    with pytest.raises(ValueError, match="shape"):
        damage(brain()[0], "blur", 0.5, seed())


# ------------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_keeps_range_background_and_seed_and_moves_the_rest():
    volume = brain(0)
    augmented = [augment(volume, seed(n)) for n in range(6)]
    assert torch.equal(augmented[0], augment(volume, seed(0)))
    for one in augmented:
        assert one.min() >= 0 and one.max() <= 1 and one.shape == volume.shape
        assert (one == 0).float().mean() >= (volume == 0).float().mean() - 0.02
        assert not torch.equal(one, volume)


def test_the_haze_that_gives_a_decoder_away_is_cleared_in_half_of_the_cases():
    hazy = (brain(0) + 0.001).clamp(0, 1)
    cleared = [clear_haze(hazy, seed(n)) for n in range(40)]
    touched = [not torch.equal(one, hazy) for one in cleared]
    assert 10 < sum(touched) < 30
    for one, changed in zip(cleared, touched, strict=True):
        assert torch.equal(one[hazy > 0.03], hazy[hazy > 0.03])
        assert (one[hazy <= 0.001] == 0).all() == changed


def test_a_shift_brings_background_in_and_nothing_around_the_corner():
    volume = torch.rand(1, 8, 8, 8) + 0.1
    shifted = shift_volume(volume, (2, -1, 0))
    assert (shifted[:, :2] == 0).all() and (shifted[:, :, -1] == 0).all()
    assert torch.equal(shifted[:, 2:, :-1], volume[:, :-2, 1:])


# ------------------------------------------------------------------------------------------------------ loss and order


def test_the_loss_teaches_an_order_within_each_subject_and_the_labels():
    torch.manual_seed(0)
    strengths = torch.tensor([REAL, 0.0, 0.3, 0.6, 1.0])
    labels = torch.tensor([clean_label(float(s)) for s in strengths]).repeat(2)
    better = torch.block_diag(*[dominance(strengths, torch.zeros(5), -torch.ones(5))] * 2).bool()
    scores = torch.nn.Parameter(0.01 * torch.randn(10))
    optimizer = torch.optim.Adam([scores], 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        regression, ranking = spectrum_loss(scores, labels, better, temperature=0.1)
        (regression + 0.2 * ranking).backward()
        optimizer.step()
    for subject in scores.detach().view(2, 5):
        assert rank_correlation(subject, strengths) == pytest.approx(1.0)
    assert (scores - labels).abs().max() < 0.15


def test_ranking_alone_orders_and_has_no_opinion_across_subjects():
    strengths = torch.tensor([REAL, 0.0, 1.0])
    better = torch.block_diag(*[dominance(strengths, torch.zeros(3), -torch.ones(3))] * 2).bool()
    scores = torch.zeros(6, requires_grad=True)
    spectrum_loss(scores, torch.zeros(6), better, 0.1)[1].backward()
    assert (scores.grad.view(2, 3)[:, 0] < 0).all() and (scores.grad.view(2, 3)[:, 2] > 0).all()
    _, before = spectrum_loss(scores.detach(), torch.zeros(6), better, 0.1)
    moved = scores.detach() + torch.tensor([0, 0, 0, 5.0, 5.0, 5.0])
    torch.testing.assert_close(spectrum_loss(moved, torch.zeros(6), better, 0.1)[1], before)


def test_the_margin_asked_for_grows_with_the_difference_of_the_labels():
    better = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 0]]).bool()  # a round-trip, lightly and heavily damaged
    labels = torch.tensor([0.95, 0.85, 0.25])
    scores = torch.tensor([0.9, 0.7, 0.7], requires_grad=True)
    spectrum_loss(scores, labels, better, 0.1)[1].backward()
    assert scores.grad[2] > 2 * scores.grad[1] > 0  # the same score is worse for the heavier damage
    without, with_margin = (spectrum_loss(scores.detach(), labels, better, 0.1, margin)[1] for margin in (0.0, 1.0))
    gaps, wanted = torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.7])
    torch.testing.assert_close(without, torch.log1p(torch.exp(-gaps / 0.1)).mean())
    torch.testing.assert_close(with_margin, torch.log1p(torch.exp((wanted - gaps) / 0.1)).mean())


def test_a_batch_without_pairs_has_no_ranking_loss_and_a_gradient():
    scores = torch.zeros(2, requires_grad=True)
    regression, ranking = spectrum_loss(scores, torch.ones(2), torch.zeros(2, 2).bool(), 0.1)
    assert ranking == 0
    (regression + ranking).backward()
    assert (scores.grad < 0).all()


def test_rank_correlation_is_one_for_falling_minus_one_for_rising_and_zero_for_constant_scores():
    strengths = torch.tensor([0.0, 0.3, 0.6, 1.0])
    assert rank_correlation(torch.tensor([9.0, 3.0, 2.0, 1.0]), strengths) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2.0, 3.0, 9.0]), strengths) == pytest.approx(-1)
    assert rank_correlation(torch.ones(4), strengths) == 0
    assert rank_correlation(torch.tensor([2.0, 2.0, 1.0, 0.0]), strengths) == pytest.approx(0.9487, abs=1e-4)


def test_neighbours_count_in_order_of_strength_and_ties_do_not_count():
    strengths = torch.tensor([1.0, 0.0, 0.5])
    assert neighbours_in_order(torch.tensor([0.1, 0.9, 0.5]), strengths) == 1
    assert neighbours_in_order(torch.tensor([0.5, 0.9, 0.5]), strengths) == 0.5
    with pytest.raises(ValueError, match="at least two"):
        neighbours_in_order(torch.ones(1), torch.ones(1))


# ---------------------------------------------------------------------------------------------------- partial noising


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ([0, 0.1, 1], "strength 0.1 is no more than half of one of 5 steps; take more denoising steps, at least 6,"),
        ([0.2, 1], r"must be 0 \(round-trip\) and others up to 1, or 1 alone, got \[0.2, 1\]"),
        ([0, 1.2], r"got \[0, 1.2\]"),
    ],
)
def test_levels_that_no_spectrum_can_be_made_of_are_refused(strengths, message):
    check_strengths([0, 0.11, 1], 5)
    check_strengths([1.0], 1)
    with pytest.raises(ValueError, match=message):
        check_strengths(strengths, 5)


def test_strength_zero_is_the_round_trip_and_a_version_depends_on_its_own_generator_only(tiny_pipeline, tiny_volumes):
    def noised(rows, strength):
        generators = [seed(10 + row) for row in rows]
        return partial_noising(tiny_pipeline, tiny_volumes[rows], [0] * len(rows), strength, 4, generators)

    round_trip = tiny_pipeline.vae.decode_latents(tiny_pipeline.vae.encode_latents(tiny_volumes)).detach()
    torch.testing.assert_close(noised([0, 1, 2], 0.0), round_trip, atol=1e-5, rtol=0)
    for strength in (0.5, 1.0):
        together = noised([0, 1, 2], strength)
        torch.testing.assert_close(together[1:2], noised([1], strength), atol=1e-4, rtol=0)
        assert (together - round_trip).abs().mean() > 1e-3
        assert together.min() >= 0 and together.max() <= 1


def test_a_full_sample_never_sees_the_scan(tiny_pipeline, tiny_volumes):
    made = [partial_noising(tiny_pipeline, tiny_volumes[i : i + 1], [0], 1.0, 4, [seed(1)]) for i in (0, 1)]
    assert torch.equal(*made)
    half = [partial_noising(tiny_pipeline, tiny_volumes[i : i + 1], [0], 0.5, 4, [seed(1)]) for i in (0, 1)]
    assert not torch.equal(*half)
