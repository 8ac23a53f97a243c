"""Prepare scans for training: bring them into one frame and onto one grid.

    pip install "diffusers-med3d[register]"
    python examples/prepare_dataset.py --register group --input DATA --output REGISTERED \
        --split_file split.json --jittered_copies 14

The training subjects' scans are laid over each other and averaged, then each is registered (affine) to the mean, and
that again; all other scans are registered to the last mean. The brains then have one pose and one size, so a generator
need not learn these, and fit on a smaller grid. ``--jittered_copies`` adds copies of every training scan that are
turned, scaled, shifted and warped a little. Every volume, copies too, is interpolated once, from the scan as it was.

The output is a ``niftifolder``: ``images/``, ``metadata.csv`` with the columns of the input and ``jitter`` (0 for a
scan, 1, 2, ... for its copies), and ``registration.json`` with the grid and every scan's affine, from RAS points of
the grid to RAS points of the scan. A volume that is there already is not made again. Train on it with ``--registered``.
"""

import csv
import gzip
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_med3d.data import decode_nifti, load_split, read_scans
from diffusers_med3d.data import registration as reg
from diffusers_med3d.files import whole_file, write_json


@dataclass
class Arguments:
    """What is prepared and how."""

    input: str = field(metadata={"help": "Folder of NIfTI files with metadata.csv, as `datasets`' niftifolder."})
    output: str = field(metadata={"help": "Folder that the prepared data set is written to."})
    split_file: str = field(metadata={"help": "JSON file with the split by subject; the mean is of its train part."})
    register: str = field(
        default="group", metadata={"help": "group: affine to the mean of the training scans.", "choices": ["group"]}
    )
    volume_shape: list[int] = field(
        default_factory=lambda: [48, 64, 48], metadata={"help": "Size (X, Y, Z) of the grid in voxels."}
    )
    spacing: list[float] = field(
        default_factory=lambda: [3.0, 3.0, 3.0], metadata={"help": "Voxel size (X, Y, Z) of the grid in mm."}
    )
    rounds: int = field(default=3, metadata={"help": "How often the training scans are registered to their mean."})
    smoothing: float = field(
        default=0.7,
        metadata={
            "help": "Standard deviation in mm of a Gaussian before interpolation. 0.7 gives scans of 2 mm on a grid of "
            "3 mm the sharpness and noise that training without registration gives them; 0.95 is without aliasing."
        },
    )
    jittered_copies: int = field(default=0, metadata={"help": "Copies of every training scan with small changes."})
    subject_column: str = field(default="participant_id", metadata={"help": "Column that names the subject."})
    workers: int = field(default=os.cpu_count() or 1, metadata={"help": "Processes."})
    seed: int = field(default=0, metadata={"help": "Of the copies."})


Job = tuple[dict, reg.Grid, np.ndarray | None, np.ndarray | None]
"""Row of a scan, grid, template, and affine of the scan so far."""


def read(row: dict) -> sitk.Image:
    """The scan of a row."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the processes are as many as the cores
    return reg.read_scan(*decode_nifti(row["nifti"], row["nifti"]["path"]))


def align(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """A scan's affine to a template (without one: a shift to the middle of the grid), and the scan on the grid."""
    row, grid, template, start = job
    scan = read(row)
    if template is None:
        transform = reg.centred(scan)
    else:
        start = None if start is None else reg.transform_of(start)
        transform = reg.register(scan, reg.template_image(template, grid), start)
    return reg.affine_of(transform), reg.normalised(scan, transform, grid)


def write_volumes(job: tuple[dict, reg.Grid, np.ndarray, Path, list[str], float, int]) -> float:
    """Write a scan on the grid under the first name and its copies under the others; returns the share cut off."""
    row, grid, affine, folder, names, smoothing, seed = job
    scan, transform = read(row), reg.transform_of(affine)
    cut = reg.cut_share(scan, transform, grid)
    if cut > reg.MAX_CUT:
        raise ValueError(
            f"{names[0]}: {100 * cut:.1f} % of the foreground lies outside the grid {grid.shape} at {grid.spacing} mm; "
            "choose a larger --volume_shape."
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
    return cut


def main() -> None:
    """Register, resample, write."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output, grid = Path(args.output), reg.Grid(tuple(args.volume_shape), tuple(args.spacing))
    rows = list(read_scans(args.input))
    training = set(load_split(args.split_file)["train"])
    trains = [str(row[args.subject_column]) in training for row in rows]
    affines: list[np.ndarray | None] = [None] * len(rows)
    correlations = [0.0] * len(rows)
    record = output / "registration.json"
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:

        def each(function: Callable, jobs: list[tuple], what: str) -> list:
            done = pool.map(function, jobs) if args.workers > 1 else map(function, jobs)
            return list(tqdm(done, what, len(jobs), unit="scan"))

        if record.is_file():
            known = json.loads(record.read_text())
            affines = [np.array(known["scans"][name_of(row)]["affine"]) for row in rows]
        else:
            template = None
            chosen = [i for i, train in enumerate(trains) if train]
            for turn in range(args.rounds + 1):
                found = each(align, [(rows[i], grid, template, affines[i]) for i in chosen], f"round {turn}")
                template = reg.symmetric_mean(volume for _, volume in found)
                if turn:
                    for i, (affine, _) in zip(chosen, found, strict=True):
                        affines[i] = affine
            found = each(align, [(row, grid, template, affines[i]) for i, row in enumerate(rows)], "all scans")
            affines = [affine for affine, _ in found]
            correlations = [reg.correlation(volume, template) for _, volume in found]
            with whole_file(output / "template.nii.gz") as temporary:
                image = nibabel.Nifti1Image(template.astype(np.float32), grid.affine)
                temporary.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
            scans = {
                name_of(row): {"affine": affine.tolist(), "correlation": value}
                for row, affine, value in zip(rows, affines, correlations, strict=True)
            }
            shape = {"volume_shape": args.volume_shape, "spacing": args.spacing, "affine": grid.affine.tolist()}
            write_json(record, {"grid": shape, "template": "template.nii.gz", "scans": scans})
            print(f"correlation with the mean: {np.mean(correlations):.3f}, least {np.min(correlations):.3f}")

        names = [names_of(row, args.jittered_copies if train else 0) for row, train in zip(rows, trains, strict=True)]
        jobs = [
            (row, grid, affine, output, files, args.smoothing, args.seed)
            for row, affine, files in zip(rows, affines, names, strict=True)
        ]
        cuts = each(write_volumes, jobs, "writing volumes")
    print(f"share of the foreground outside the grid: {np.mean(cuts):.5f}, most {np.max(cuts):.5f}")
    columns = [column for column in rows[0] if column not in ("nifti", "jitter")]
    with whole_file(output / "metadata.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *columns, "jitter"])
        for row, files in zip(rows, names, strict=True):
            for copy, name in enumerate(files):
                writer.writerow([name, *(row[column] for column in columns), copy])


def name_of(row: dict) -> str:
    """File name of a scan without its ending."""
    return Path(row["nifti"]["path"]).name.removesuffix(".gz").removesuffix(".nii")


def names_of(row: dict, copies: int) -> list[str]:
    """Where a scan and its copies are written, below the output folder."""
    name = name_of(row)
    return [f"images/{name}.nii.gz", *(f"images/{name}_jitter-{copy:02d}.nii.gz" for copy in range(1, copies + 1))]


if __name__ == "__main__":
    main()
