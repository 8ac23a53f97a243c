"""The evaluation as one HTML page to send to a colleague: no local paths, no names of subjects, nothing to load."""

import datetime
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from .. import viz
from ..utils.files import write_whole
from .report import FLOOR, REFERENCE, Report, report_figures
from .volume_set import VolumeSet

PACKAGES = ("diffusers-med3d", "torch", "diffusers", "transformers", "trl", "monai", "numpy")
CLOSEST = 4
"""Samples that are shown beside their nearest training scan: those that look most like a copy."""

PANELS = {
    "reward": r"rewards/(.+)/mean",
    "KL to the start": r"(kl)",
    "clip fraction": r"(clip_ratio)",
    "sharpness": r"quality/(sharpness)",
    "diversity": r"quality/(diversity)",
    "training loss": r"(loss)",
    "reward in evaluation": r"eval_rewards/(.+)",
    "validation loss": r"(eval_loss)",
    "KID in validation": r"eval_(kid(?:_haar)?)",
    "PSNR in validation": r"eval_(psnr(?:_foreground)?)",
}
"""Title of a panel of `training_curves` -> names in the log of a trainer, and how its lines are called."""


def training_curves(folder: str | Path) -> Figure | None:
    """Rewards and measures against the optimizer step, from the log in a trainer's folder; None where there is none.

    The log is ``trainer_state.json`` of the folder, or of its newest checkpoint.
    """
    folder = Path(folder)
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    states = [path for path in (folder / "trainer_state.json", *reversed(checkpoints)) if path.is_file()]
    if not states:
        return None
    history = json.loads(states[0].read_text())["log_history"]
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for title, pattern in PANELS.items():
        for entry in history:
            for name, value in entry.items():
                found = re.fullmatch(pattern, name)
                if found and isinstance(value, int | float):
                    x, y = panels.setdefault(title, {}).setdefault(found[1], ([], []))
                    x.append(entry["step"])
                    y.append(value)
    return viz.curve_panels(panels, xlabel="optimizer step") if panels else None


def without_folders(text: str) -> str:
    """The text, with every path cut down to its last part."""
    return re.sub(r"(?<![\w.])(?:~|\.{1,2})?/(?:[^\s/]+/)*([^\s/]+)", r"\1", text)


def shareable_command(words: Sequence[str], replaced: Mapping[str, str]) -> str:
    """A command as it can be shown to others.

    Args:
        words: of the command line.
        replaced: word -> what stands in its place, such as {"/data/hospital": "DATA"}.
    """
    return " ".join(
        replaced.get(word, Path(word).name if "/" in word and Path(word).exists() else without_folders(word))
        for word in words
    )


def write_page(
    report: Report,
    path: str | Path,
    sets: Mapping[str, VolumeSet],
    train: VolumeSet,
    spacing: Sequence[float],
    settings: Mapping[str, Any],
    command: str,
    folders: Mapping[str, Path] | None = None,
    title: str = "Evaluation",
) -> Path:
    """Write the evaluation as one self-contained HTML page.

    Args:
        report: from `evaluate`.
        path: of the page.
        sets: {"reference": ..., model: ...}, for the pictures.
        train: the training scans that `evaluate` was given, in the same order.
        spacing: voxel size in mm.
        settings: what the figures depend on and a reader must know.
        command: see `shareable_command`.
        folders: model -> folder of the trainer that made it, for the curves of its training.
        title: first heading.

    Returns:
        the path.
    """
    figures = report_figures(report, sets, spacing)
    header, rows = report.rows()
    names = {REFERENCE: "unseen scans", FLOOR: "floor (training scans)"}
    counts = []
    for name, own in report.counts.items():
        classes = ", ".join(f"{label}: {count}" for label, count in own["classes"].items())
        counts.append([names.get(name, name), own["volumes"], own["subjects"], classes])
    closest = [_closest(report, name, sets[name], train, spacing) for name in report.models if name in report.nearest]
    doubles = [f"{len(report.doubles)} pair(s) of training scans are the same scan."] if report.doubles else []
    sections = [
        viz.Section(
            "What was compared",
            [
                "Never for clinical use. Generated volumes show no real person.",
                "Every set went through the same loader. Samples have the class mix of the unseen scans, and sample k "
                "of every model starts from the same noise.",
            ],
            ["set", "volumes", "subjects or seeds", "class: volumes"],
            counts,
        ),
        viz.Section(
            "Pictures",
            pictures=[viz.Picture(figures["views"], "Volumes of all classes in turn, none picked. R is right.")],
        ),
        viz.Section(
            "Nearest training scans",
            [
                "Of each model, the samples that look most like a copy, and below each its nearest training scan. The "
                "ratio is the distance to it over the distance to the nearest scan of another subject: far below 1 "
                "means a copy. Mirrored and shifted copies are found too, and are drawn here as they were stored.",
            ],
            pictures=[
                *closest,
                viz.Picture(figures["nearest"], "The ratio of all volumes. Unseen scans are what is to be expected."),
            ],
        ),
        viz.Section(
            "Measures",
            [
                "Brackets are 95 % bootstrap intervals over subjects and samples. Floor: training scans in place of "
                "samples, which is what a perfect generator would get. Excess: over the floor for distances and pairs, "
                "over the unseen scans for measures of single volumes. KID is unbiased and may be negative.",
                *map(without_folders, report.notes),
                *doubles,
            ],
            header,
            [[without_folders(cell) for cell in row] for row in rows],
            [
                viz.Picture(figures["distances"], "Excess of the kernel distances over the floor."),
                viz.Picture(figures["spectra"], "Power spectra inside the anatomy."),
            ],
        ),
    ]
    for name, folder in (folders or {}).items():
        drawn = training_curves(folder)
        if drawn is not None:
            sections.append(viz.Section(f"Training of {name}", pictures=[viz.Picture(drawn, "Log of the trainer.")]))
    versions = [[package, importlib.metadata.version(package)] for package in PACKAGES]
    sections.append(
        viz.Section(
            "How this was made",
            [f"{datetime.date.today():%d %B %Y}. Paths are replaced by DATA, SPLIT and the like."],
            ["setting", "value"],
            [
                *([key, without_folders(str(value))] for key, value in settings.items()),
                *versions,
                ["Python", platform.python_version()],
            ],
            code=command,
        )
    )
    write_whole(path, viz.html_page(title, sections))
    return Path(path)


def _closest(report: Report, name: str, samples: VolumeSet, train: VolumeSet, spacing: Sequence[float]) -> viz.Picture:
    """The samples of the smallest ratio above their nearest training scans."""
    ratios = torch.tensor(report.per_volume["nearest over second nearest"][name])
    distances = report.per_volume["distance to the nearest training scan"][name]
    order = ratios.argsort()[:CLOSEST].tolist()
    rows = {name: samples.volumes[order], "nearest scan": train.volumes[[report.nearest[name][i] for i in order]]}
    captions = {name: [f"ratio {ratios[i]:.3f}, distance {distances[i]:.4f}" for i in order]}
    figure = viz.volume_rows(rows, spacing=spacing, captions=captions)
    return viz.Picture(figure, f"{name}: the {len(order)} samples of the smallest ratio.")
