"""Prepared volumes in memory."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import ConfigMixin
from monai.data import MetaTensor
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..utils.wording import few, times
from .arguments import DataArguments
from .grid import odd_sizes, odd_spacings
from .labels import classes_of
from .nifti import check_affine, check_voxels, decode_nifti, scan_name
from .reading import check_columns, check_scans, read_scans
from .settings import (
    DATASET_FILE,
    GRID,
    DataSettings,
    combine_settings,
    read_settings,
    settings_of,
    with_defaults,
)
from .split import PARTS, load_split
from .tables import as_numbers
from .transforms import Placement, place, refuse_cut, to_meta_tensor

JITTER_COLUMN = "jitter"
"""Says which changed copy of a scan a row is (examples/prepare_dataset.py --jittered_copies); 0 is the scan itself."""


def _place(
    scan: MetaTensor,
    name: str,
    volume_shape: Sequence[int],
    spacing: Sequence[float],
    antialias: bool,
    fit: str,
    registered: bool,
) -> tuple[MetaTensor, Placement]:
    try:
        return place(scan, volume_shape, spacing, antialias, fit, registered)
    except ValueError as error:
        raise ValueError(f"scan of {name} cannot be prepared: {error}") from error


def prepare(
    scan: str | Path | MetaTensor,
    like: ConfigMixin | DataSettings | None = None,
    *,
    volume_shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    antialias: bool | None = None,
    num_channels: int | None = None,
    fit: str = "refuse",
) -> MetaTensor:
    """Volume of one scan as pipelines and rewards take it: (C, X, Y, Z) float32 in [0, 1], RAS, with its affine.

    ``pipe(volumes=prepare(path, like=pipe), strength=0.3)`` gives a volume that overlays the scan.

    Args:
        scan: path of a NIfTI file, or a MetaTensor (X, Y, Z) or (C, X, Y, Z) whose affine leads to RAS millimetres.
        like: pipeline, model or settings whose grid is taken. Where its training scans were registered to a frame, the
            scan must be too (examples/prepare_dataset.py --register): it must lie on the grid and stays as it lies.
        volume_shape, spacing, antialias: the grid itself, where ``like`` does not say it.
        num_channels: see ``nifti.check_header``.
        fit: see ``volume_transform``.

    Raises:
        ValueError: a scan that cannot be used, or a grid that nothing says or that is said twice in two ways.
    """
    given = DataSettings(
        volume_shape=None if volume_shape is None else list(volume_shape),
        spacing=None if spacing is None else list(spacing),
        antialias=antialias,
    )
    theirs = DataSettings() if like is None else like if isinstance(like, DataSettings) else settings_of(like)
    settings = combine_settings(("the arguments", given), ("like", theirs), only=GRID)
    if settings.volume_shape is None or settings.spacing is None:
        raise ValueError("the grid is not known; give like=pipeline, or volume_shape= and spacing=.")
    if isinstance(scan, MetaTensor):
        name, scan = "MetaTensor", _checked(scan)
    else:
        path = Path(scan)
        if not path.is_file():
            raise FileNotFoundError(f"no such scan: {path}")
        name = path.name
        scan = to_meta_tensor(*decode_nifti({"path": str(path), "bytes": None}, name, num_channels))
    grid = settings.volume_shape, settings.spacing
    registered = settings.registration is not None
    volume, placement = _place(scan, name, *grid, bool(settings.antialias), fit, registered)
    if fit == "refuse":
        refuse_cut({f"scan of {name}": placement}, *grid)
    return volume


def _checked(scan: MetaTensor) -> MetaTensor:
    """A MetaTensor as `to_meta_tensor` makes them."""
    if scan.ndim not in (3, 4):
        raise ValueError(f"a scan must have shape (X, Y, Z) or (C, X, Y, Z), got {tuple(scan.shape)}.")
    voxels = scan.as_tensor()
    if voxels.is_complex():
        raise ValueError("a scan must not be complex; pass its magnitude, scan.abs().")
    voxels = voxels.float().cpu().numpy()
    check_voxels(voxels, "the MetaTensor")
    affine = check_affine(scan.affine.cpu().numpy(), "the MetaTensor")
    return to_meta_tensor(voxels if voxels.ndim == 3 else np.moveaxis(voxels, 0, -1), affine)


class VolumeDataset(TorchDataset):
    """Volumes of some subjects, prepared once by ``volume_transform`` and kept in memory.

    An item is ``{"volume": MetaTensor (C, X, Y, Z) float32 in [0, 1] with its affine, "class_label": int,
    "subject": str}``; scans of one subject stand together, subjects in sorted order. ``metadata`` has the other columns
    of the source, one row per item; ``class_names`` are the classes, the last label is a scan without one. Subjects
    are text exactly as written. Rows with another number than 0 in a column ``jitter`` are changed copies of scans:
    they are left out unless asked for. ``settings`` is what all of it was read with, ``placements`` how each scan lies
    in the grid, ``other_subjects`` who else is in the source.

    What is not given (None) is taken from ``dataset.json`` in the folder; else the grid is 64^3 at 3 mm, subjects stand
    in "participant_id", and the classes are young, middle and old by the column "age", or none where there is none.

    Args:
        source: folder or ``datasets.Dataset`` (see ``read_scans``).
        subjects: which subjects; every one must have a scan. None for all.
        volume_shape: size (X, Y, Z) in voxels.
        spacing: voxel size (X, Y, Z) in mm.
        label_column: column that the class is made from.
        class_names: names of the classes in order; [] for none.
        class_edges: see ``class_of``.
        subject_column: column that names the subject.
        antialias: whether scans are smoothed before they are resampled to larger voxels.
        num_channels: channels of every scan; see ``nifti.check_header``.
        fit: what becomes of anatomy that is larger than the grid; see ``volume_transform``.
        registration: the frame that the scans were registered to, in words: they lie on the grid and stay as they are.
        jittered_copies: whether changed copies are read too; only what trains may.

    Raises:
        ValueError: what cannot be read or used, by name; arguments that contradict ``dataset.json``; scans of several
            voxel sizes, with the odd ones, where nothing says which spacing they are to have.
    """

    def __init__(
        self,
        source: str | Path | Dataset,
        subjects: Sequence[str] | None = None,
        *,
        volume_shape: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        label_column: str | None = None,
        class_names: Sequence[str] | None = None,
        class_edges: Sequence[float] | None = None,
        subject_column: str | None = None,
        antialias: bool | None = None,
        num_channels: int | None = None,
        fit: str = "refuse",
        registration: str | None = None,
        jittered_copies: bool = False,
    ) -> None:
        rows = read_scans(source)
        if JITTER_COLUMN in rows.column_names and not jittered_copies:
            rows = rows.select([i for i, copy in enumerate(rows[JITTER_COLUMN]) if int(copy) == 0])
        given = DataSettings(
            volume_shape=None if volume_shape is None else list(volume_shape),
            spacing=None if spacing is None else list(spacing),
            antialias=antialias,
            registration=registration,
            subject_column=subject_column,
            label_column=label_column,
            class_names=None if class_names is None else list(class_names),
            class_edges=None if class_edges is None else list(class_edges),
        )
        known = DataSettings() if isinstance(source, Dataset) else read_settings(source)
        settings = combine_settings(("the arguments", given), (DATASET_FILE, known))
        self.settings, _ = with_defaults(settings, rows.column_names)
        self.class_names, self.fit = list(self.settings.class_names), fit
        label_column = self.settings.label_column if self.class_names else None
        check_columns(rows, self.settings.subject_column, label_column)
        found = [str(subject) for subject in rows[self.settings.subject_column]]
        wanted = set(found) if subjects is None else set(map(str, subjects))
        if not wanted:
            raise ValueError("no subjects were asked for.")
        absent = sorted(wanted - set(found))
        if absent:
            raise ValueError(f"{len(absent)} subject(s) of the split have no scan, the first is {absent[0]!r}.")
        used = [i for i, subject in enumerate(found) if subject in wanted]
        labels = classes_of(rows, label_column, self.class_names, self.settings.class_edges, used)
        order = sorted((found[i], i) for i in used)
        chosen = rows.select([i for _, i in order])
        if num_channels is None and self.settings.channel_names:
            num_channels = len(self.settings.channel_names)
        num_channels, spacings = check_scans(chosen, [subject for subject, _ in order], num_channels)
        names = [scan_name(entry, subject) for (subject, _), entry in zip(order, chosen["nifti"], strict=True)]
        self._odd = odd_spacings(names, spacings)
        if self._odd and settings.spacing is None:
            raise ValueError(
                f"{self._odd} Nothing says to which grid they are resampled; name it with volume_shape and spacing "
                "(--volume_shape, --spacing, or dataset.json beside the metadata), or let examples/prepare_dataset.py "
                "choose one."
            )
        self.other_subjects = sorted(set(found) - wanted)
        self.metadata = _typed(chosen.remove_columns("nifti"), self.settings.subject_column)
        self.items, self.placements = [], []
        grid = self.settings.volume_shape, self.settings.spacing, self.settings.antialias
        for (subject, i), entry in zip(tqdm(order, desc="reading scans", unit="scan"), chosen["nifti"], strict=True):
            scan = to_meta_tensor(*decode_nifti(entry, subject, num_channels))
            volume, placement = _place(scan, subject, *grid, fit, registered=self.settings.registration is not None)
            self.items.append({"volume": volume, "class_label": labels[i], "subject": subject})
            self.placements.append(placement)
        if fit == "refuse":
            refuse_cut(dict(zip(names, self.placements, strict=True)), *grid[:2])

    @classmethod
    def from_arguments(cls, args: DataArguments, part: str, jittered_copies: bool = False) -> "VolumeDataset":
        """Volumes of a part of the split: "train", "validation", "test", or fold "a" or "b" of train."""
        split = load_split(args.split_file)
        parts = {**{name: split[name] for name in PARTS}, **split["folds"]}
        if part not in parts:
            raise ValueError(f"unknown part {part!r} of the split, expected one of {list(parts)}.")
        args.say_defaults()
        volumes = cls(args.data_dir, parts[part], **args.reading(), jittered_copies=jittered_copies)
        in_no_part = sorted(set(volumes.other_subjects) - {name for one in PARTS for name in split[one]})
        if in_no_part:
            args.notes.append(
                f"{len(in_no_part)} subject(s) of {args.data_dir} are in no part of {args.split_file} and are not "
                f"used: {few(in_no_part)}."
            )
            args.say_defaults()
        return volumes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]

    def __iter__(self) -> Iterator[dict]:
        return iter(self.items)

    def stack(self) -> torch.Tensor:
        """All volumes as one plain tensor (N, C, X, Y, Z)."""
        return torch.stack([item["volume"].as_tensor() for item in self.items])

    def report(self) -> str:
        """Lines that say what was read: counts, classes, grid, field of view, and what does not fit the grid."""
        shape, spacing = self.settings.volume_shape, self.settings.spacing
        sizes = torch.tensor([placement.size for placement in self.placements])  # (N, 3) mm
        grid = torch.tensor([side * step for side, step in zip(shape, spacing, strict=True)])
        largest, middle = sizes.amax(0), sizes.median(0).values
        counts = Counter(item["class_label"] for item in self.items)
        names = (*self.class_names, "no class")
        subjects = len({item["subject"] for item in self.items})
        lines = [
            f"{len(self)} scan(s) of {subjects} subject(s), "
            + ", ".join(f"{names[label]}: {counts[label]}" for label in sorted(counts)),
            f"grid {times(shape)} voxels of {times(spacing)} mm = {times(grid.tolist())} mm; anatomy "
            f"{times(middle.tolist())} mm (median), {times(largest.tolist())} mm (largest)",
        ]
        for what, chosen in (
            ("larger than the grid and cut", [p.shrunk == 1 and p.lost > 0 for p in self.placements]),
            ("larger than the grid and shrunk", [p.shrunk > 1 for p in self.placements]),
        ):
            odd = [item["subject"] for item, one in zip(self.items, chosen, strict=True) if one]
            if odd:
                lines.append(f"{len(odd)} of {len(self)} scans are {what}: {few(odd)}")
        people = [item["subject"] for item in self.items]
        odd_ones = (self._odd and f"{self._odd} All are resampled to the grid.", odd_sizes(people, sizes.tolist()))
        lines += filter(None, odd_ones)
        if (largest < grid / 2).any() or (largest > grid).any():
            proposed = [max(16, 16 * math.ceil(size / step / 16)) for size, step in zip(largest, spacing, strict=True)]
            lines.append(f"at this spacing, --volume_shape {' '.join(map(str, proposed))} would hold all of it")
        if (largest < grid / 2).all():
            finer = [round(float(size) / side * 1.05, 2) for size, side in zip(largest, shape, strict=True)]
            step = max(finer)
            lines.append(f"or, in this grid, --spacing {step} {step} {step} would fill it (if the scans are that fine)")
        return "\n".join(lines)


def _typed(metadata: Dataset, subject_column: str) -> Dataset:
    """Metadata whose columns of text that are all numbers are numbers; subjects stay text."""
    names = metadata.column_names
    for name in names:
        values = metadata[name][:]
        numbers = values if name == subject_column else as_numbers(values)
        if numbers != values:
            metadata = metadata.remove_columns(name).add_column(name, numbers)
    return metadata.select_columns(names)
