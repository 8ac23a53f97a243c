"""Rows, grids, strips and differences of volumes."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_med3d import viz


def test_every_row_keeps_its_name_and_its_own_number_of_volumes():
    figure = viz.volume_rows({"scan": torch.rand(3, 1, 8, 8, 8), "sample": torch.rand(1, 2, 8, 8, 8)})
    assert [axes.get_ylabel() for axes in figure.axes] == ["scan", "", "", "sample", "", ""]
    assert [len(axes.images) for axes in figure.axes] == [3, 3, 3, 3, 0, 0]


def test_views_are_as_wide_and_high_as_the_anatomy_in_millimetres():
    axes = viz.volume_rows({"x": torch.rand(1, 1, 16, 20, 24)}, spacing=(1.0, 2.0, 3.0)).axes[0]
    sizes = [(abs(e[1] - e[0]), e[3] - e[2]) for e in (image.get_extent() for image in axes.images)]
    assert sizes == [(16, 40), (16, 72), (40, 72)]
    assert axes.get_xlim() == (0, 72) and axes.get_aspect() == 1


def test_rows_name_what_they_cannot_draw():
    with pytest.raises(ValueError, match=r"'scan'.*\(8, 8\)"):
        viz.volume_rows({"scan": torch.rand(2, 8, 8)})
    with pytest.raises(ValueError, match="at least one row"):
        viz.volume_rows({})
    with pytest.raises(ValueError, match="holds no volume"):
        viz.volume_rows({"scan": torch.rand(0, 1, 8, 8, 8)})


def test_a_grid_spreads_its_slices_over_what_is_filled_and_says_where_they_lie():
    volume = torch.zeros(8, 8, 40)
    volume[:, :, 10:31] = 1
    figure = viz.slice_grid(volume, spacing=(1.0, 1.0, 2.0), count=3)
    assert [axes.get_title() for axes in figure.axes] == ["z = -9 mm", "z = 1 mm", "z = 11 mm"]
    with pytest.raises(ValueError, match="plane must be"):
        viz.slice_grid(volume, plane="oblique")


def test_before_and_after_stand_below_each_other():
    volumes = {"young": torch.rand(2, 1, 8, 8, 8), "old": torch.rand(2, 1, 8, 8, 8)}
    figure = viz.before_after(volumes, volumes)
    names = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert names == ["young, before", "young, after", "old, before", "old, after"]
    with pytest.raises(ValueError, match="2 volumes before and 1 after"):
        viz.before_after({"young": torch.rand(2, 1, 8, 8, 8)}, {"young": torch.rand(1, 1, 8, 8, 8)})


def test_a_difference_is_of_the_second_over_the_first_on_a_scale_around_zero():
    first, second = torch.zeros(8, 8, 8), torch.zeros(8, 8, 8)
    second[4, 4, 4], first[3, 4, 4] = 0.5, 0.25
    difference = viz.difference_map(first, second, limit=0.5).axes[2].images[0]
    assert difference.get_clim() == (-0.5, 0.5)
    assert np.asarray(difference.get_array())[4, 3:5].tolist() == [-0.25, 0.5]
    with pytest.raises(ValueError, match="one shape"):
        viz.difference_map(first, second[:4])


def test_a_spectrum_puts_every_score_below_its_version():
    versions = {"scan": torch.rand(1, 8, 8, 8), "0.3": torch.rand(1, 8, 8, 8), "sample": torch.rand(1, 8, 8, 8)}
    figure = viz.spectrum_strip(versions, {"3D": [1.2, 0.8, 0.1]})
    assert [axes.get_title() for axes in figure.axes[:3]] == list(versions)
    assert figure.axes[3].lines[0].get_ydata().tolist() == [1.2, 0.8, 0.1]
    figure.draw_without_rendering()
    for place, axes in enumerate(figure.axes[:3]):
        picture = axes.get_window_extent()
        point = figure.axes[3].transData.transform((place, 0.5))[0]
        assert picture.x0 < point < picture.x1
    with pytest.raises(ValueError, match="'3D' has 1 scores for 3 versions"):
        viz.spectrum_strip(versions, {"3D": [1.0]})


def test_a_film_holds_every_frame_in_its_order(tmp_path):
    for value in (0, 120, 240):
        Image.new("RGB", (40, 20), (value, value, value)).save(tmp_path / f"{value:03d}.png")
    path = viz.write_film(sorted(tmp_path.glob("*.png")), tmp_path / "film.gif", seconds_per_frame=0.1, width=20)
    with Image.open(path) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (3, (20, 10), 0)
        levels = []
        for number in range(3):
            film.seek(number)
            levels.append(film.convert("L").getpixel((5, 5)))
        assert levels == sorted(levels) and film.info["duration"] == 400
    with pytest.raises(ValueError, match="at least two frames"):
        viz.write_film([tmp_path / "000.png"], tmp_path / "short.gif")
