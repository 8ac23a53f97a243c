"""Where a generator's distance to scans lies: the same distances for round-trips, partial noisings, samples, damage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import FOREGROUND_THRESHOLD, DataArguments, VolumeDataset
from ..metrics import Extractor, bootstrap_interval
from ..pipelines.conditions import call_arguments, condition_names
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from ..rewards.damage import DAMAGES, HALF_SWAP, HALF_SWAP_SEVERITY, brightness, damage, nearest_in_brightness
from ..rewards.spectrum import FULL_SAMPLE, ROUND_TRIP, partial_noising
from ..rewards.spectrum_scores import level_name
from ..utils.hashing import pipeline_hash, tensor_hash
from ..utils.seeding import seeded
from . import evaluate
from .report import Report
from .sampling import (
    asked_for,
    check_pipeline,
    check_settings,
    clear_background,
    read_volumes,
    save_volume,
    volume_file,
)
from .volume_set import VolumeSet

SCANS = "scans.json"


STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


GATE_STDERRS = 3.0  # the gap between full samples and round-trips must be that many standard errors


def gate_versions(
    pipeline: MedDiffusion3DPipeline,
    scans: VolumeSet,
    folder: str | Path,
    data: DataArguments,
    strengths: Sequence[float] = STRENGTHS,
    severity: float = 0.5,
    num_inference_steps: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    background: float = FOREGROUND_THRESHOLD,
    like: VolumeDataset | None = None,
) -> dict[str, VolumeSet]:
    """The spectrum of unseen scans as sets: round-trip, partial noisings, full samples of their classes, every damage.

    Versions bear the subjects of their scans and so are compared with them in pairs; full samples, which never saw the
    scan, bear names of their own. Goes on where a killed run stopped.

    Args:
        pipeline: the generator before reinforcement learning.
        scans: of subjects that it was not trained on.
        folder: one folder per version is made in it.
        data: what the scans were read with.
        strengths: of partial noising, between 0 and 1.
        severity: of every damage, in (0, 1].
        num_inference_steps: of a full sample.
        seed: of noise and damage.
        batch_size: volumes at once.
        like: what `scans` were made of, if the network takes more than class and spacing: each is denoised as its
            metadata say.

    Returns:
        name -> set; "round_trip" first, "full_sample" after the noisings, then the damages.

    Raises:
        ValueError: see `sample_volumes` and `damage`; a folder of versions of other scans.
    """
    check_pipeline(pipeline, data)
    if not 0 < severity <= 1:
        raise ValueError(f"severity must lie in (0, 1], got {severity}.")
    if like is not None and [item["subject"] for item in like] != scans.subjects:
        raise ValueError("like= must be the scans that the set was made of, in their order.")
    asked = asked_for(pipeline, scans.labels, data, like)
    folder = Path(folder)
    settings = {
        "generator": pipeline_hash(pipeline),
        "num_inference_steps": num_inference_steps,
        "severity": severity,
        "seed": seed,
        "background": background,
        "classes": list(data.class_names),
    }
    if condition_names(pipeline):
        settings["like"] = asked.to_dict()
    check_settings(folder, settings)
    made_of = {"subjects": scans.subjects, "labels": scans.labels, "voxels": tensor_hash([("", scans.volumes)])}
    check_settings(folder, made_of, SCANS)
    levels = {level_name(strength): strength for strength in (ROUND_TRIP, *sorted(strengths), FULL_SAMPLE)}
    versions = {}
    pipeline.set_progress_bar_config(disable=True)
    light = torch.tensor([brightness(volume) for volume in scans.volumes])
    kinds = [*levels, *DAMAGES, *([HALF_SWAP] if len(set(scans.subjects)) > 1 else [])]
    with tqdm(total=len(kinds) * len(scans), desc="making the gate's versions", unit="volume") as progress:
        for name in kinds:
            own = [f"{name} {subject}" if name == level_name(FULL_SAMPLE) else subject for subject in scans.subjects]
            scan_names = [f"{i:04d} {one}" for i, one in enumerate(own)]
            todo = [i for i, one in enumerate(scan_names) if not volume_file(folder / name, one).is_file()]
            progress.update(len(scans) - len(todo))
            for start in range(0, len(todo), batch_size):
                rows = todo[start : start + batch_size]
                if name in levels:
                    made = partial_noising(
                        pipeline,
                        scans.volumes[rows],
                        strength=levels[name],
                        num_inference_steps=num_inference_steps,
                        generators=[seeded("gate", seed, scan_names[i], levels[name]) for i in rows],
                        **call_arguments(pipeline, asked.select(rows)),
                    )
                else:
                    made = torch.stack([_damaged(scans, i, name, severity, seed, light) for i in rows])
                for volume, i in zip(clear_background(made, background), rows, strict=True):
                    save_volume(volume, scan_names[i], folder / name, pipeline.affine(), data.spacing)
                progress.update(len(rows))
            read = read_volumes(scan_names, scans.labels, folder / name, data, background)
            versions[name] = VolumeSet(
                read.volumes, read.labels, own
            )  # names were numbered, so the order is the scans'
    return versions


def _damaged(scans: VolumeSet, index: int, kind: str, severity: float, seed: int, light: Tensor) -> Tensor:
    other = None
    if kind == HALF_SWAP:
        subjects = torch.tensor([scans.subjects.index(subject) for subject in scans.subjects])
        other, severity = scans.volumes[nearest_in_brightness(light, subjects, index)], HALF_SWAP_SEVERITY
    return damage(scans.volumes[index], kind, severity, seeded("gate", seed, index, kind), other)


def gate_verdict(report: Report) -> list[dict[str, Any]]:
    """Is there a gap that fine-tuning could close? One entry per headline KID of a report on `gate_versions`.

    The attainable gap is the full samples' KID less the round-trips': what no generator can do better than its decoder.
    `decoder_share` is the round-trips' part of the full samples' excess over the floor.
    """
    verdicts = []
    for figure in report.figures:
        if not figure.name.startswith("KID") or figure.name.removeprefix("KID ") in ("sagittal", "coronal", "axial"):
            continue
        base, decoder = level_name(FULL_SAMPLE), level_name(ROUND_TRIP)
        gap = bootstrap_interval(figure.draws[base] - figure.draws[decoder])
        whole = figure.excess[base].value
        share = figure.excess[decoder].value / whole if whole > 0 else float("nan")
        reasons = []
        if not gap.value >= GATE_STDERRS * gap.stderr:
            reasons.append(f"the gap is under {GATE_STDERRS:g} standard errors")
        if not share <= 0.5:
            reasons.append("the decoder makes most of it")
        verdicts.append(
            {
                "figure": figure.name,
                "extractor": figure.extractor,
                "attainable_gap": gap.value,
                "stderr": gap.stderr,
                "decoder_share": share if np.isfinite(share) else None,
                "passes": not reasons,
                "reasons": reasons,
            }
        )
    return verdicts


def gate(
    versions: Mapping[str, VolumeSet],
    reference: VolumeSet,
    train: VolumeSet,
    extractors: Sequence[Extractor],
    spacing: Sequence[float],
    **kwargs: Any,
) -> tuple[Report, list[dict[str, Any]]]:
    """The figures of `evaluate` for every version of `gate_versions`, and the verdict on them."""
    report = evaluate(versions, reference, train, extractors, spacing, **kwargs)
    return report, gate_verdict(report)
