"""One style, and figures as files."""

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from diffusers_med3d import viz


def test_a_figure_looks_the_same_whatever_the_callers_settings_are():
    plain = viz.png_bytes(viz.curves({"reward": ([0, 1], [0.0, 1.0])}))
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        figure = viz.curves({"reward": ([0, 1], [0.0, 1.0])})
        assert figure.axes[0].lines[0].get_linewidth() < 2
    assert viz.png_bytes(figure) == plain


def test_a_notebook_draws_a_figure_that_pyplot_does_not_know():
    assert viz.orthogonal_views(torch.rand(8, 8, 8))._repr_png_().startswith(b"\x89PNG")


def test_save_makes_the_folder_and_writes_a_picture(tmp_path):
    path = viz.save(viz.orthogonal_views(torch.rand(8, 8, 8)), tmp_path / "a" / "b.png")
    assert imread(path).shape[2] == 4
    assert [file.name for file in path.parent.iterdir()] == ["b.png"]


def test_an_interrupted_save_leaves_the_old_picture_whole(tmp_path):
    path = viz.save(viz.curves({"x": ([0], [0.0])}), tmp_path / "curve.png")
    before = path.read_bytes()

    class Interrupted(Figure):
        def savefig(self, fname, **kwargs):
            with open(fname, "wb") as file:
                file.write(b"half a picture")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        viz.save(Interrupted(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
