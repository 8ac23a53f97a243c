"""The answer of `evaluate`: figures with intervals, as a table and for JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as MatplotlibFigure
from numpy.typing import NDArray

from .. import viz
from ..metrics.bootstrap import Interval
from ..utils.files import write_json, write_whole
from .volume_set import VolumeSet

REFERENCE, FLOOR = "reference", "floor"
Draws = dict[str, NDArray[np.float64]]  # set -> (1 + R,), the figure and its resamples


def json_ready(value: Any) -> Any:
    """The value with intervals as dictionaries, keys as text and None for what is not finite."""
    if isinstance(value, Interval):
        return json_ready({"value": value.value, "low": value.low, "high": value.high, "stderr": value.stderr})
    if isinstance(value, Mapping):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table whose columns are as wide as their longest cell."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


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
    """What `evaluate` found; all intervals are 95 % bootstrap intervals over subjects and samples.

    Args:
        figures: one per measure.
        counts: set -> numbers of volumes, subjects and classes.
        notes: what a reader must know; they name no subject.
        per_volume: measure -> set -> one value per volume.
        spectra: set -> power spectrum with its interval.
        models: names of the models, the baseline first.
        nearest: set -> index of the nearest training scan of each volume.
        doubles: pairs of subjects whose training scans are the same scan; both count as one person when copies are
            sought.
    """

    figures: list[Figure]
    counts: dict[str, dict]
    notes: list[str]
    per_volume: dict[str, dict[str, list[float]]]
    spectra: dict[str, dict[str, list[float]]]
    models: list[str]
    nearest: dict[str, list[int]] = field(default_factory=dict)
    doubles: list[tuple[str, str]] = field(default_factory=list)

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
        """`rows` as a Markdown table."""
        return markdown_table(*self.rows())

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and a row per figure: scans, models, their excess over the baseline, and differences."""
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
        return header, rows

    def to_dict(self) -> dict:
        """Everything but the resamples, ready for JSON: what is not finite is None."""
        return json_ready(
            {
                "models": self.models,
                "counts": self.counts,
                "notes": self.notes,
                "doubles": self.doubles,
                "figures": [
                    {key: entry for key, entry in vars(figure).items() if key != "draws"} for figure in self.figures
                ],
                "spectra": self.spectra,
                "per_volume": self.per_volume,
            }
        )


VIEWS_PER_SET = 4


def report_figures(
    report: Report, sets: Mapping[str, VolumeSet], spacing: Sequence[float]
) -> dict[str, MatplotlibFigure]:
    """The pictures of a report: "views", "distances", "spectra" and "nearest".

    Args:
        report: from `evaluate`.
        sets: {"reference": ..., model: ...}, of which volumes are drawn.
        spacing: voxel size in mm.
    """
    return {
        "views": viz.volume_rows(
            {set_name: one.volumes[_spread(one.labels, VIEWS_PER_SET)] for set_name, one in sets.items()},
            spacing=spacing,
        ),
        "distances": viz.intervals(
            {
                f"{figure.name}\n{figure.extractor.split(',')[0].split('/')[0]}, excess": {
                    model: (own.value, own.low, own.high) for model, own in figure.excess.items()
                }
                for figure in report.figures
                if figure.name.startswith("KID") and figure.excess
            }
        ),
        "spectra": viz.bands(
            {
                set_name: (own["frequency"], own["decibel"], own["low"], own["high"])
                for set_name, own in report.spectra.items()
            },
            xlabel="cycles per voxel",
            ylabel="power inside the anatomy, dB",
        ),
        "nearest": viz.histogram(
            report.per_volume["nearest over second nearest"], "distance to the nearest training scan / second nearest"
        ),
    }


def write_report(
    report: Report,
    folder: str | Path,
    sets: Mapping[str, VolumeSet],
    spacing: Sequence[float],
    settings: Mapping[str, Any],
    title: str = "Evaluation",
) -> str:
    """Writes report.json, report.md and four pictures, each whole or not at all.

    Args:
        report: from `evaluate`.
        folder: made if missing.
        sets: for the pictures, such as {"reference": ..., model: ...}.
        spacing: voxel size in mm.
        settings: what the figures depend on and a reader must know; JSON-able.
        title: first heading.

    Returns:
        the Markdown.
    """
    folder = Path(folder)
    pictures = report_figures(report, sets, spacing)
    for kind, picture in pictures.items():
        viz.save(picture, folder / f"report-{kind}.png")
    counted = [
        f"- {set_name}: {own['volumes']} volumes of {own['subjects']} subjects or seeds, by class {own['classes']}"
        for set_name, own in report.counts.items()
    ]
    text = "\n".join(
        [
            f"# {title}\n",
            "Never for clinical use. Brackets are 95 % bootstrap intervals over subjects and samples. Floor: training "
            "scans in place of samples. Excess: over the floor for distances and pairs, over the reference scans for "
            "measures of single volumes. KID is unbiased and may be negative.\n",
            report.table(),
            "\n" + "\n".join(counted),
            "".join(f"\n- {note}" for note in report.notes),
            "".join(
                f"\n- Training scans of {first} and {second} are the same scan; both names count as one person when "
                "copies are sought."
                for first, second in report.doubles
            ),
            "\nSettings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + "\n",
            *(f"![{kind}](report-{kind}.png)" for kind in pictures),
            "",
        ]
    )
    write_json(folder / "report.json", {"settings": dict(settings), **report.to_dict()})
    write_whole(folder / "report.md", text)
    return text


def _spread(labels: Sequence[int], count: int) -> list[int]:
    """Up to `count` volumes that take turns among the classes."""
    places: dict[int, int] = {}
    order = []
    for index, label in enumerate(labels):
        places[label] = places.get(label, -1) + 1
        order.append((places[label], label, index))
    return [index for _, _, index in sorted(order)[:count]]
