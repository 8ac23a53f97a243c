"""What samples are asked for: the class and the network's other conditions, one sample per row of a table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor

from ..data import VolumeDataset
from ..models import DiffusionUNetMaisi3D
from ..utils.wrappers import unwrapped
from .med_diffusion_3d import MedDiffusion3DPipeline

LABEL_COLUMN = "class_label"


class Conditions(NamedTuple):
    """What B samples are asked for, as the network takes it."""

    class_labels: Tensor | None  # (B,), None for a network without classes
    others: dict[str, Tensor] | None  # name -> (B,), spacing (B, 3); None for a network that takes none

    def take(self, index: slice | Tensor) -> "Conditions":
        """Those of some of the samples."""
        labels = None if self.class_labels is None else self.class_labels[index]
        others = None if self.others is None else {name: values[index] for name, values in self.others.items()}
        return Conditions(labels, others)


def as_conditions(rows: Any, name: str) -> datasets.Dataset:
    """Return a table of conditions, one row per sample, from a `datasets.Dataset` or a list of dicts.

    Args:
        rows: what a user gave.
        name: of the argument, for messages.

    Raises:
        ValueError: something else, or no row.
    """
    example = "e.g. Dataset.from_dict({'class_label': [0]})"
    if isinstance(rows, list | tuple) and rows and all(isinstance(row, dict) for row in rows):
        names = [sorted(row) for row in rows]
        if any(one != names[0] for one in names):
            raise ValueError(f"the rows of {name} must have the same keys, got {names[0]} and others.")
        rows = datasets.Dataset.from_list(list(rows))
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError(
            f"{name} is a stream, whose rows cannot be drawn; give {name}=Dataset.from_list(list(stream))."
        )
    if rows is not None and not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"{name} must be a datasets.Dataset or a list of dicts, one per condition, got a {type(rows).__name__}; "
            f"{example}."
        )
    if rows is None or len(rows) == 0:
        raise ValueError(f"{name} must hold at least one condition, {example}.")
    return rows


def takes_spacing(pipeline: MedDiffusion3DPipeline) -> bool:
    """Whether the voxel size is a condition of the network; it is the pipeline's for all samples."""
    unet = unwrapped(pipeline.unet)
    return isinstance(unet, DiffusionUNetMaisi3D) and "spacing" in unet.condition_names


def condition_names(pipeline: MedDiffusion3DPipeline) -> list[str]:
    """What the network takes besides class and spacing."""
    unet = unwrapped(pipeline.unet)
    names = unet.condition_names if isinstance(unet, DiffusionUNetMaisi3D) else ()
    return [name for name in names if name != "spacing"]


def condition_columns(pipeline: MedDiffusion3DPipeline, found: Sequence[str]) -> list[str]:
    """Columns that the network's conditions besides class and spacing come from: those of their names.

    Raises:
        ValueError: one that is not among the columns ``found``.
    """
    names = condition_names(pipeline)
    for name in names:
        if name not in found:
            raise ValueError(
                f"there is no column {name!r}, only {list(found)}; this network takes the conditions {names} besides "
                f"class and spacing, each from a column of its name."
            )
    return names


def call_arguments(pipeline: MedDiffusion3DPipeline, rows: datasets.Dataset) -> dict[str, Any]:
    """`class_labels` and `conditions` of a call of the pipeline that makes one sample per row.

    Args:
        pipeline: whose UNet says in ``condition_names`` what else it takes; the spacing is the pipeline's own.
        rows: column `class_label` (index, name or None; without it all are the null class), and one for every condition
            by its name. Other columns are left alone.

    Raises:
        ValueError: a condition without a column, or a column "spacing" for a network that takes the spacing.
    """
    if takes_spacing(pipeline) and "spacing" in rows.column_names:
        raise ValueError(
            f"a column 'spacing' cannot condition the samples: all of them have the pipeline's, "
            f"{tuple(pipeline.config.spacing)} mm; set it with pipeline.register_to_config(spacing=...)."
        )
    conditions = {name: list(rows[name]) for name in condition_columns(pipeline, rows.column_names)}
    labels = list(rows[LABEL_COLUMN]) if LABEL_COLUMN in rows.column_names else [None] * len(rows)
    return {"class_labels": labels, "conditions": conditions or None}


def encode_rows(pipeline: MedDiffusion3DPipeline, rows: datasets.Dataset) -> Conditions:
    """`call_arguments` as a call of the pipeline encodes them.

    Raises:
        ValueError: see `call_arguments`; a class or a value that the network cannot take.
    """
    arguments = call_arguments(pipeline, rows)
    return Conditions(
        pipeline.encode_class_labels(arguments["class_labels"], len(rows)),
        pipeline.encode_conditions(arguments["conditions"], None, len(rows)),
    )


def names_by_index(pipeline: MedDiffusion3DPipeline) -> dict[int, str]:
    """Return the class names of a pipeline by their index; empty where classes have none."""
    names = pipeline.config.class_names or []
    return {index: name for name, index in names.items()} if isinstance(names, dict) else dict(enumerate(names))


def rows_to_sample(pipeline: MedDiffusion3DPipeline, path: str | Path | None = None) -> datasets.Dataset:
    """Return the table in a JSON file of columns, one row per condition; without a file one row per class, or the one
    row of a generator without classes.

    Args:
        pipeline: whose classes are listed.
        path: file such as ``{"class_label": ["ct", "mri"], "age": [0.2, 0.7]}``, with all that the network takes but
            the spacing, which is the pipeline's.

    Raises:
        OSError, ValueError: no such file, or no columns of one length in it.
    """
    if path is None:
        names = list(names_by_index(pipeline).values())
        return datasets.Dataset.from_dict({LABEL_COLUMN: names} if names else {"sample": [0]})
    columns = json.loads(Path(path).read_text())
    lists = isinstance(columns, dict) and all(isinstance(values, list) for values in columns.values())
    lengths = {len(values) for values in columns.values()} if lists else set()
    if len(lengths) != 1:
        raise ValueError(
            f"{path} must hold columns of one length, {{name: [value, ...], ...}}, got {str(columns)[:80]}."
        )
    return datasets.Dataset.from_dict(columns)


def labels_of_scans(
    pipeline: MedDiffusion3DPipeline, labels: Sequence[int], class_names: Sequence[str]
) -> list[int | str | None]:
    """Labels of scans as the pipeline takes them.

    Args:
        pipeline: MAISI's networks number their classes in their own way, so where classes have names these decide.
        labels: indices into ``class_names``; ``len(class_names)`` is a scan without a label.
    """
    if pipeline.unet.null_class is None:
        return [None] * len(labels)
    named = isinstance(unwrapped(pipeline.unet), DiffusionUNetMaisi3D) or pipeline.config.class_names is not None
    return [None if i == len(class_names) else class_names[i] if named else i for i in labels]


def scan_rows(pipeline: MedDiffusion3DPipeline, scans: VolumeDataset) -> datasets.Dataset:
    """The table under which samples are asked for that are like these scans, one row per scan: their class, and from
    their metadata what else the network takes.

    Raises:
        ValueError: a condition that the metadata have no column for; scans of another voxel size than the pipeline's,
            for a network that takes it.
    """
    spacing = scans[0]["volume"].affine[:3, :3].norm(dim=0)
    if takes_spacing(pipeline) and not torch.allclose(spacing, spacing.new_tensor(pipeline.config.spacing), rtol=1e-3):
        raise ValueError(
            f"the scans are read at {spacing.tolist()} mm, this pipeline makes {tuple(pipeline.config.spacing)} mm and "
            "its network takes that as a condition; read the scans at the same spacing."
        )
    columns = condition_columns(pipeline, scans.metadata.column_names)
    labels = labels_of_scans(pipeline, [item["class_label"] for item in scans], scans.class_names)
    return datasets.Dataset.from_dict({LABEL_COLUMN: labels} | {name: list(scans.metadata[name]) for name in columns})
