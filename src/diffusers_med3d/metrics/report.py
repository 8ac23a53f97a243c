"""The answer of `evaluate`: figures with intervals, as a table and for JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .bootstrap import Interval

REFERENCE, FLOOR = "reference", "floor"
Draws = dict[str, NDArray[np.float64]]  # set -> (1 + R,), the figure and its resamples


@dataclass(frozen=True)
class Figure:
    """One measure of every set.

    Args:
        name: what was measured.
        extractor: of features; empty where none is used.
        aim: "lower", "higher", or "scans": the closer to the baseline the better.
        baseline: "floor" or "reference", what `excess` is taken over.
        sets: set -> figure; sets are "reference", "floor" and the models.
        excess: model -> figure less the baseline's.
        differences: "B - A" -> figure of B less that of the first model A, paired where the seeds are the same.
        draws: set -> (1 + R,) the figure and its resamples, in step with those of all other figures and sets.
    """

    name: str
    extractor: str
    aim: str
    baseline: str
    sets: dict[str, Interval]
    excess: dict[str, Interval]
    differences: dict[str, Interval]
    draws: Draws = field(repr=False)


@dataclass(frozen=True)
class Report:
    """What `evaluate` found; all intervals are 95 % bootstrap intervals over subjects and samples."""

    figures: list[Figure]
    counts: dict[str, dict]
    notes: list[str]
    per_volume: dict[str, dict[str, list[float]]]
    spectra: dict[str, dict[str, list[float]]]
    models: list[str]

    def figure(self, name: str, extractor: str = "") -> Figure:
        """The first figure whose name begins with `name`, of an extractor whose name contains `extractor`.

        Raises:
            KeyError: there is none; the message lists the names.
        """
        for figure in self.figures:
            if figure.name.startswith(name) and extractor in figure.extractor:
                return figure
        raise KeyError(f"no figure {name!r} ({extractor!r}); there are {[figure.name for figure in self.figures]}.")

    def table(self) -> str:
        """Markdown: a row per figure; columns for scans, models, their excess over the baseline, and differences."""
        pairs = [f"{name} - {self.models[0]}" for name in self.models[1:]]
        header = ["figure", "extractor", "aim", REFERENCE, FLOOR, *self.models]
        header += [f"{name}: excess" for name in self.models] + pairs
        rows = []
        for figure in self.figures:
            row = [figure.name, figure.extractor.split(",")[0], f"{figure.aim}"]
            row += [str(figure.sets[name]) if name in figure.sets else "" for name in (REFERENCE, FLOOR, *self.models)]
            row += [f"{figure.excess[name]}" if name in figure.excess else "" for name in self.models]
            row += [f"{figure.differences[name]}" if name in figure.differences else "" for name in pairs]
            rows.append(row)
        widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
            for row in [header, *rows]
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything but the resamples, ready for JSON: what is not finite is None."""

        def plain(value: object) -> object:
            if isinstance(value, Interval):
                return plain({"value": value.value, "low": value.low, "high": value.high, "stderr": value.stderr})
            if isinstance(value, Mapping):
                return {str(key): plain(entry) for key, entry in value.items()}
            if isinstance(value, list | tuple):
                return [plain(entry) for entry in value]
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            return value

        figures = [
            {key: plain(entry) for key, entry in vars(figure).items() if key != "draws"} for figure in self.figures
        ]
        return {
            "models": self.models,
            "counts": plain(self.counts),
            "notes": self.notes,
            "figures": figures,
            "spectra": plain(self.spectra),
            "per_volume": plain(self.per_volume),
        }
