"""The scripts' arguments about scans; what is not given comes from the data set, the split and earlier models."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .settings import (
    CLASSES,
    DATASET_FILE,
    DEFAULT_GRID,
    GRID,
    UNSET,
    DataSettings,
    combine_settings,
    metadata_columns,
    read_settings,
    with_defaults,
)
from .split import read_split_settings
from .transforms import FITS

FLAGS = "the flags"


@dataclass
class DataArguments:
    """Where the scans are and how they become volumes; shared by the scripts of all stages.

    What is not given is read from ``dataset.json`` in ``data_dir`` and from the split file, then ``adopt`` may take it
    from a model, then there are defaults. After construction every setting has a value.
    """

    data_dir: str = field(metadata={"help": "Folder of NIfTI files with metadata.csv, as `datasets`' niftifolder."})
    split_file: str = field(metadata={"help": "JSON file with the split by subject (examples/make_split.py)."})
    volume_shape: list[int] = field(
        default=UNSET, metadata={"help": "Size (X, Y, Z) in voxels after crop and pad; 64 64 64 if nothing says it."}
    )
    spacing: list[float] = field(
        default=UNSET, metadata={"help": "Voxel size (X, Y, Z) in mm after resampling; 3 3 3 if nothing says it."}
    )
    subject_column: str = field(
        default=UNSET, metadata={"help": "Column that names the subject; participant_id if nothing says it."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column that the class is made from; age if nothing says it."}
    )
    class_names: list[str] = field(
        default=UNSET,
        metadata={
            "help": "Names of the classes in order; the null class comes after them and is not named. young middle old "
            "if nothing says it and there are ages, else no classes."
        },
    )
    class_edges: list[float] = field(
        default=UNSET,
        metadata={
            "help": "For a number in label_column: class 0 is <= the first edge, the last class is >= the last edge; "
            "one edge alone belongs to class 0. 35 60 if no class_names are given either; class_names without edges "
            "are those in label_column."
        },
    )
    antialias: bool | None = field(
        default=None,
        metadata={
            "help": "Before resampling, smooth along every axis whose voxels get larger: else detail finer than the "
            "new voxels folds into coarser patterns. The bundled checkpoints (2 to 3 mm) are made without."
        },
    )
    registration: str | None = field(
        default=None,
        metadata={
            "help": "The frame that the scans were registered to, in words (prepare_dataset.py writes it): they lie on "
            "one grid of volume_shape and spacing and are taken as they lie."
        },
    )
    num_channels: int | None = field(
        default=None,
        metadata={"help": "Channels of every scan. Needed for a 4-D file that would pass for a time series."},
    )
    fit: str = field(
        default="refuse",
        metadata={
            "help": "Anatomy that is larger than volume_shape x spacing: refuse it, shrink the scan until it fits, or "
            "crop it about its centre.",
            "choices": list(FITS),
        },
    )

    def __post_init__(self) -> None:
        given = DataSettings(**{name: getattr(self, name) for name in self._names()})
        sources = [(FLAGS, given)]
        if self.data_dir and Path(self.data_dir).is_dir():
            sources.append((str(Path(self.data_dir) / DATASET_FILE), read_settings(self.data_dir)))
        if self.split_file and Path(self.split_file).is_file():
            sources.append((self.split_file, read_split_settings(self.split_file)))
        self._sources = sources
        self._said: set[str] = set()
        self._complete()

    @staticmethod
    def _names() -> list[str]:
        own = {one.name for one in fields(DataArguments)}
        return [one.name for one in fields(DataSettings) if one.name in own]

    def _columns(self) -> list[str] | None:
        return metadata_columns(self.data_dir) if self.data_dir and Path(self.data_dir).is_dir() else None

    def _complete(self) -> None:
        self.settings, self.notes = with_defaults(combine_settings(*self._sources), self._columns())
        for name in self._names():
            setattr(self, name, getattr(self.settings, name))
        if self.num_channels is None and self.settings.channel_names:
            self.num_channels = len(self.settings.channel_names)

    def adopt(self, settings: DataSettings, where: str) -> None:
        """Take grid and channels of a model (``settings_of``) where neither flags nor data set nor split say them.

        So are the classes, if nothing at all is said about them and the metadata have the model's label column. What
        is said wins without a word: a generator may know more classes than the data, or others.

        Args:
            settings: of the model.
            where: its name, for messages.

        Raises:
            ValueError: it contradicts them; with both values.
        """
        known = settings.to_dict()
        taken = [*GRID, "channel_names"]
        said = combine_settings(*self._sources).to_dict()
        if not said.keys() & set(CLASSES) and known.get("label_column") in (self._columns() or ()):
            taken += CLASSES
        known = {name: known[name] for name in taken if name in known}
        self._sources.append((where, DataSettings(**known)))
        try:
            self._complete()
        except ValueError:
            self._sources.pop()
            raise

    def settings_for_split(self) -> DataSettings:
        """What a split file keeps: how the classes are made, which it depends on, and what the flags say."""
        labels = ("subject_column", "label_column", "class_names", "class_edges")
        given, everything = self._sources[0][1].to_dict(), self.settings.to_dict()
        return DataSettings(**given | {name: everything[name] for name in labels if name in everything})

    def say_defaults(self) -> None:
        """Print the notes, such as which defaults were taken because nothing says otherwise; each once, by the first
        process.
        """
        if int(os.environ.get("RANK", "0")) == 0:
            for note in self.notes:
                if note not in self._said:
                    print(note, flush=True)
        self._said.update(self.notes)
        self.notes = []

    def reading(self) -> dict[str, Any]:
        """Keyword arguments of ``VolumeDataset``: all but source and subjects. A grid that nothing says stays None."""
        names = [*self._names(), "num_channels", "fit"]
        stated = combine_settings(*self._sources).to_dict()
        return {name: getattr(self, name) if name in stated or name not in DEFAULT_GRID else None for name in names}
