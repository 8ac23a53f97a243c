"""The same scan under two names is found in every disguise, and different people are not taken for one."""

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter, zoom

from diffusers_med3d import metrics
from diffusers_med3d.data.duplicates import (
    Duplicate,
    find_duplicates,
    fingerprint,
    one_person_each,
    otsu_threshold,
)


def head(seed: int, side: int = 40, own: float = 0.2, common: float = 0.15) -> np.ndarray:
    """float32 (40, 48, 36), background 0: a lopsided ellipsoid, a cavity and some folds that all have, own folds."""
    shape = (side, side + 8, side - 4)
    axes = np.meshgrid(*[np.linspace(-1.15, 1.15, n) for n in shape], indexing="ij")

    def field(number: int, width: float) -> np.ndarray:
        smooth = gaussian_filter(np.random.default_rng(number).standard_normal(shape), width)
        return smooth / smooth.std()

    radius = np.sqrt(axes[0] ** 2 + (axes[1] - 0.05 * axes[2]) ** 2 + axes[2] ** 2) + 0.03 * field(seed + 500, 6)
    inside = 0.7 + common * field(1000, 1.5) + own * field(seed, 1.5) + 0.15 * axes[1] - 0.1 * axes[2] + 0.1 * axes[0]
    cavity = np.sqrt(axes[0] ** 2 + (axes[1] - 0.2) ** 2 + (2 * axes[2]) ** 2) < 0.5
    inside = np.where(cavity, 0.2, inside)
    return np.where(radius < 1, np.clip(inside, 0.1, None), 0).astype(np.float32)


def turned(volume: np.ndarray, degrees: float) -> np.ndarray:
    """About the first axis, by linear interpolation."""
    angle = np.deg2rad(degrees)
    matrix = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    centre = (np.array(volume.shape) - 1) / 2
    return affine_transform(volume, matrix, centre - matrix @ centre, order=1)


@pytest.fixture(scope="module")
def people() -> list[np.ndarray]:
    return [fingerprint(head(seed), np.eye(4)) for seed in range(8)]


DISGUISES = {
    "bit-equal": lambda v: v,
    "scaled": lambda v: 0.3 * v,
    "shifted": lambda v: v + 100,
    "gamma": lambda v: v**0.8,
    "mirrored": lambda v: v[::-1],
    "upside down": lambda v: v[:, :, ::-1],
    "coarser": lambda v: zoom(gaussian_filter(v, 0.4), 0.7, order=1),
    "finer": lambda v: zoom(v, 1.4, order=1),
    "padded": lambda v: np.pad(v, ((9, 2), (0, 5), (7, 0))),
    "turned": lambda v: turned(np.pad(v, 3), 4),
    "turned, mirrored, scaled": lambda v: 7 * turned(np.pad(v, 3), 4)[::-1],
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_copy_is_found_in_every_disguise(people, disguise):
    copy = np.ascontiguousarray(DISGUISES[disguise](head(3)))
    found = find_duplicates([*people, fingerprint(copy, np.eye(4))], progress=False)
    assert [(pair.first, pair.second) for pair in found] == [(3, 8)]
    assert found[0].score > 0.85


@pytest.mark.slow
def test_different_people_are_not_taken_for_one(people):
    assert find_duplicates(people, progress=False) == []
    # alike enough to be compared closely, and more alike than any two of 140 real people (0.70)
    alike = [fingerprint(head(seed, own=0.12, common=0.2), np.eye(4)) for seed in range(6)]
    scores = [pair.score for pair in find_duplicates(alike, threshold=-1, progress=False)]
    assert len(scores) >= 3 and 0.6 < max(scores) < 0.75


def test_files_are_compared_whatever_their_axes_and_names(tmp_path):
    image = nibabel.Nifti1Image(head(1), np.diag([2.0, 2.0, 2.0, 1.0]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    nibabel.save(image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), tmp_path / "b.nii.gz")
    nibabel.save(nibabel.Nifti1Image(head(2), np.eye(4)), tmp_path / "c.nii.gz")
    found = find_duplicates([tmp_path / name for name in ("a.nii.gz", "c.nii.gz", "b.nii.gz")], progress=False)
    assert [(pair.first, pair.second) for pair in found] == [(0, 2)] and found[0].score > 0.999


def test_one_scan_or_none_has_no_pair_and_an_empty_one_is_refused():
    assert find_duplicates([]) == [] and find_duplicates([head(1)], progress=False) == []
    with pytest.raises(ValueError, match="every voxel is 2"):
        fingerprint(np.full((8, 8, 8), 2.0), np.eye(4))


def test_the_threshold_of_otsu_parts_two_groups_and_moves_with_the_values():
    values = np.concatenate([np.linspace(0, 1, 300), np.linspace(8, 10, 200)])
    assert 1 <= otsu_threshold(values) <= 8
    assert otsu_threshold(3 * values - 7) == pytest.approx(3 * otsu_threshold(values) - 7)


def test_people_who_share_a_scan_get_one_name_also_in_chains():
    names = ["d", "c", "b", "a", "e", "c"]
    pairs = [Duplicate(0, 1, 1.0), Duplicate(2, 3, 0.9), Duplicate(5, 2, 0.95)]
    assert one_person_each(names, pairs) == ["a", "a", "a", "a", "e", "a"]


def test_copies_of_a_scan_that_the_training_set_holds_twice_are_still_found():
    training = torch.stack([torch.from_numpy(head(seed))[None] for seed in [*range(12), 5]])
    names = [f"t{i}" for i in range(13)]
    sample = 0.97 * training[5:6].flip(2)

    def flagged(owners: list[str]) -> bool:
        themselves = metrics.nearest_training_scan(training, training, owners, owners)
        ratio = metrics.nearest_training_scan(sample, training, owners).ratio
        return bool(ratio < metrics.copy_threshold(themselves.ratio))

    assert not flagged(names)  # nearest and second nearest are the same scan
    assert flagged(one_person_each(names, find_duplicates(list(training), progress=False)))
