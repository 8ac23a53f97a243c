"""Volumes in a notebook: NiiVue where it is installed, else a figure."""

import importlib.util

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from diffusers_med3d import MedDiffusion3DPipelineOutput


def output() -> MedDiffusion3DPipelineOutput:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = -5, 7, 9
    return MedDiffusion3DPipelineOutput(torch.rand(2, 1, 6, 5, 4), affine, (2.0, 3.0, 4.0))


def test_niivue_gets_the_voxels_and_the_true_affine():
    ipyniivue = pytest.importorskip("ipyniivue")
    made = output()
    viewers = made.show().children
    assert len(viewers) == 2 and all(isinstance(viewer, ipyniivue.NiiVue) for viewer in viewers)
    assert all(one.opts.is_radiological_convention and one.opts.sagittal_nose_left for one in viewers)  # as in viz
    image = nibabel.Nifti1Image.from_bytes(viewers[1].volumes[0].data)
    assert np.array_equal(image.get_fdata(), made.volumes[1, 0].double().numpy())
    assert np.allclose(image.affine, made.affine)


def test_the_static_figure_has_every_volume_in_true_proportions():
    figure = output().show("static")
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (abs(right - left), top - bottom) == (12, 15)


def test_without_the_package_there_is_a_figure_and_niivue_is_refused_in_one_sentence(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipyniivue" else found(name))
    assert isinstance(output().show(), Figure)
    with pytest.raises(ImportError, match="the extra notebook"):
        output().show("niivue")


def test_latents_and_unknown_viewers_are_refused():
    with pytest.raises(ValueError, match="latents cannot be shown"):
        MedDiffusion3DPipelineOutput(torch.rand(1, 4, 2, 2, 2)).show()
    with pytest.raises(ValueError, match="viewer must be one of"):
        output().show("plotly")
