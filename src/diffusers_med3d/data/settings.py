"""How a data set becomes volumes and classes: said once, kept with the data, stored in every model, compared later."""

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from diffusers import ConfigMixin, DiffusionPipeline

from ..utils.checks import three_numbers
from ..utils.files import read_json, write_json
from .tables import METADATA_NAMES, list_files, read_table

DATASET_FILE = "dataset.json"
"""File beside metadata.csv that holds the ``DataSettings`` of a data set."""

INTENSITY = "0: background; 1: the scan's 99.5th percentile above 0"
"""What ``transforms.scale_foreground`` does, in words."""


GRID = ("volume_shape", "spacing", "orientation", "antialias", "registration")
"""Settings that decide which voxels a network sees."""

VOXELS = GRID[1:]
"""Those that a network must share with its volumes which takes any size of them."""

CLASSES = ("label_column", "class_names", "class_edges")
"""Settings that decide which class a scan has."""


@dataclass
class DataSettings:
    """What every stage must agree on about its volumes; None where nothing is said.

    Args:
        volume_shape: size (X, Y, Z) in voxels.
        spacing: voxel size (X, Y, Z) in mm.
        orientation: axes of the volumes; only "RAS".
        intensity: in words, what 0 and 1 stand for.
        antialias: whether scans are smoothed before they are resampled to larger voxels.
        registration: in words or by the name of a template, the frame that the scans were registered to.
        channel_names: one name per channel.
        subject_column, label_column: columns of the metadata.
        class_names: names of the classes in order; an empty list is a data set without classes.
        class_edges: see ``class_of``.

    Raises:
        ValueError: a value that cannot be meant.
    """

    volume_shape: list[int] | None = None
    spacing: list[float] | None = None
    orientation: str | None = None
    intensity: str | None = None
    antialias: bool | None = None
    registration: str | None = None
    channel_names: list[str] | None = None
    subject_column: str | None = None
    label_column: str | None = None
    class_names: list[str] | None = None
    class_edges: list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("intensity", "registration", "subject_column", "label_column"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r:.60}.")
        if not isinstance(self.antialias, bool | None):
            raise ValueError(f"antialias must be true or false, got {self.antialias!r:.60}.")
        for name, kind in (
            *((name, numbers.Real) for name in ("volume_shape", "spacing", "class_edges")),
            *((name, object) for name in ("channel_names", "class_names")),
        ):
            values = getattr(self, name)
            if values is not None and (
                not isinstance(values, list | tuple) or not all(isinstance(value, kind) for value in values)
            ):
                raise ValueError(
                    f"{name} must be a list{' of numbers' if kind is numbers.Real else ''}, got {values!r}."
                )
        for name in ("volume_shape", "spacing"):
            values = getattr(self, name)
            sides = None if values is None else three_numbers(values)
            if values is not None and (sides is None or not all(0 < side < 1e9 for side in sides)):
                raise ValueError(f"{name} must be three positive numbers (X, Y, Z), got {list(values)!r:.200}.")
        if self.volume_shape is not None:
            if any(side != int(side) for side in self.volume_shape):
                raise ValueError(f"volume_shape must be whole numbers, got {list(self.volume_shape)}.")
            self.volume_shape = [int(side) for side in self.volume_shape]
        if self.spacing is not None:
            self.spacing = [float(side) for side in self.spacing]
        if self.orientation not in (None, "RAS"):
            raise ValueError(f"orientation must be 'RAS', got {self.orientation!r}.")
        for name in ("channel_names", "class_names"):
            if getattr(self, name) is not None:
                setattr(self, name, [str(value) for value in getattr(self, name)])
        if self.class_edges is not None:
            if any(not abs(edge) < 1e300 for edge in self.class_edges):
                raise ValueError(f"class_edges must be finite, got {self.class_edges!r:.200}.")
            self.class_edges = [float(edge) for edge in self.class_edges]
            if self.class_edges != sorted(self.class_edges):
                raise ValueError(f"class_edges must rise, got {self.class_edges}.")
        if self.class_edges and self.class_names is not None and len(self.class_edges) != len(self.class_names) - 1:
            wanted = max(len(self.class_names) - 1, 0)
            raise ValueError(f"{len(self.class_names)} classes need {wanted} class_edges, got {self.class_edges}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSettings) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Settings from JSON; a name that is none of them is refused (ValueError), lest a typing error is ignored."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{where} holds {unknown}, which are no settings; known are {known}.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What is said, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


UNSET: Any = None
"""Default of a field that has a value wherever it is read; a type checker need not ask."""


@dataclass(eq=False)
class FullSettings(DataSettings):
    """``DataSettings`` that say everything a loader needs, as ``with_defaults`` makes them."""

    volume_shape: list[int] = UNSET
    spacing: list[float] = UNSET
    antialias: bool = UNSET
    subject_column: str = UNSET
    class_names: list[str] = UNSET
    class_edges: list[float] = UNSET


def read_settings(folder: str | Path) -> DataSettings:
    """Settings of a data set from its ``dataset.json``; nothing is said where there is none."""
    path = Path(folder) / DATASET_FILE
    if not path.is_file():
        return DataSettings()
    return DataSettings.from_dict(read_json(path), str(path))


def write_settings(settings: DataSettings, folder: str | Path) -> Path:
    """Write ``dataset.json`` beside the metadata; returns its path."""
    path = Path(folder) / DATASET_FILE
    write_json(path, settings.to_dict())
    return path


def settings_of(model: ConfigMixin) -> DataSettings:
    """Settings that a pipeline, an autoencoder or a reward model was trained with, from its config.

    A model of which nothing is known (of an older version, or converted) gives settings that say nothing.
    """
    values = dict(model.config.get("data_settings") or {})
    if isinstance(model, DiffusionPipeline):  # its own config says what it makes, its autoencoder the rest of the grid
        if values.get("class_names", []) != (model.config["class_names"] or []):  # it knows more classes, or others
            values = {name: value for name, value in values.items() if name not in CLASSES}
        known = settings_of(model.components["vae"]).to_dict()
        values = {name: known[name] for name in GRID if name in known} | values
        for name in ("volume_shape", "spacing", "orientation", "class_names", "channel_names"):
            value = model.config[name]
            if value is not None and not isinstance(value, dict):  # names with gaps, of MAISI, are no data set's
                values[name] = list(value) if isinstance(value, list | tuple) else value
    return DataSettings.from_dict(values, f"the config of {type(model).__name__}")


def combine_settings(*sources: tuple[str, DataSettings], only: tuple[str, ...] | None = None) -> DataSettings:
    """What several sources say together.

    Args:
        sources: (name for messages, settings), in any order.
        only: names of the settings that are compared and kept; None for all.

    Raises:
        ValueError: two sources that contradict each other, with both values and names.
    """
    together: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for where, settings in sources:
        for name, value in settings.to_dict().items():
            if only is not None and name not in only:
                continue
            if name in together and together[name] != value:
                raise ValueError(
                    f"{name} is {value} by {where}, but {together[name]} by {said_by[name]}; they must agree."
                )
            together.setdefault(name, value)
            said_by.setdefault(name, where)
    return DataSettings(**together)


def check_same_settings(
    first: DataSettings, second: DataSettings, names: tuple[str, str], only: tuple[str, ...] = GRID
) -> None:
    """Refuse two settings that contradict each other (ValueError with both values), where both say something."""
    combine_settings((names[0], first), (names[1], second), only=only)


DEFAULT_GRID: dict[str, Any] = {"volume_shape": [64, 64, 64], "spacing": [3.0, 3.0, 3.0]}
DEFAULT_READING: dict[str, Any] = {
    "orientation": "RAS",
    "intensity": INTENSITY,
    "antialias": False,
    "subject_column": "participant_id",
}
DEFAULT_CLASSES: dict[str, Any] = {"class_names": ["young", "middle", "old"], "class_edges": [35.0, 60.0]}


def with_defaults(settings: DataSettings, columns: list[str] | None) -> tuple[FullSettings, list[str]]:
    """Settings that say everything a loader needs, and sentences that tell which defaults were taken.

    Args:
        settings: what is known.
        columns: of the metadata, None where they are not known. Without a column "age", and with nothing said about
            classes, the data set has none.
    """
    values, notes = settings.to_dict(), []
    grid = {name: value for name, value in DEFAULT_GRID.items() if name not in values}
    if grid:
        said = " and ".join(f"{name} {value}" for name, value in grid.items())
        notes.append(f"Nothing says otherwise, so the default is taken: {said}.")
    values = DEFAULT_GRID | DEFAULT_READING | values
    if "class_names" not in values and "label_column" not in values and columns is not None and "age" not in columns:
        notes.append("No labels are named and there is no column 'age': the scans have no classes (unconditional).")
        values["class_names"] = []
    if values.get("class_names") != []:
        values.setdefault("label_column", "age")
        if "class_names" not in values:
            values = DEFAULT_CLASSES | values
            notes.append(
                f"Nothing says otherwise, so the default is taken: classes {values['class_names']} from the column "
                f"{values['label_column']!r} with the edges {values['class_edges']}."
            )
        elif values["class_names"] == DEFAULT_CLASSES["class_names"] and values["label_column"] == "age":
            values = DEFAULT_CLASSES | values
    values.setdefault("class_edges", [])
    return FullSettings(**values), notes


def metadata_columns(folder: str | Path) -> list[str] | None:
    """Columns of the first metadata table of a folder; None where there is none that can be read."""
    table = next((path for path in list_files(folder) if path.name in METADATA_NAMES), None)
    if table is None:
        return None
    try:
        return list(read_table(table))
    except ValueError:
        return None  # reading the scans will say what is wrong
