"""What samples are asked for: the class and the network's other conditions, one sample per row of a table."""

from typing import Any, NamedTuple

import datasets
from torch import Tensor

from ..models import DiffusionUNetMaisi3D
from ..pipeline import MedDiffusion3DPipeline

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


def call_arguments(pipeline: MedDiffusion3DPipeline, rows: datasets.Dataset) -> dict[str, Any]:
    """`class_labels` and `conditions` of a call of the pipeline that makes one sample per row.

    Args:
        pipeline: whose UNet says in ``condition_names`` what else it takes; spacing is the pipeline's own.
        rows: column `class_label` (index, name or None; without it all are the null class), and one for every condition
            by its name. Other columns are left alone.

    Raises:
        ValueError: a condition without a column, or a column "spacing" for a network that takes the spacing.
    """
    names = pipeline.unet.condition_names if isinstance(pipeline.unet, DiffusionUNetMaisi3D) else ()
    if "spacing" in names and "spacing" in rows.column_names:
        raise ValueError(
            f"a column 'spacing' cannot condition the samples: all of them have the pipeline's, "
            f"{tuple(pipeline.config.spacing)} mm; set it with pipeline.register_to_config(spacing=...)."
        )
    names = [name for name in names if name != "spacing"]
    for name in names:
        if name not in rows.column_names:
            raise ValueError(
                f"there is no column {name!r}, only {rows.column_names}; this network takes the conditions {names} "
                f"besides class and spacing, each from a column of its name."
            )
    labels = list(rows[LABEL_COLUMN]) if LABEL_COLUMN in rows.column_names else [None] * len(rows)
    return {"class_labels": labels, "conditions": {name: list(rows[name]) for name in names} or None}


def encode_rows(pipeline: MedDiffusion3DPipeline, rows: datasets.Dataset) -> Conditions:
    """As a call of the pipeline with `call_arguments` encodes them.

    Raises:
        ValueError: see `call_arguments`; a class or a value that the network cannot take.
    """
    arguments = call_arguments(pipeline, rows)
    return Conditions(
        pipeline.encode_class_labels(arguments["class_labels"], len(rows)),
        pipeline.encode_conditions(arguments["conditions"], None, len(rows)),
    )
