"""evaluation.breakdown on sets whose right answer is known, and its versions of scans from the tiny pipeline."""

import json

import numpy as np
import pytest
import torch

from conftest import SPLIT
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.evaluation import VolumeSet, sampling
from diffusers_med3d.evaluation.breakdown import (
    ROUND_TRIPS,
    SAMPLES,
    breakdown,
    class_thirds,
    part_to_work_on,
    ranks_samples,
    scan_versions,
    spaces_seen,
    write_breakdown,
)
from diffusers_med3d.metrics import Interval, NamedExtractor, frechet

SIZE = 16
SPACES = {
    "coarse": NamedExtractor(lambda v: torch.nn.functional.avg_pool3d(v, 4).flatten(1), "coarse"),
    "edges": NamedExtractor(
        lambda v: torch.nn.functional.avg_pool3d(5 * v.diff(dim=2).abs()[..., 1:, 1:], 5).flatten(1), "edges"
    ),
}


# --- decisions ---


def test_thirds_are_taken_within_each_class_in_the_mix_of_the_reference_and_leave_out_nan():
    labels = [0] * 6 + [1] * 3
    scores = [0.1, 0.2, 0.3, 0.4, float("nan"), 0.6, 9.0, 7.0, 8.0]  # class 1 scores higher throughout
    assert class_thirds(scores, labels, [0, 0, 1]) == ([3, 5, 6], [0, 1, 7])
    with pytest.raises(ValueError, match=r"class 1 has 1 samples with a score, its best and worst third need 2"):
        class_thirds([*scores[:7], float("nan"), float("nan")], labels, [0, 0, 1])


@pytest.mark.parametrize(
    "samples, over_half, part",
    [
        (Interval(0.3, stderr=0.02), Interval(-0.13, stderr=0.01), "generator"),
        (Interval(0.3, stderr=0.02), Interval(0.05, stderr=0.01), "autoencoder"),
        (Interval(0.3, stderr=0.02), Interval(0.05, stderr=0.03), "undecided"),
        (Interval(0.3, stderr=0.02), Interval(-0.05, stderr=0.03), "undecided"),
        (Interval(0.03, stderr=0.02), Interval(0.05, stderr=0.001), "nothing"),
        (Interval(0.3), Interval(-0.13), "nothing"),  # without a standard error nothing is found
    ],
)
def test_the_part_to_work_on_is_the_one_that_makes_most_of_the_excess_beyond_doubt(samples, over_half, part):
    assert part_to_work_on(samples, over_half) == part


def test_a_reward_ranks_only_by_two_standard_errors_in_two_spaces_that_it_did_not_see():
    far, near = Interval(0.1, stderr=0.04), Interval(0.1, stderr=0.06)
    assert ranks_samples({"a": far, "b": far}) is True
    assert ranks_samples({"a": far, "b": near}) is False
    assert ranks_samples({"a": far, "b": near, "c": far}) is True
    assert ranks_samples({"a": far, "b": near, "c": far}, seen=["c"]) is False
    assert ranks_samples({"a": far, "b": far}, seen=["a"]) is None
    assert ranks_samples({"a": Interval(-0.1, stderr=0.01), "b": Interval(-0.1, stderr=0.01)}) is False


def test_a_reward_says_in_an_attribute_which_space_it_is_made_of():
    def reward(volumes, **conditions):
        return [0.0] * len(volumes)

    assert spaces_seen(reward) == []
    reward.feature_space = "haar-scattering-3d"
    assert spaces_seen(reward) == ["haar-scattering-3d"]


# --- sets with a known answer ---


def scan(seed: int, label: int) -> torch.Tensor:
    """(1, 16, 16, 16): a ball with texture, larger in class 1."""
    g = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIZE)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    texture = torch.einsum("wa,axyz->wxyz", torch.randn(6, 3, generator=g) * 6, grid).sin().mean(0)
    radius = 0.9 + 0.1 * label + 0.05 * torch.rand((), generator=g)
    return ((0.5 + 0.3 * texture) * (grid.square().sum(0).sqrt() < radius)).clamp(0, 1)[None]


def damaged(volumes: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Volumes of which a share (N,) each has gone over to a darker blur of themselves."""
    share = share.view(-1, 1, 1, 1, 1)
    return (1 - share) * volumes + share * 0.7 * torch.nn.functional.avg_pool3d(volumes, 5, 1, 2)


def scans(name: str, count: int, seed: int) -> VolumeSet:
    labels = [row % 2 for row in range(count)]
    volumes = torch.stack([scan(1000 * seed + row, label) for row, label in enumerate(labels)])
    return VolumeSet(volumes, labels, [f"{name}{row}" for row in range(count)])


REFERENCE, TRAIN = scans("reference", 16, 1), scans("train", 24, 2)


def broken_down(round_trips: float, shares: torch.Tensor, scores=None, seen=None):
    """`breakdown` of a generator whose samples are damaged by shares, behind an autoencoder that damages so much."""
    made, rounded = scans("seed", len(shares), 3), torch.full((len(REFERENCE),), round_trips)
    return breakdown(
        {ROUND_TRIPS: VolumeSet(damaged(REFERENCE.volumes, rounded), REFERENCE.labels, REFERENCE.subjects)},
        VolumeSet(damaged(made.volumes, shares), made.labels, made.subjects),
        scores or {},
        REFERENCE,
        TRAIN,
        SPACES,
        seen,
        num_resamples=200,
    )


@pytest.mark.parametrize(
    "round_trips, samples, part", [(0.05, 0.5, "generator"), (0.5, 0.5, "autoencoder"), (0.0, 0.0, "nothing")]
)
def test_the_part_that_damages_is_named(round_trips, samples, part):
    found = broken_down(round_trips, torch.full((24,), samples))
    assert [one.work_on for one in found.spaces] == [part, part]
    assert (f"the {part} (by coarse and edges)" in found.headline) == (part != "nothing")
    assert all(part in one.sentence or "no part is found wanting" in one.sentence for one in found.spaces)


def test_where_round_trips_take_about_half_the_part_is_left_open():
    found = broken_down(0.34, torch.full((24,), 0.5))
    assert [one.work_on for one in found.spaces] == ["undecided", "undecided"]
    assert "too uncertain to tell autoencoder from generator" in found.spaces[0].sentence
    assert "the autoencoder" not in found.headline and "the generator" not in found.headline


def test_a_reward_that_is_the_true_damage_ranks_samples_and_a_random_one_or_the_class_does_not():
    g = torch.Generator().manual_seed(0)
    shares = 0.8 * torch.rand(48, generator=g)
    labels = scans("seed", 48, 3).labels
    scores = {
        "true": (-shares).tolist(),
        "random": [*torch.rand(45, generator=g).tolist(), *3 * [float("nan")]],
        "of_class": [float(label) for label in labels],
        "made_of_edges": (-shares).tolist(),
    }
    found = broken_down(0.05, shares, scores, seen={"made_of_edges": ["edges"]})
    ranks = {one.reward: one.ranks for one in found.rewards}
    assert ranks == {"true": True, "random": False, "of_class": False, "made_of_edges": None}
    unscored = [note for note in found.notes if "no score" in note]
    assert unscored == ["3 of 48 samples have no score by random; they are in neither of its thirds."]
    sentences = {one.reward: one.sentence for one in found.rewards}
    assert "true ranks samples" in sentences["true"] and "does not rank samples" in sentences["random"]
    assert "is not judged" in sentences["made_of_edges"] and "edges (its own)" in sentences["made_of_edges"]
    assert "the reward random, which does not rank samples" in found.headline and "reward true" not in found.headline
    kid = next(one for one in found.figures if one.name == "KID" and one.extractor == "coarse")
    best, middle, worst = (kid.sets[name].value for name in ("best third by true", SAMPLES, "worst third by true"))
    assert best < middle < worst
    assert found.counts["best third by true"]["volumes"] == 16
    difference = kid.draws["worst third by true"] - kid.draws["best third by true"]
    own = next(one for one in found.rewards if one.reward == "true").differences["coarse"]
    assert own.value == pytest.approx(difference[0]) and own.stderr == pytest.approx(np.std(difference[1:], ddof=1))


def test_scans_that_pass_unchanged_have_no_distance_and_the_bias_of_few_volumes_is_taken_from_frechet():
    found = broken_down(0.0, torch.zeros(24))
    for space, one in SPACES.items():
        kid, distance = (
            next(own for own in found.figures if own.extractor == space and own.name.startswith(name))
            for name in ("KID", "Fréchet on 4 components")
        )
        assert kid.sets[ROUND_TRIPS].value == pytest.approx(0, abs=1e-9)
        assert distance.sets[ROUND_TRIPS].value == pytest.approx(0, abs=1e-9)
        features = [one(volumes).double() for volumes in (TRAIN.volumes, REFERENCE.volumes)]
        mean = features[0].mean(0)
        directions = torch.linalg.svd(features[0] - mean, full_matrices=False).Vh[:4].T
        plain = frechet(*((own - mean) @ directions for own in features)).item()
        assert abs(distance.sets["floor"].value) < 0.6 * plain


def test_the_files_hold_every_stage_with_its_standard_error_and_no_path(tmp_path):
    shares = torch.full((24,), 0.5)
    found = broken_down(0.05, shares, {"random": torch.rand(24).tolist()})
    text = write_breakdown(found, tmp_path / "out", {"model": "tiny"}, "Title")
    assert text == (tmp_path / "out" / "breakdown.md").read_text() and found.headline in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert list(rows)[2:] == ["reference scans", "training scans (floor)", *found.stages]
    assert found.stages == [ROUND_TRIPS, SAMPLES, "best third by random", "worst third by random"]
    kid = next(one for one in found.figures if one.name == "KID")
    assert f"{kid.excess[SAMPLES].value:.3g} ± {kid.excess[SAMPLES].stderr:.2g}" in rows[SAMPLES]
    assert f"{kid.sets['floor'].value:.3g} ± {kid.sets['floor'].stderr:.2g}" in rows["training scans (floor)"]
    report = json.loads((tmp_path / "out" / "breakdown.json").read_text())
    assert report["headline"] == found.headline and report["settings"] == {"model": "tiny"}
    assert report["rewards"][0]["ranks"] is False and report["spaces"][0]["work_on"] == "generator"
    assert report["spaces"][0]["samples"]["stderr"] == pytest.approx(kid.excess[SAMPLES].stderr)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "breakdown.json", "breakdown.md", "breakdown.png"
    ]  # fmt: skip


# --- versions of scans ---


@pytest.fixture
def data(brains_folder, tmp_path) -> DataArguments:
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    return DataArguments(brains_folder, str(tmp_path / "split.json"), [16] * 3, [12.0] * 3)


def test_every_scan_is_noised_and_denoised_and_only_what_is_missing_is_made(data, tiny_pipeline, tmp_path):
    scans = sampling.volume_set(VolumeDataset.from_arguments(data, "validation"))

    def make(batch_size: int) -> dict[str, VolumeSet]:
        return scan_versions(
            tiny_pipeline, scans, tmp_path / "versions", data, (0.5,), num_inference_steps=2, batch_size=batch_size
        )

    versions = make(8)
    assert list(versions) == ["round-trips", "noised-0.5"]
    assert all(one.labels == scans.labels and one.subjects == scans.subjects for one in versions.values())
    with torch.no_grad():
        decoded = tiny_pipeline(volumes=scans.volumes[:1], strength=0.0, class_labels=[0]).volumes
    rounded = sampling.reload_volumes(decoded, [0], ["one"], tmp_path / "one", data, tiny_pipeline.affine())
    assert torch.allclose(versions["round-trips"].volumes[:1], rounded.volumes, atol=1e-4)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "versions").rglob("*.nii.gz")}
    assert len(times) == 6
    gone = sorted(times)[4]
    gone.unlink()
    again = make(1)
    assert [file for file, time in times.items() if file.stat().st_mtime_ns != time] == [gone]
    assert all(torch.allclose(again[name].volumes, versions[name].volumes, atol=1e-4) for name in versions)


def test_versions_of_other_scans_are_not_taken_for_these(data, tiny_pipeline, tmp_path):
    """Classes and preparation are in no file name: with other ones, files that are there would be kept."""
    scans = sampling.volume_set(VolumeDataset.from_arguments(data, "validation"))

    def make(of: VolumeSet, strengths=(0.5,), **kwargs) -> None:
        scan_versions(tiny_pipeline, of, tmp_path / "versions", data, strengths, num_inference_steps=2, **kwargs)

    for strengths in ((0.5, 1.0), (0.0,), (0.1,)):
        with pytest.raises(ValueError, match=rf"take a step of the 2, got \[{strengths[0]}"):
            make(scans, strengths)
    assert not (tmp_path / "versions").exists()  # before anything was made
    make(scans)
    with pytest.raises(ValueError, match=r"other settings.*'labels': \(\[0, 1, 2\], \[0, 1, 1\]\)"):
        make(VolumeSet(scans.volumes, [0, 1, 1], scans.subjects))
    with pytest.raises(ValueError, match=r"other settings.*'guidance_scale': \(1.0, 2.0\)"):
        make(scans, guidance_scale=2.0)
    data.class_names = ["young", "old", "middle"]
    with pytest.raises(ValueError, match=r"made with other settings.*'classes'"):
        make(scans)
    data.class_names, data.antialias = ["young", "middle", "old"], True
    with pytest.raises(ValueError, match=r"made with other settings.*'voxels'"):
        make(sampling.volume_set(VolumeDataset.from_arguments(data, "validation")))
