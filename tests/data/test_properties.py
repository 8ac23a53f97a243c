"""Properties of affines and transforms, by hypothesis: a landmark keeps its place in the scanner."""

import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_med3d.data import prepare
from diffusers_med3d.pipelines.med_diffusion_3d import MedDiffusion3DPipelineOutput

pytestmark = pytest.mark.slow

SIDE, GRID = 20, 24
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def world(affine: np.ndarray, voxel) -> np.ndarray:
    return (affine @ np.array([*voxel, 1.0]))[:3]


@st.composite
def affines(draw) -> np.ndarray:
    """Any orientation with axes along the scanner's, voxels of 2 to 5 mm, anywhere within half a metre."""
    order = draw(st.permutations([0, 1, 2]))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3))
    sides = draw(st.lists(st.floats(2.0, 5.0), min_size=3, max_size=3))
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[list(order)] * np.array(sides) * np.array(signs)
    matrix[:3, 3] = draw(st.lists(st.floats(-500, 500, allow_subnormal=False), min_size=3, max_size=3))
    return matrix


@quick
@given(affine=affines(), corner=st.tuples(*[st.integers(7, 11)] * 3), step=st.floats(3.5, 5.0))
def test_a_landmark_keeps_its_place_through_reading_preparing_and_writing(affine, corner, step):
    axes = np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij")
    ball = sum((axis - 9.5) ** 2 for axis in axes) < 64
    distance = sum((axis - c) ** 2 for axis, c in zip(axes, corner, strict=True))
    voxels = np.where(ball, 0.2 + 0.8 * np.exp(-distance / 8), 0.0).astype(np.float32)  # the landmark is 5 voxels wide
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        stored = nibabel.load(path).affine  # float32
        volume = prepare(path, volume_shape=(GRID,) * 3, spacing=(step,) * 3, fit="crop")
        made = MedDiffusion3DPipelineOutput(volume.as_tensor()[None], volume.affine.numpy(), (step,) * 3)
        (written,) = made.save_nifti(folder, prefix="made")
        image = nibabel.load(written)
        values = image.get_fdata()
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    bright = np.argwhere(values > 0.7 * values.max())
    weights = values[tuple(bright.T)] - 0.7 * values.max()
    found = world(image.affine, (bright * weights[:, None]).sum(0) / weights.sum())
    assert np.abs(found - world(stored, corner)).max() < 0.5 * step


@quick
@given(affine=affines())
def test_what_is_written_is_read_at_the_same_place_by_sform_and_qform(affine):
    matrix = affine[:, [*np.argsort(np.abs(affine[:3, :3]).argmax(0)), 3]]
    with tempfile.TemporaryDirectory() as folder:
        made = MedDiffusion3DPipelineOutput(torch.rand(1, 1, 4, 4, 4), matrix, (1.0,) * 3)
        header = nibabel.load(made.save_nifti(folder)[0]).header
    np.testing.assert_allclose(header.get_sform(), matrix, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(header.get_qform(), matrix, rtol=1e-4, atol=1e-2)
