"""What people have on disk: file names, headers and shapes that were once misread in silence."""

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from diffusers_med3d.data import DataArguments, DataSettings, VolumeDataset, prepare, read_scans

SIDE, SPACING = 20, 6.0  # voxels and mm of the ball


def ball(side: int = SIDE, seed: int = 0) -> np.ndarray:
    """float32 (side, side, side): a textured ball of radius 0.4 x side on a background of exactly 0."""
    axes = np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 3, indexing="ij")
    texture = 500 + 100 * np.random.default_rng(seed).random((side, side, side))
    return np.where(np.sqrt(sum(axis**2 for axis in axes)) < 0.4 * side, texture, 0).astype(np.float32)


def write(path: Path, voxels: np.ndarray, spacing: float = SPACING, unit: str | None = "mm") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, np.diag([spacing] * 3 + [1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def table(folder: Path, rows: list[tuple[str, str, object]]) -> None:
    lines = ["file_name,participant_id,age", *(",".join(map(str, row)) for row in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def folder_of(folder: Path, voxels: dict[str, np.ndarray], **header) -> Path:
    """Scans under these names, each of a person of its own."""
    for name, array in voxels.items():
        write(folder / "images" / name, array, **header)
    table(folder, [(f"images/{name}", f"person{i}", 30 + i) for i, name in enumerate(voxels)])
    return folder


def read(folder: Path, **settings) -> VolumeDataset:
    return VolumeDataset(folder, **{"volume_shape": [SIDE] * 3, "spacing": [SPACING] * 3} | settings)


# --- names decide nothing ---


@pytest.mark.parametrize("word", ["train", "test", "dev", "validation", "valid", "eval", "retest", "train-00000-of-2"])
def test_no_word_in_a_name_decides_what_is_read(tmp_path, word):
    rows = []
    for i in range(3):
        for name in (f"images/{word}{i}_T1w.nii.gz", f"{word}/sub-{i}_ses-{word}.nii.gz", f"sub-{i}_{word}.nii.gz"):
            write(tmp_path / name, ball(seed=i))
            rows.append((name, f"{word}{i}", 40))
    table(tmp_path, rows)
    assert len(read_scans(tmp_path)) == 9
    assert {item["subject"] for item in read(tmp_path)} == {f"{word}{i}" for i in range(3)}


def test_test_and_retest_of_three_people_are_six_scans(tmp_path):
    names = [f"sub-{i:02d}_ses-{session}_T1w.nii.gz" for i in (1, 2, 3) for session in ("test", "retest")]
    for name in names:
        write(tmp_path / name, ball())
    table(tmp_path, [(name, name[:6], 30) for name in names])
    assert [item["subject"] for item in read(tmp_path)] == ["sub-01"] * 2 + ["sub-02"] * 2 + ["sub-03"] * 2


def test_a_link_to_another_disk_is_followed_and_a_link_that_goes_round_is_not(tmp_path):
    write(tmp_path / "disk" / "deep" / "a.nii.gz", ball())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "round").symlink_to(tmp_path / "set")
    table(tmp_path / "set", [("images/deep/a.nii.gz", "p", 30)])
    assert len(read(tmp_path / "set")) == 1


@pytest.mark.parametrize("name", ["A.NII.GZ", "a.Nii.gz", "B.NII"])
def test_names_in_capital_letters_are_read(tmp_path, name):
    write(tmp_path / "small.nii", ball())
    if name.lower().endswith(".gz"):
        write(tmp_path / "small.nii.gz", ball())
    (tmp_path / ("small.nii.gz" if name.lower().endswith(".gz") else "small.nii")).rename(tmp_path / name)
    (tmp_path / "small.nii").unlink(missing_ok=True)
    table(tmp_path, [(name, "p", 30)])
    assert read(tmp_path)[0]["volume"].max() == 1


def test_hidden_files_of_a_mac_are_no_scans(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()})
    (tmp_path / "images" / "._a.nii.gz").write_bytes(b"Mac OS X")
    assert len(read_scans(tmp_path)) == 1


# --- voxels and headers ---


def test_complex_voxels_become_their_magnitude_with_a_warning(tmp_path):
    folder_of(tmp_path / "real", {"a.nii.gz": ball()})
    folder_of(tmp_path / "complex", {"a.nii.gz": (ball() * np.exp(0.9j)).astype(np.complex64)})
    with pytest.warns(UserWarning, match=r"person0 \(a.nii.gz\) holds complex numbers"):
        found = read(tmp_path / "complex").stack()
    np.testing.assert_allclose(found, read(tmp_path / "real").stack(), atol=1e-5)


@pytest.mark.parametrize(("unit", "number"), [("micron", 6000.0), ("meter", 0.006), ("mm", 6.0), ("unknown", 6.0)])
def test_a_header_in_another_unit_is_converted_to_millimetres(tmp_path, unit, number):
    folder_of(tmp_path, {"a.nii.gz": ball()}, spacing=number, unit=unit)
    volume = read(tmp_path)[0]["volume"]
    assert volume.affine[0, 0] == pytest.approx(6.0, rel=1e-5)
    assert (volume[0] > 0).sum() == (ball() > 0).sum()


def test_voxels_of_a_microscope_are_a_tenth_of_a_millimetre(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()}, spacing=100.0, unit="micron")
    dataset = read(tmp_path, spacing=[0.1] * 3)
    assert (dataset[0]["volume"][0] > 0).sum() == (ball() > 0).sum()
    assert dataset.placements[0].size == pytest.approx((1.6,) * 3)


def test_a_unit_that_cannot_be_meant_is_refused(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()}, spacing=6.0, unit="meter")
    with pytest.raises(ValueError, match=r"person0 \(a.nii.gz\) has voxels of \[6000.0, 6000.0, 6000.0\] mm"):
        read(tmp_path)


@pytest.mark.parametrize("letters", ["RGB", "RGBA"])
def test_colours_are_refused_by_name_with_what_to_do(tmp_path, letters):
    colours = np.zeros((SIDE,) * 3, dtype=[(letter, "u1") for letter in letters])
    for letter in letters:
        colours[letter] = ball() / 3
    folder_of(tmp_path, {"a.nii.gz": colours})
    with pytest.raises(ValueError, match=r"person0 \(a.nii.gz\) holds colours .*write one channel"):
        read(tmp_path)


def test_a_vector_image_has_channels(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": np.stack([ball(seed=0), 2 * ball(seed=1)], -1)[:, :, :, None]})
    volume = read(tmp_path)[0]["volume"]
    assert volume.shape == (2, SIDE, SIDE, SIDE)
    assert not np.array_equal(volume[0], volume[1])


def test_three_axes_and_a_fourth_of_length_one_are_the_same(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball(), "b.nii.gz": ball()[..., None]})
    first, second = read(tmp_path).stack()
    assert first.equal(second)


def test_the_odd_one_among_the_channels_is_named_before_training(tmp_path):
    two = np.stack([ball(), ball()], -1)
    folder_of(tmp_path, {"a.nii.gz": ball(), "b.nii.gz": two, "c.nii.gz": ball(), "d.nii.gz": ball()})
    with pytest.raises(ValueError, match=r"3 of 4 scans have 1 channel\(s\), but scan of person1 \(b.nii.gz\) 2\."):
        read(tmp_path)


def test_a_time_series_is_refused_unless_channels_were_asked_for(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": np.stack([ball()] * 40, -1)})
    with pytest.raises(ValueError, match=r"person0 \(a.nii.gz\) is a series of 40 volumes .*num_channels=40"):
        read(tmp_path)
    assert read(tmp_path, num_channels=40)[0]["volume"].shape[0] == 40


def test_four_volumes_two_seconds_apart_are_a_time_series_too(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": np.stack([ball()] * 4, -1)})
    path = tmp_path / "images" / "a.nii.gz"
    image = nibabel.load(path)
    image = nibabel.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine)
    image.header.set_zooms((6, 6, 6, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    with pytest.raises(ValueError, match=r"series of 4 volumes \(time step 2 s\)"):
        read(tmp_path)


def test_channels_that_are_missing_are_refused(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()})
    with pytest.raises(ValueError, match=r"person0 \(a.nii.gz\) has 1 channel\(s\), asked for are 2"):
        read(tmp_path, num_channels=2)


def test_a_picture_with_a_third_axis_of_one_voxel_is_no_volume(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()[:, :, :1] + 1})
    with pytest.raises(ValueError, match=r"a.nii.gz\) is a flat picture of shape \(20, 20, 1\)"):
        read(tmp_path)


# --- several grids in one set ---


def mixed(folder: Path) -> Path:
    """Five scans of 6 mm and one of 3 mm, of which one is stored in other axes."""
    folder_of(folder, {f"{letter}.nii.gz": ball(seed=i) for i, letter in enumerate("abcde")})
    write(folder / "images" / "fine.nii.gz", ball(40), spacing=3.0)
    path = folder / "images" / "b.nii.gz"
    nibabel.save(nibabel.load(path).as_reoriented(np.array([[2, 1], [0, 1], [1, -1]])), path)
    rows = [(f"images/{path.name}", path.name[:-7], 40) for path in sorted((folder / "images").iterdir())]
    table(folder, rows)
    return folder


def test_scans_of_several_voxel_sizes_are_refused_by_name_where_no_grid_is_stated(tmp_path):
    with pytest.raises(
        ValueError, match=r"1 of 6 scans have voxels of another size than the commonest, 6 x 6 x 6 mm: "
    ) as e:
        VolumeDataset(mixed(tmp_path))
    assert "scan of fine (fine.nii.gz) (3 x 3 x 3 mm). Nothing says to which grid" in str(e.value)
    assert "--spacing" in str(e.value) and "(b.nii.gz)" not in str(e.value)


def test_the_flags_alone_state_a_grid_not_the_defaults(tmp_path):
    mixed(tmp_path)
    with pytest.raises(ValueError, match=r"\(fine.nii.gz\) \(3 x 3 x 3 mm\)"):
        VolumeDataset(tmp_path, **DataArguments(str(tmp_path), "").reading())
    stated = DataArguments(str(tmp_path), "", volume_shape=[SIDE] * 3, spacing=[6.0] * 3)
    assert len(VolumeDataset(tmp_path, **stated.reading())) == 6


def test_where_a_grid_is_stated_the_odd_scans_are_resampled_and_named(tmp_path):
    dataset = read(mixed(tmp_path))
    fine = next(item["volume"] for item in dataset if item["subject"] == "fine")
    assert np.allclose(fine.pixdim, 6.0) and abs(int((fine > 0).sum()) - int((ball() > 0).sum())) < 400
    assert "scan of fine (fine.nii.gz) (3 x 3 x 3 mm). All are resampled to the grid." in dataset.report()


def test_a_scan_of_quite_another_size_is_named(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball(), "b.nii.gz": ball(), "c.nii.gz": ball(), "tiny.nii.gz": np.pad(ball(8), 6)})
    report = read(tmp_path).report()
    assert "1 of 4 scans have anatomy less than half or more than twice as large as usual, 96 x 96 x 96 mm" in report
    assert "person3 (" in report


# --- anatomy and grid ---


def test_anatomy_larger_than_the_grid_is_refused_with_both_sizes(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball(40), "b.nii.gz": ball(20), "c.nii.gz": ball(38)})  # 192, 96 and 180 mm
    with pytest.raises(
        ValueError, match=r"2 of 3 scan\(s\) are larger than the grid of \[120, 120, 120\] mm"
    ) as refused:
        read(tmp_path)
    for named in ("person0 (a.nii.gz): anatomy of [192, 192, 192] mm, ", "person2 (c.nii.gz): anatomy of [180"):
        assert named in str(refused.value)
    assert "--fit shrink" in str(refused.value) and "person1" not in str(refused.value)
    cut = read(tmp_path, fit="crop")
    assert (cut.stack()[0, 0] > 0).float().mean() > 0.9  # the grid is full of it
    assert "2 of 3 scans are larger than the grid and cut: person0, person2" in cut.report()


def test_a_scan_may_be_shrunk_until_it_fits_and_its_affine_says_so(tmp_path):
    folder_of(tmp_path, {"large.nii.gz": ball(40), "small.nii.gz": ball(20)})
    large, small = (item["volume"] for item in read(tmp_path, fit="shrink"))
    filled = np.argwhere(large.numpy()[0] > 0)
    assert (filled.max(0) - filled.min(0)).max() in (18, 19)
    assert large.affine[0, 0] * 20 == pytest.approx(192, rel=0.06)
    assert small.affine[0, 0] == 6.0
    # Where the ball's centre lies in the scanner has not changed
    centre = large.affine.numpy() @ [*filled.mean(0), 1]
    np.testing.assert_allclose(centre[:3], 6 * 19.5, atol=4)


def test_noise_around_a_head_is_no_anatomy(tmp_path):
    rng = np.random.default_rng(0)
    scan = np.pad(ball(), 10) + 5 * rng.random((40, 40, 40), dtype=np.float32)
    folder_of(tmp_path, {"a.nii.gz": scan})
    assert len(read(tmp_path)) == 1


def test_an_unknown_word_for_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fit must be one of"):
        read(folder_of(tmp_path, {"a.nii.gz": ball()}), fit="squeeze")


def test_the_report_says_what_would_fill_the_grid(tmp_path):
    report = read(folder_of(tmp_path, {"a.nii.gz": ball()}), volume_shape=[64] * 3).report()
    assert "1 scan(s) of 1 subject(s)" in report and "anatomy 96 x 96 x 96 mm" in report
    assert "--volume_shape 16 16 16 would hold all of it" in report
    assert "--spacing 1.58 1.58 1.58 would fill it" in report


# --- prepare ---


def test_prepare_gives_what_the_dataset_gives_from_a_path_and_from_a_tensor(tmp_path):
    folder_of(tmp_path, {"a.nii.gz": ball()})
    path = tmp_path / "images" / "a.nii.gz"
    item = read(tmp_path)[0]["volume"]
    grid = {"volume_shape": [SIDE] * 3, "spacing": [SPACING] * 3}
    for scan in (path, str(path), prepare(path, **grid), prepare(path, **grid)[0]):
        volume = prepare(scan, **grid)
        np.testing.assert_allclose(volume.numpy(), item.numpy(), atol=1e-4)
        np.testing.assert_allclose(volume.affine, item.affine)


def test_prepare_refuses_what_it_cannot_use(tmp_path):
    path = write(tmp_path / "a.nii.gz", ball())
    with pytest.raises(ValueError, match="the grid is not known; give like=pipeline"):
        prepare(path)
    with pytest.raises(FileNotFoundError, match="no such scan: .*b.nii.gz"):
        prepare(tmp_path / "b.nii.gz", volume_shape=[SIDE] * 3, spacing=[6.0] * 3)
    with pytest.raises(ValueError, match="scan of a.nii.gz: anatomy of"):
        prepare(path, volume_shape=[8] * 3, spacing=[6.0] * 3)


def test_prepare_takes_a_scan_of_a_registered_set_as_it_lies_and_refuses_others(tmp_path):
    like = DataSettings(volume_shape=[SIDE] * 3, spacing=[SPACING] * 3, registration="group")
    off_centre = np.roll(ball(), (2, 1, 0), (0, 1, 2))
    path = write(tmp_path / "a.nii.gz", off_centre)
    volume = prepare(path, like)
    assert np.array_equal(volume.numpy()[0] > 0, off_centre > 0)  # neither cropped nor centred
    with pytest.raises(
        ValueError, match=r"scan of b.nii.gz cannot be prepared: a registered scan must have \(20, 20, 20\)"
    ):
        prepare(write(tmp_path / "b.nii.gz", ball(24)), like)


def test_the_files_of_a_set_may_be_moved_with_it(tmp_path):
    folder_of(tmp_path / "before", {"a.nii.gz": ball()})
    shutil.move(tmp_path / "before", tmp_path / "after")
    os.chdir(tmp_path)
    assert len(read(Path("after"))) == 1


def test_partial_noising_keeps_the_place_of_a_scan_in_the_scanner(tmp_path, tiny_pipeline):
    """Bright spots of scan, prepared volume and round trip lie at one place in millimetres."""
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    affine[:3, 3] = [-310, 45, 77]  # far from where the pipeline puts its own volumes
    nibabel.save(nibabel.Nifti1Image(ball(), affine), tmp_path / "a.nii.gz")
    scan = prepare(tmp_path / "a.nii.gz", like=tiny_pipeline)
    assert scan.shape == (1, 16, 16, 16)
    middle = np.argwhere(scan.numpy()[0] > 0).mean(0)
    np.testing.assert_allclose((scan.affine.numpy() @ [*middle, 1])[:3], affine[:3, 3] + 6 * 9.5, atol=6)
    for volumes in (scan, scan[None], [scan], [scan, scan]):
        out = tiny_pipeline(volumes=volumes, strength=0.3, num_inference_steps=4)
        paths = out.save_nifti(tmp_path / "out", overwrite=True)
        assert len(paths) == len(out.volumes) == (2 if isinstance(volumes, list) and len(volumes) == 2 else 1)
        for path in paths:
            np.testing.assert_allclose(nibabel.load(path).affine, scan.affine)
    other = np.eye(4)
    out = tiny_pipeline(volumes=scan, strength=0.3, num_inference_steps=4, affine=other)
    np.testing.assert_array_equal(out.affine, other)
    with pytest.raises(ValueError, match=r"a list of volumes must hold \(C, X, Y, Z\) tensors of one shape"):
        tiny_pipeline(volumes=[scan, scan[:, :8]], strength=0.3, num_inference_steps=4)
