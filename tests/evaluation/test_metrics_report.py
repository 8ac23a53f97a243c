"""metrics.evaluate: sets of synthetic volumes whose right answer is known."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from diffusers_med3d.evaluation import VolumeSet, check_scans, evaluate
from diffusers_med3d.evaluation.evaluate import _seen_scans
from diffusers_med3d.evaluation.sets import Sets
from diffusers_med3d.metrics import (
    NamedExtractor,
    ScatteringFeatures,
    bootstrap_weights,
    features_of,
    intensity_tissues,
    interior_spectrum,
    kid,
    left_right_symmetry,
    ms_ssim,
    sharpness,
)

SIZE = 16


def volume(seed: int, label: int, blurred: bool = False) -> torch.Tensor:
    """(1, 16, 16, 16): a ball whose size depends on the class, with texture and noise."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    waves = torch.randn(6, 3, generator=g) * 6
    texture = torch.einsum("wa,axyz->wxyz", waves, grid).sin().mean(0)
    noise = 0.03 * torch.randn(SIZE, SIZE, SIZE, generator=g)
    radius = 0.9 + 0.1 * label + 0.05 * torch.rand((), generator=g)
    made = ((0.5 + 0.3 * texture + noise) * (grid.square().sum(0).sqrt() < radius)).clamp(0, 1)[None]
    return torch.nn.functional.avg_pool3d(made, 3, 1, 1) if blurred else made


def volumes(name: str, count: int, seed: int, blurred: bool = False) -> VolumeSet:
    labels = [i % 2 for i in range(count)]
    made = torch.stack([volume(1000 * seed + i, c, blurred) for i, c in enumerate(labels)])
    return VolumeSet(made, labels, [f"{name}{i}" for i in range(count)])


REFERENCE, TRAIN = volumes("reference", 10, 1), volumes("train", 24, 2)
COARSE = NamedExtractor(lambda v: torch.nn.functional.avg_pool3d(v, 4).flatten(1), "coarse")


@pytest.fixture(scope="module")
def report():
    good, bad = volumes("seed", 10, 3), volumes("seed", 10, 3, blurred=True)
    copied = VolumeSet(TRAIN.volumes[:10].flip(2), TRAIN.labels[:10], good.subjects)
    one = VolumeSet(good.volumes[[0, 1] * 5] + 0.01 * torch.rand(10, 1, SIZE, SIZE, SIZE), good.labels, good.subjects)
    return evaluate(
        {"bad": bad, "good": good, "copies": copied, "collapsed": one},
        REFERENCE,
        TRAIN,
        [ScatteringFeatures(levels=2), COARSE],
        (3.0, 3.0, 3.0),
        intensity_tissues,
        ("dark", "middle", "bright"),
        num_resamples=200,
        neighbours=3,
    )


@pytest.mark.slow
def test_the_excess_of_a_good_model_covers_zero_and_that_of_a_blurred_one_does_not(report):
    excess = report.figure("KID 3D").excess
    assert excess["good"].low < 0 < excess["good"].high
    assert excess["bad"].low > 0 and excess["bad"].value > 10 * abs(excess["good"].value)
    difference = report.figure("KID 3D").differences["good - bad"]
    assert difference.high < 0
    assert difference.value == pytest.approx(excess["good"].value - excess["bad"].value)


@pytest.mark.slow
def test_the_kid_without_classes_is_the_plain_kid_and_the_floor_that_of_the_training_scans():
    unlabelled = [
        VolumeSet(one.volumes, [0] * len(one), one.subjects) for one in (volumes("seed", 10, 3), REFERENCE, TRAIN)
    ]
    figure = evaluate({"m": unlabelled[0]}, unlabelled[1], unlabelled[2], [COARSE], (3, 3, 3), num_resamples=20).figure(
        "KID"
    )
    features = [COARSE(one.volumes) for one in unlabelled]
    assert figure.name == "KID whole" and figure.extractor == "coarse"
    assert figure.sets["m"].value == pytest.approx(kid(features[0], features[1]).value, rel=1e-6)
    assert figure.sets["floor"].value == pytest.approx(kid(features[2], features[1]).value, rel=1e-6)


def numpy_stratified_kid(a, labels_a, names_a, b, labels_b, names_b) -> float:
    """Unbiased KID by loops over pairs of different subjects, every two classes weighted by their shares in b."""
    shares = {c: labels_b.count(c) / len(labels_b) for c in set(labels_b)}

    def mean(x, labels_x, names_x, y, labels_y, names_y) -> float:
        total = 0.0
        for c, p in shares.items():
            for d, q in shares.items():
                values = [
                    (u @ v / len(u) + 1) ** 3
                    for u, cu, nu in zip(x, labels_x, names_x, strict=True)
                    for v, cv, nv in zip(y, labels_y, names_y, strict=True)
                    if (cu, cv) == (c, d) and nu != nv
                ]
                total += p * q * sum(values) / len(values)
        return total

    first, second = (a, labels_a, names_a), (b, labels_b, names_b)
    return mean(*first, *first) + mean(*second, *second) - 2 * mean(*first, *second)


@pytest.mark.slow
def test_every_resample_is_the_figure_of_the_scans_and_samples_drawn_the_same_for_all_models():
    """The draws against the figures of sets in which everybody stands as often as he was drawn."""
    good, bad = volumes("seed", 10, 3), volumes("seed", 10, 3, blurred=True)
    report = evaluate({"good": good, "bad": bad}, REFERENCE, TRAIN, [COARSE], (3, 3, 3), num_resamples=3)
    sets = {"reference": REFERENCE, "floor": TRAIN, "good": good, "bad": bad}
    weights = {name: bootstrap_weights(one.subjects, one.labels, 3) for name, one in sets.items()}
    assert (weights["good"] == weights["bad"]).all() and not (weights["good"] == weights["reference"]).all()
    kid_figure, symmetry = report.figure("KID"), report.figure("left-right symmetry")
    detail = {name: left_right_symmetry(one.volumes).double().numpy() for name, one in sets.items()}
    for row in range(4):
        drawn = {}
        for name, one in sets.items():
            rows = [i for i in range(len(one)) for _ in range(int(weights[name][row, i]))]
            features = COARSE(one.volumes).double().numpy()[rows]
            drawn[name] = (features, [one.labels[i] for i in rows], [one.subjects[i] for i in rows])
            by_class = [np.mean([detail[name][i] for i in rows if one.labels[i] == c]) for c in (0, 1)]
            assert symmetry.draws[name][row] == pytest.approx(np.mean(by_class), rel=1e-6)
        for name in ("floor", "good", "bad"):
            expected = numpy_stratified_kid(*drawn[name], *drawn["reference"])
            assert kid_figure.draws[name][row] == pytest.approx(expected, rel=1e-6)
    difference = kid_figure.draws["bad"] - kid_figure.draws["good"]
    assert kid_figure.differences["bad - good"].stderr == pytest.approx(np.std(difference[1:], ddof=1))
    excess = kid_figure.draws["bad"] - kid_figure.draws["floor"]
    assert kid_figure.excess["bad"].value == pytest.approx(excess[0])
    assert kid_figure.excess["bad"].stderr == pytest.approx(np.std(excess[1:], ddof=1))


def test_similarity_and_spectra_equal_loops_over_pairs_and_shells(report):
    def similarity(one: VolumeSet) -> list[list[float]]:
        """Of every pair of a class, class by class."""
        return [
            [
                ms_ssim(one.volumes[[i]], one.volumes[[j]]).item()
                for i in range(len(one)) for j in range(i)
                if one.labels[i] == one.labels[j] == c
            ]
            for c in (0, 1)
        ]  # fmt: skip

    values = similarity(REFERENCE)
    assert report.figure("MS-SSIM, mean").sets["reference"].value == pytest.approx(
        np.mean([np.mean(own) for own in values]), abs=1e-5
    )
    assert report.figure("MS-SSIM, closest pair").sets["reference"].value == pytest.approx(
        max(max(own) for own in values), abs=1e-5
    )

    def decibels(one: VolumeSet) -> np.ndarray:
        logs = 10 * np.log10(interior_spectrum(one.volumes, bins=8)[1].double().numpy())
        return np.mean([logs[[i for i, own in enumerate(one.labels) if own == c]].mean(0) for c in (0, 1)], axis=0)

    expected = np.abs(decibels(volumes("seed", 10, 3, blurred=True)) - decibels(REFERENCE)).mean()
    assert report.figure("power spectrum").sets["bad"].value == pytest.approx(expected, rel=1e-5)
    assert report.spectra["reference"]["decibel"] == pytest.approx(decibels(REFERENCE).tolist(), rel=1e-5)


@pytest.mark.slow
def test_frechet_and_nearest_neighbours_equal_scipys_on_the_components_and_balls_of_numpy():
    """With as many training scans as samples every draw of the floor is all of them."""
    bad, train = volumes("seed", 10, 3, blurred=True), volumes("train", 10, 2)
    report = evaluate({"bad": bad}, REFERENCE, train, [COARSE], (3, 3, 3), num_resamples=2, neighbours=3)
    features = {
        name: COARSE(one.volumes).double().numpy()
        for name, one in (("floor", train), ("bad", bad), ("reference", REFERENCE))
    }
    directions = np.linalg.eigh(np.cov(features["floor"].T))[1][:, -2:]
    projected = {name: own @ directions for name, own in features.items()}
    real = features["reference"]
    own_balls = np.sort(cdist(real, real), 1)[:, 3]
    for name in ("floor", "bad"):
        a, b = projected[name], projected["reference"]
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert report.figure("Fréchet on 2").sets[name].value == pytest.approx(distance, rel=1e-6)
        between, balls = cdist(features[name], real), np.sort(cdist(features[name], features[name]), 1)[:, 3]
        expected = {
            "precision": (between < own_balls).any(1).mean(),
            "density": (between < own_balls).sum(1).mean() / 3,
            "recall": (between < balls[:, None]).any(0).mean(),
            "coverage": (between.min(0) < own_balls).mean(),
        }
        for measure, value in expected.items():
            assert report.figure(measure).sets[name].value == pytest.approx(value)


def test_copies_are_flagged_collapse_shows_in_the_closest_pair_and_neither_in_the_good_model(report):
    flagged = report.figure("copies flagged").sets
    assert flagged["copies"].value == 1 and flagged["good"].value <= 0.2
    closest = report.figure("MS-SSIM, closest pair").sets
    assert closest["collapsed"].value > 0.99 > closest["good"].value
    mean = report.figure("MS-SSIM, mean").excess
    assert mean["collapsed"].low > 0 and mean["good"].low < 0.02
    recall = report.figure("recall").sets
    assert recall["collapsed"].value < recall["good"].value


def test_detail_is_lost_by_blur_against_the_reference_scans(report):
    for name in ("sharpness", "noise level", "high-frequency power"):
        figure = report.figure(name)
        assert figure.baseline == "reference" and figure.excess["bad"].high < 0
    assert report.figure("high-frequency power").sets["reference"].value == pytest.approx(1)
    spectrum = report.figure("power spectrum")
    assert spectrum.excess["bad"].low > 0
    values = report.per_volume["sharpness"]["good"]
    assert values == pytest.approx(sharpness(volumes("seed", 10, 3).volumes).tolist())
    assert report.figure("sharpness").sets["good"].value == pytest.approx(np.mean(values))


def test_tissue_volumes_are_in_millilitres(report):
    total = sum(report.figure(f"{name} in ml").sets["reference"].value for name in ("dark", "middle", "bright"))
    voxels = (REFERENCE.volumes > 0.05).flatten(1).sum(1).double().mean().item()
    assert total == pytest.approx(voxels * 0.027, rel=1e-5)


@pytest.mark.slow
def test_the_paired_interval_is_narrower_than_that_of_other_seeds():
    shifted = volumes("seed", 10, 3)
    worse = VolumeSet((0.97 * shifted.volumes).clamp(0, 1), shifted.labels, shifted.subjects)
    other = VolumeSet(worse.volumes, worse.labels, [f"other{i}" for i in range(10)])
    figure = evaluate(
        {"a": shifted, "paired": worse, "unpaired": other}, REFERENCE, TRAIN, [COARSE], (3, 3, 3), num_resamples=200
    ).figure("left-right symmetry")
    assert figure.differences["paired - a"].stderr < 0.2 * figure.differences["unpaired - a"].stderr


@pytest.mark.slow
def test_a_version_of_the_reference_scans_is_never_paired_with_its_own_scan():
    version = VolumeSet(REFERENCE.volumes.clone(), REFERENCE.labels, REFERENCE.subjects)
    report = evaluate({"same": version}, REFERENCE, TRAIN, [COARSE], (3, 3, 3), num_resamples=20)
    # with equal sets every mean over pairs of different subjects is the same, so exactly nothing is left
    assert report.figure("KID").sets["same"].value == pytest.approx(0, abs=1e-9)
    assert all("precision" not in figure.name and "Fréchet" not in figure.name for figure in report.figures)
    assert any("without Fréchet" in note for note in report.notes)


@pytest.mark.slow
def test_two_scans_of_one_subject_are_no_pair_and_are_drawn_together():
    twice = VolumeSet(
        torch.cat([REFERENCE.volumes, REFERENCE.volumes]),
        REFERENCE.labels * 2,
        [*REFERENCE.subjects, *REFERENCE.subjects],
    )
    model = {"m": volumes("s", 10, 5)}
    once, doubled = (evaluate(model, one, TRAIN, [COARSE], (3, 3, 3), num_resamples=50) for one in (REFERENCE, twice))
    for name in ("MS-SSIM, closest pair", "MS-SSIM, mean", "KID"):
        for one in ("reference", "m"):
            if one in once.figure(name).sets:
                first, second = once.figure(name).sets[one], doubled.figure(name).sets[one]
                assert second.value == pytest.approx(first.value, rel=1e-4)
                assert str(second) == str(first)
    assert doubled.counts["reference"]["volumes"] == 20 and doubled.counts["reference"]["subjects"] == 10


@pytest.mark.slow
def test_the_report_says_what_frechet_was_taken_on_and_what_the_counts_are(report):
    assert report.figure("Fréchet on 2 principal components, 3D").sets["bad"].value > 0
    assert any("2 leading principal components" in note for note in report.notes)
    assert report.counts["reference"] == {"volumes": 10, "subjects": 10, "classes": {"0": 5, "1": 5}}
    few = evaluate({"m": volumes("s", 4, 5)}, REFERENCE, TRAIN, [COARSE], (3, 3, 3), num_resamples=20)
    assert any("so it is left out" in note for note in few.notes)
    with pytest.raises(KeyError, match="no figure 'Fréchet'"):
        few.figure("Fréchet")


def test_the_table_has_a_row_per_figure_and_the_json_no_nan(report):
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.figures) and len({line.count("|") for line in lines}) == 1
    assert "bad: excess" in lines[0] and "good - bad" in lines[0]
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["figures"][0]["sets"]["good"]["low"] == report.figures[0].sets["good"].low
    assert "draws" not in back["figures"][0]


@pytest.mark.slow
def test_classes_with_one_subject_are_pooled_and_the_report_says_so():
    labels = [0] * 9 + [1]
    lonely = VolumeSet(REFERENCE.volumes, labels, REFERENCE.subjects)
    samples = VolumeSet(volumes("s", 10, 5).volumes, labels, [f"s{i}" for i in range(10)])
    report = evaluate({"m": samples}, lonely, TRAIN, [COARSE], (3, 3, 3), num_resamples=20)
    assert any("pooled" in note and "class 1" in note for note in report.notes)
    assert np.isfinite(report.figure("KID").sets["m"].value)


def test_pooled_classes_leave_the_floor_the_mix_of_the_reference():
    rng = np.random.default_rng(0)
    train_labels = [0] * 20 + [1] * 60 + [2] * 20  # the reference has nine of class 0, one of class 1, none of class 2
    brightness = np.array([0.2, 0.5, 0.9])[train_labels]
    dots = torch.from_numpy(brightness[:, None, None, None, None] + 0.01 * rng.random((100, 1, 16, 16, 16)))
    train = VolumeSet(dots.float(), train_labels, [f"t{i // 2}" for i in range(100)])  # two scans of every subject
    labels = [0] * 9 + [1]
    reference = VolumeSet(train.volumes[[*range(9), 20]], labels, [f"r{i}" for i in range(10)])
    samples = VolumeSet(reference.volumes, labels, [f"s{i}" for i in range(10)])
    sets = Sets({"m": samples}, reference, train, num_resamples=400, seed=0)
    values = brightness + 0.005
    expected = 0.9 * 0.2 + 0.1 * 0.5 + 0.005
    means = sets.mean("floor", values)
    assert means[0] == pytest.approx(expected) and means.mean() == pytest.approx(expected, abs=0.01)
    rows = sets.floor_rows()
    assert np.bincount(sets.floor_labels[rows]).tolist() == [9, 1] and len(sets.matched_rows("m")) == 10
    drawn = np.where(np.isin(np.arange(100), rows), values, np.nan)
    assert sets.floor_mean(drawn)[0] == pytest.approx(expected)
    weights = sets.floor_weights()
    assert (weights @ values / weights.sum(1)).mean() == pytest.approx(expected, abs=0.02)
    assert (weights[:, ::2] == weights[:, 1::2]).all()  # all scans of a subject are drawn together
    assert weights.sum(1).mean() == pytest.approx(10)
    many = VolumeSet(samples.volumes.repeat(10, 1, 1, 1, 1), labels * 10, [f"s{i}" for i in range(100)])
    sets = Sets({"m": many}, reference, train, num_resamples=2, seed=0)  # more than the training scans allow
    assert np.bincount(sets.floor_labels[sets.floor_rows()]).tolist() == [20, 2] and len(sets.matched_rows("m")) == 22


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda v: v, r"one vector per volume, \(8, D\), got \(8, 1, 16, 16, 16\)"),
        (lambda v: v.flatten(1)[:1], r"got \(1, 4096\)"),
        (lambda v: v.flatten(1)[:, :3].log() * 0, "'mine' gave .* NaN or infinite"),
    ],
)
def test_an_extractor_with_an_unusable_answer_is_refused_by_its_name(answer, message):
    with pytest.raises(ValueError, match=message):
        features_of(NamedExtractor(answer, "mine"), REFERENCE.volumes)


def test_scans_that_nothing_can_be_judged_by_are_refused_before_there_are_samples():
    check_scans(REFERENCE, TRAIN)

    def few(one: VolumeSet, rows: slice) -> VolumeSet:
        return VolumeSet(one.volumes[rows], one.labels[rows], one.subjects[rows])

    with pytest.raises(ValueError, match=r"at least 2 reference subjects .*\['reference0'\]"):
        check_scans(few(REFERENCE, slice(1)), TRAIN)
    with pytest.raises(ValueError, match="at least 3 training subjects"):
        check_scans(REFERENCE, few(TRAIN, slice(2)))
    with pytest.raises(ValueError, match=r"no training scan of class \[1\]"):
        check_scans(REFERENCE, few(TRAIN, slice(0, 24, 2)))
    with pytest.raises(ValueError, match=r"training scans are \(1, 16, 16, 8\)"):
        check_scans(REFERENCE, VolumeSet(TRAIN.volumes[..., :8], TRAIN.labels, TRAIN.subjects))


@pytest.mark.slow
def test_a_reference_scan_that_is_a_training_scan_under_another_name_is_named():
    leaked = VolumeSet(REFERENCE.volumes.clone(), REFERENCE.labels, REFERENCE.subjects)
    leaked.volumes[3] = 0.8 * TRAIN.volumes[7].flip(1)
    notes = _seen_scans(leaked, TRAIN)
    assert len(notes) == 1 and "reference scan of reference3 is the training scan of train7 under another" in notes[0]
    assert _seen_scans(REFERENCE, TRAIN) == []


def test_sets_that_cannot_be_compared_are_refused_with_what_was_found():
    samples = volumes("s", 10, 5)
    two_of_one_class = [VolumeSet(one.volumes[:6:2], [0] * 3, one.subjects[:6:2]) for one in (REFERENCE, TRAIN)]
    with pytest.raises(ValueError, match="'reference0'"):
        evaluate({"m": samples}, REFERENCE, REFERENCE, [COARSE], (3, 3, 3))
    with pytest.raises(ValueError, match="class mix"):
        evaluate(
            {"m": VolumeSet(samples.volumes, [0] * 9 + [1], samples.subjects)}, REFERENCE, TRAIN, [COARSE], (3, 3, 3)
        )
    with pytest.raises(ValueError, match=r"no volume of class \[1\]"):
        evaluate({"m": VolumeSet(samples.volumes, [0] * 10, samples.subjects)}, REFERENCE, TRAIN, [COARSE], (3, 3, 3))
    small = VolumeSet(samples.volumes[..., :8], samples.labels, samples.subjects)
    with pytest.raises(ValueError, match=r"\(1, 16, 16, 8\)"):
        evaluate({"m": small}, REFERENCE, TRAIN, [COARSE], (3, 3, 3))
    with pytest.raises(ValueError, match="other than 'reference'"):
        evaluate({"floor": samples}, REFERENCE, TRAIN, [COARSE], (3, 3, 3))
    with pytest.raises(ValueError, match="'m' has one volume"):
        evaluate({"m": VolumeSet(samples.volumes[:1], [0], ["s0"])}, *two_of_one_class, [COARSE], (3, 3, 3))
    with pytest.raises(ValueError, match="10 and 9"):
        VolumeSet(samples.volumes, samples.labels, samples.subjects[:9])
    broken = samples.volumes.clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 voxels are NaN"):
        VolumeSet(broken, samples.labels, samples.subjects)
