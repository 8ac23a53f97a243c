"""Prepared volumes in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from monai.data import MetaTensor
from monai.transforms import Compose
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from .reading import DataArguments, check_columns, class_of, decode_nifti, read_scans
from .split import PARTS, load_split
from .transforms import to_meta_tensor, volume_transform

JITTER_COLUMN = "jitter"
"""Says which changed copy of a scan a row is; 0 is the scan itself."""


def prepare(nifti: dict, name: str, transform: Compose) -> MetaTensor:
    """A row's NIfTI through ``volume_transform``; what cannot be used is refused (ValueError) by its name."""
    scan = to_meta_tensor(*decode_nifti(nifti, name))
    try:
        return transform(scan)
    except RuntimeError as error:  # MONAI's wrapper of what a transform raised
        raise ValueError(f"scan of {name} cannot be prepared: {error.__cause__ or error}") from error


class VolumeDataset(TorchDataset):
    """Volumes of some subjects, prepared once by ``volume_transform`` and kept in memory.

    An item is ``{"volume": MetaTensor (C, X, Y, Z) float32 in [0, 1] with its affine, "class_label": int,
    "subject": str}``; scans of one subject stand together, subjects in sorted order. ``metadata`` has the other columns
    of the source, one row per item; ``class_names`` are those of ``args`` (the last label is a scan without one),
    and so is ``registered``.
    Subjects are text, also where their column holds numbers. Where the source has a column ``jitter``, rows with
    another number than 0 in it are changed copies (examples/prepare_dataset.py): they are left out unless asked for.

    Args:
        source: folder or ``datasets.Dataset`` (see ``read_scans``).
        subjects: which subjects; every one must have a scan.
        args: columns, size, spacing and classes.
        jittered_copies: whether to read them too; only what trains may.
    """

    def __init__(
        self, source: str | Path | Dataset, subjects: Sequence[str], args: DataArguments, jittered_copies: bool = False
    ) -> None:
        rows = read_scans(source)
        if JITTER_COLUMN in rows.column_names and not jittered_copies:
            rows = rows.select([i for i, copy in enumerate(rows[JITTER_COLUMN]) if copy == 0])
        check_columns(rows, args)
        wanted = set(map(str, subjects))
        if not wanted:
            raise ValueError("no subjects were asked for.")
        found = [str(subject) for subject in rows[args.subject_column]]
        absent = sorted(wanted - set(found))
        if absent:
            raise ValueError(f"{len(absent)} subject(s) of the split have no scan, the first is {absent[0]!r}.")
        transform = volume_transform(args.volume_shape, args.spacing, args.antialias, args.registered)
        order = sorted((subject, i) for i, subject in enumerate(found) if subject in wanted)
        self.metadata = rows.select([i for _, i in order]).remove_columns("nifti")
        self.class_names = list(args.class_names)
        self.registered = args.registered
        self.items = []
        for subject, i in tqdm(order, desc="reading scans", unit="scan"):
            row = rows[i]
            volume = prepare(row["nifti"], subject, transform)
            label = class_of(row[args.label_column], args.class_names, args.class_edges)
            self.items.append({"volume": volume, "class_label": label, "subject": subject})

    @classmethod
    def from_arguments(cls, args: DataArguments, part: str, jittered_copies: bool = False) -> "VolumeDataset":
        """Volumes of a part of the split: "train", "validation", "test", or fold "a" or "b" of train."""
        split = load_split(args.split_file)
        parts = {**{name: split[name] for name in PARTS}, **split["folds"]}
        if part not in parts:
            raise ValueError(f"unknown part {part!r} of the split, expected one of {list(parts)}.")
        return cls(args.data_dir, parts[part], args, jittered_copies)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]

    def stack(self) -> torch.Tensor:
        """All volumes as one plain tensor (N, C, X, Y, Z)."""
        return torch.stack([item["volume"].as_tensor() for item in self.items])
