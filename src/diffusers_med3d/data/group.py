"""Scans of a group brought into one frame and onto one grid, with small variations of the training scans if wanted."""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from ..utils.files import whole_file, write_json
from ..utils.parallel import parallel
from . import registration as reg
from .nifti import decode_nifti

TEMPLATE = ".registration/template.nii.gz"
"""Below the data set; in a hidden folder, where no reader takes it for a scan without a row."""


@dataclass(frozen=True)
class GroupOptions:
    """How scans are registered."""

    template: Path | None = None  # None: the mean of the training scans
    rounds: int = 3  # how often the training scans are registered to their mean
    smoothing: float = 0.7  # mm, standard deviation of a Gaussian before interpolation
    jittered_copies: int = 0  # of every training scan, turned, scaled, shifted and warped a little
    num_proc: int = 1
    seed: int = 0


def register_group(
    scans: Sequence[Path], trains: Sequence[bool], output: Path, grid: reg.Grid, options: GroupOptions
) -> list[list[str]]:
    """Register scans (affine) to the mean of the training scans or to a template, and write them on the grid.

    The training scans are laid over each other and averaged, then each is registered to the mean, and that again; all
    other scans are registered to the last mean. Every volume, copies too, is interpolated once, from the scan as it
    was. ``registration.json`` holds the grid and every scan's affine from RAS points of the grid to RAS points of the
    scan. What is there already is not made again.

    Args:
        scans: NIfTI files.
        trains: which of them are training scans.
        output: folder; volumes go to ``images/``.
        grid: to be written on.
        options: how.

    Returns:
        The files written of each scan below ``output``: the scan itself, then its copies.

    Raises:
        ValueError: a scan whose foreground the grid does not hold.
    """
    record = output / "registration.json"
    affines: Sequence[np.ndarray | None]
    stems = [path.name.removesuffix(".gz").removesuffix(".nii") for path in scans]
    if record.is_file():
        known = json.loads(record.read_text())
        affines = [np.array(known["scans"][stem]["affine"]) for stem in stems]
    else:
        template, affines = _template(scans, trains, grid, options)
        jobs = [(path, grid, template, affine) for path, affine in zip(scans, affines, strict=True)]
        found = list(parallel(_align, jobs, options.num_proc, "registering all scans"))
        affines = [affine for affine, _ in found]
        with whole_file(output / TEMPLATE) as temporary:
            image = nibabel.Nifti1Image(template.astype(np.float32), grid.affine)
            temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
        shape = {"volume_shape": list(grid.shape), "spacing": list(grid.spacing), "affine": grid.affine.tolist()}
        entries = {
            stem: {"affine": affine.tolist(), "correlation": reg.correlation(volume, template)}
            for stem, (affine, volume) in zip(stems, found, strict=True)
        }
        write_json(record, {"grid": shape, "template": TEMPLATE, "scans": entries})
    names = [
        [f"images/{stem}.nii.gz"]
        + [f"images/{stem}_jitter-{copy:02d}.nii.gz" for copy in range(1, options.jittered_copies * train + 1)]
        for stem, train in zip(stems, trains, strict=True)
    ]
    write = partial(_write, grid=grid, folder=output, smoothing=options.smoothing, seed=options.seed)
    list(parallel(write, list(zip(scans, affines, names, strict=True)), options.num_proc, "writing volumes"))
    return names


def _template(
    scans: Sequence[Path], trains: Sequence[bool], grid: reg.Grid, options: GroupOptions
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Template on the grid, and the affines that are known by then."""
    affines: list[np.ndarray | None] = [None] * len(scans)
    if options.template is not None:
        given = _read(options.template)
        return reg.normalised(given, reg.centred(given), grid), affines
    chosen = [i for i, train in enumerate(trains) if train]
    jobs = [(scans[i], grid, None, None) for i in chosen]
    laid_over_each_other = parallel(_align, jobs, options.num_proc, "mean of the group, round 0")
    template = reg.symmetric_mean(volume for _, volume in laid_over_each_other)
    for turn in range(1, options.rounds + 1):
        turns = [(scans[i], grid, template, affines[i]) for i in chosen]
        found = list(parallel(_align, turns, options.num_proc, f"mean of the group, round {turn}"))
        template = reg.symmetric_mean(volume for _, volume in found)
        for i, (affine, _) in zip(chosen, found, strict=True):
            affines[i] = affine
    return template, affines


def _read(path: Path) -> sitk.Image:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the processes are as many as the cores
    return reg.read_scan(*decode_nifti({"path": str(path), "bytes": None}, path.name))


def _align(job: tuple[Path, reg.Grid, np.ndarray | None, np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """A scan's affine to a template (without one: a shift to the middle of the grid), and the scan on the grid."""
    path, grid, template, start = job
    scan = _read(path)
    if template is None:
        transform = reg.centred(scan)
    else:
        begin = None if start is None else reg.transform_of(start)
        transform = reg.register(scan, reg.template_image(template, grid), begin)
    return reg.affine_of(transform), reg.normalised(scan, transform, grid)


def _write(job: tuple[Path, np.ndarray, list[str]], grid: reg.Grid, folder: Path, smoothing: float, seed: int) -> None:
    """Write a scan on the grid under the first name and its copies under the others."""
    path, affine, names = job
    if all((folder / name).is_file() for name in names):
        return
    scan, transform = _read(path), reg.transform_of(affine)
    cut = reg.cut_share(scan, transform, grid)
    if cut > reg.MAX_CUT:
        raise ValueError(
            f"{path.name}: {100 * cut:.1f} % of the foreground lies outside the grid {grid.shape} at {grid.spacing} "
            "mm; choose a larger --volume_shape."
        )
    whole_numbers = np.array_equal(sitk.GetArrayViewFromImage(scan), sitk.GetArrayFromImage(scan).round())
    for copy, name in enumerate(names):
        if (folder / name).is_file():
            continue
        rng = np.random.default_rng([seed, copy, zlib.crc32(names[0].encode())])
        moved = transform if copy == 0 else reg.jittered(transform, grid, reg.Jitter(), rng)
        volume = reg.resample(scan, moved, grid, smoothing)
        if whole_numbers and volume.max() < 32767:
            volume = volume.round().astype(np.int16)
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(gzip.compress(nibabel.Nifti1Image(volume, grid.affine).to_bytes(), 5, mtime=0))
