"""Sets of volumes to be judged: scans, and samples with the scans' class mix, all through one loader."""

import json
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Nifti
from torch import Tensor
from tqdm.auto import tqdm

from ..data import FOREGROUND_THRESHOLD, DataArguments, VolumeDataset, to_meta_tensor, volume_transform
from ..data.nifti import decode_nifti
from ..data.training_subjects import read_training_subjects, refuse_seen_subjects
from ..pipelines.conditions import (
    LABEL_COLUMN,
    call_arguments,
    condition_names,
    encode_rows,
    labels_of_scans,
    scan_rows,
)
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput
from ..utils.files import write_json
from ..utils.hashing import pipeline_hash
from ..utils.seeding import seeded
from .report import FLOOR, REFERENCE
from .volume_set import LeftOut, VolumeSet

SETTINGS = "settings.json"


def clear_background(volumes: Tensor, background: float) -> Tensor:
    """Voxels below `background` become exactly 0, as brain extraction left them in the scans."""
    return torch.where(volumes < background, torch.zeros_like(volumes), volumes)


def volume_set(dataset: VolumeDataset, background: float = FOREGROUND_THRESHOLD) -> VolumeSet:
    """Prepared scans as a set, on the same way as samples: what is under `background` becomes 0, then crop, centring
    and intensity range once more, as `reload_volumes` does it.

    A generator imitates prepared scans, haze around them included; without the second pass a scan would be centred by
    its faintest voxel and a sample by its first plain one.
    """
    volumes, registered = [], dataset.settings.registration is not None
    for item in dataset:
        spacing = item["volume"].affine[:3, :3].norm(dim=0).tolist()
        cleared = clear_background(item["volume"].as_tensor(), background)
        meta = to_meta_tensor(cleared.movedim(0, -1).numpy(), np.diag([*spacing, 1.0]))
        volumes.append(volume_transform(cleared.shape[1:], spacing, registered=registered)(meta).as_tensor())
    return as_set(dataset, torch.stack(volumes), background)


def as_set(dataset: VolumeDataset, volumes: Tensor, background: float) -> VolumeSet:
    labels, subjects = [int(item["class_label"]) for item in dataset], [item["subject"] for item in dataset]
    return VolumeSet(clear_background(volumes, background), labels, subjects)


def matched_labels(reference_labels: Sequence[int], num_samples: int) -> list[int]:
    """Classes of `num_samples` samples in the reference's mix, sorted; rounding by largest remainder.

    Raises:
        ValueError: so few samples that a class of the reference would get none.
    """
    classes = sorted(set(reference_labels))
    exact = [num_samples * list(reference_labels).count(c) / len(reference_labels) for c in classes]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(classes)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: num_samples - sum(counts)]:
        counts[k] += 1
    if min(counts) < 1:
        raise ValueError(
            f"{num_samples} samples leave none for a class of the reference; its classes are {list(reference_labels)}."
        )
    return [c for c, count in zip(classes, counts, strict=True) for _ in range(count)]


def volume_file(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe='')}-0000.nii.gz"


def save_volume(volume: Tensor, name: str, folder: Path, affine: np.ndarray | None, spacing: Sequence[float]) -> None:
    output = MedDiffusion3DPipelineOutput(volumes=volume[None], affine=affine, spacing=tuple(spacing))
    output.save_nifti(folder, prefix=quote(name, safe=""), overwrite=True)


def read_volumes(
    names: Sequence[str], labels: Sequence[int], folder: Path, data: DataArguments, background: float
) -> VolumeSet:
    """Volumes that were saved, through the loader of the scans, in the order of their names.

    What cannot be judged (NaN, empty, a damaged file) is left out with a warning.

    Raises:
        ValueError: none can be judged.
    """
    reasons = [_unusable(volume_file(folder, name), name) for name in names]
    left_out = [
        LeftOut(row, name, label, reason)
        for row, (name, label, reason) in enumerate(zip(names, labels, reasons, strict=True))
        if reason is not None
    ]
    if left_out:
        if len(left_out) == len(names):
            raise ValueError(f"none of {len(names)} volumes can be judged, the first because {left_out[0].reason}")
        labels = [label for label, reason in zip(labels, reasons, strict=True) if reason is None]
        names = [name for name, reason in zip(names, reasons, strict=True) if reason is None]
    classes = [None if label == len(data.class_names) else data.class_names[label] for label in labels]
    rows = Dataset.from_dict({"nifti": [str(volume_file(folder, name)) for name in names], "name": list(names)})
    rows = rows.add_column("class", classes).cast_column("nifti", Nifti(decode=False))
    own = {"class_edges": [], "label_column": "class", "subject_column": "name"}
    dataset = VolumeDataset(rows, names, **data.reading() | own)
    found = replace(as_set(dataset, dataset.stack(), background), left_out=tuple(left_out))
    if left_out:
        warnings.warn(found.note(f"the folder {folder.name}"), stacklevel=2)
    return found


def _unusable(path: Path, name: str) -> str | None:
    """Why a saved volume cannot be judged; None where it can."""
    try:
        decode_nifti({"path": str(path), "bytes": None}, name)
    except ValueError as error:
        return str(error)
    return None


def check_settings(folder: Path, settings: Mapping[str, Any], file: str = SETTINGS) -> None:
    """Writes the settings of a folder without volumes, or refuses one whose volumes were made with others."""
    path, settings = folder / file, json.loads(json.dumps(settings))
    if not path.is_file() or not any(folder.rglob("*.nii.gz")):
        write_json(path, settings)
    found = json.loads(path.read_text())
    if found != settings:
        differing = {key: (found.get(key), value) for key, value in settings.items() if found.get(key) != value}
        raise ValueError(f"{folder} holds volumes made with other settings (found, asked for): {differing}; delete it.")


def reload_volumes(
    volumes: Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    folder: str | Path,
    data: DataArguments,
    affine: np.ndarray,
    background: float = FOREGROUND_THRESHOLD,
) -> VolumeSet:
    """Volumes made by any means, saved as NIfTI and read by the loader of the scans: crop, grid and intensities alike.

    Args:
        volumes: (N, C, X, Y, Z) in [0, 1].
        labels: class of each; `len(data.class_names)` is the null class.
        names: of each, all different; sets with the same names are compared in pairs.
        folder: where the files go; files of these names are replaced.
        data: what the scans are read with.
        affine: voxel to RAS millimetres (4, 4), such as `pipeline.affine()`.
        background: voxels below become 0 before saving.

    Returns:
        the set, ordered by name.
    """
    if len(set(names)) != len(volumes) or len(labels) != len(volumes):
        raise ValueError(
            f"{len(volumes)} volumes need as many labels and different names, got {len(labels)} and {len(set(names))}."
        )
    for volume, name in zip(clear_background(volumes, background), names, strict=True):
        save_volume(volume, name, Path(folder), affine, data.spacing)
    return read_volumes(names, labels, Path(folder), data, background)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """A name for every model that does not tell where it lies on this machine.

    Raises:
        ValueError: two would be alike, or one means the scans in reports.
    """
    paths = {model: Path(model) if Path(model).name not in ("", "..") else Path(model).resolve() for model in models}
    names = {model: path.name for model, path in paths.items()}
    if len(set(names.values())) < len(models):
        names = {model: "/".join(path.parts[-2:]) for model, path in paths.items()}
    if len(set(names.values())) < len(models):
        raise ValueError(f"models must differ in the last two parts of their names, got {list(models)}.")
    taken = sorted({REFERENCE, FLOOR} & set(names.values()))
    if taken:
        raise ValueError(f"a model cannot be called {taken[0]!r}, as the scans are in reports; rename its folder.")
    return names


def check_unseen(model: str, subjects: Collection[str]) -> None:
    """Refuse a generator that was trained on subjects that are to judge it, as far as that is known.

    It is where the list that the training scripts leave beside a generator is there.

    Raises:
        ValueError: with their number and the first of them.
    """
    try:
        trained_on = read_training_subjects(model)
    except FileNotFoundError:
        return
    refuse_seen_subjects(subjects, trained_on, repr(Path(model).name))


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse a seed that is there twice (ValueError)."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, or the same samples would count twice; got {list(seeds)}.")


def check_pipeline(pipeline: MedDiffusion3DPipeline, data: DataArguments) -> None:
    """Refuses a generator whose grid is not that of the scans, or that lacks one of their classes.

    Raises:
        ValueError: with both; another grid would need resampling, which alone moves scans from themselves.
    """
    for name, flag in (("volume_shape", "--volume_shape"), ("spacing", "--spacing")):
        made, read = [float(v) for v in pipeline.config[name]], [float(v) for v in getattr(data, name)]
        if made != read:
            raise ValueError(f"the generator makes {name} {made}, the scans are read at {read}; pass {flag} to match.")
    names = pipeline.config.class_names
    if pipeline.unet.null_class is not None and names is not None and not set(data.class_names) <= set(names):
        raise ValueError(f"the generator's classes are {list(names)}, the scans' {list(data.class_names)}.")


def _within_class(labels: Sequence[int]) -> list[int]:
    """Number of each sample within its class, from 0."""
    return [list(labels[:i]).count(label) for i, label in enumerate(labels)]


def asked_for(
    pipeline: MedDiffusion3DPipeline,
    labels: Sequence[int],
    data: DataArguments,
    like: VolumeDataset | None,
) -> Dataset:
    """Table of what samples are asked for, one row each: the class, and what else the network takes: for sample n of a
    class what the metadata of the class's scan n say (`scan_rows`), round and round where there are fewer scans.

    Args:
        labels: class of each sample.
        like: the scans; only needed for a network that takes more than class and spacing.

    Raises:
        ValueError: no scans, or none of a class; a condition that they do not have or that the network cannot take.
    """
    columns = {LABEL_COLUMN: labels_of_scans(pipeline, labels, data.class_names)}
    names = condition_names(pipeline)
    if names:
        if like is None:
            raise ValueError(f"this generator takes {names} besides the class; give scans to take them from (like=).")
        scans, members = scan_rows(pipeline, like), defaultdict(list)
        for row, item in enumerate(like):
            members[item["class_label"]].append(row)
        absent = sorted(set(labels) - set(members))
        if absent:
            raise ValueError(f"there is no scan of class {absent} to take {names} from.")
        rows = [members[c][n % len(members[c])] for c, n in zip(labels, _within_class(labels), strict=True)]
        columns |= {name: [scans[name][row] for row in rows] for name in names}
    asked = Dataset.from_dict(columns)
    encode_rows(pipeline, asked)  # refuses now what could not be sampled later
    return asked


def sample_volumes(
    pipeline: MedDiffusion3DPipeline,
    labels: Sequence[int],
    folder: str | Path,
    data: DataArguments,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    background: float = FOREGROUND_THRESHOLD,
    like: VolumeDataset | None = None,
    eta: float = 0.0,
) -> VolumeSet:
    """Samples of a generator as a set, through the loader of the scans. Goes on where a killed run stopped.

    A sample is named by seed, class and its number within the class and depends on these alone (to rounding, not on its
    batch) and on the scan that it is to be like: two generators give paired sets, and more samples or seeds only add to
    those that are there. With several processes each makes its share.

    Args:
        pipeline: the generator.
        labels: class of each sample of one seed; `len(data.class_names)` is the null class.
        folder: where the samples are kept; must hold samples of the same generator and settings, or none.
        data: what the scans are read with.
        seeds: every one gives `len(labels)` samples; all different.
        batch_size: samples at once.
        background: voxels below become 0 before saving.
        like: scans whose metadata hold what the network takes besides class and spacing; see `asked_for`.
        eta: noise of DDIM, from 0 (deterministic) to 1.

    Raises:
        ValueError: another grid or other classes than the scans', conditions that are missing, or a folder of other
            samples.
    """
    check_pipeline(pipeline, data)
    pipeline.check_sampling(num_inference_steps, guidance_scale, eta)
    check_seeds(seeds)
    folder, state = Path(folder), PartialState()
    settings = {
        "generator": pipeline_hash(pipeline),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "background": background,
        "classes": list(data.class_names),
    }
    asked = asked_for(pipeline, labels, data, like)
    if like is not None and condition_names(pipeline):
        settings["like"] = scan_rows(pipeline, like).to_dict()
    with state.main_process_first():
        check_settings(folder, settings)
    wanted = [
        (f"seed{seed}-class{label}-{number:04d}", seed, label, number, row)
        for seed in seeds
        for row, (label, number) in enumerate(zip(labels, _within_class(labels), strict=True))
    ]
    missing = [one for one in wanted if not volume_file(folder, one[0]).is_file()]
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(mine), desc="sampling", unit="volume", disable=not mine) as progress:
        for start in range(0, len(mine), batch_size):
            chunk = mine[start : start + batch_size]
            output = pipeline(
                **call_arguments(pipeline, asked.select([row for *_, row in chunk])),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                generator=[seeded("evaluation", seed, label, number) for _, seed, label, number, _ in chunk],
            )
            for volume, (name, *_) in zip(clear_background(output.volumes.cpu(), background), chunk, strict=True):
                save_volume(volume, name, folder, output.affine, data.spacing)
            progress.update(len(chunk))
    state.wait_for_everyone()
    return read_volumes([name for name, *_ in wanted], [one[2] for one in wanted], folder, data, background)
