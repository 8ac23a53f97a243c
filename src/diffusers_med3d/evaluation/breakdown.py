"""Where a generator's distance to scans comes from: the autoencoder, the generator, or a reward that does not rank.

The same distances are taken for training scans (the floor), for unseen scans that went through the autoencoder or were
noised partially and denoised, for samples, and for the third of the samples that a reward scores best and worst.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..data import FOREGROUND_THRESHOLD, DataArguments, VolumeDataset
from ..metrics.bootstrap import Interval, bootstrap_interval
from ..metrics.features import Extractor
from ..metrics.frechet import SAMPLES_PER_DIMENSION, frechet, frechet_dimensions, principal_components
from ..metrics.image import interior_detail, sharpness
from ..pipelines.conditions import call_arguments, condition_names
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from ..rewards.spectrum import ROUND_TRIP
from ..utils.files import write_json, write_whole
from ..utils.hashing import pipeline_hash, tensor_hash
from ..utils.seeding import seeded
from ..viz import save, stage_distances
from .evaluate import kid_draws
from .feature_cache import FeatureCache
from .report import FLOOR, REFERENCE, Draws, Figure, json_ready, markdown_table
from .sampling import (
    asked_for,
    check_pipeline,
    check_settings,
    clear_background,
    matched_labels,
    read_volumes,
    save_volume,
    volume_file,
)
from .sets import Sets
from .volume_set import VolumeSet

ROUND_TRIPS, SAMPLES = "round-trips", "samples"
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 0.9)
STANDARD_ERRORS = 2.0
"""A difference counts as found when it is at least so many standard errors."""
SPACES_TO_RANK = 2
"""A reward ranks samples when so many feature spaces that it did not see agree."""
SCANS = "scans.json"


# ---------------------------------------------------------------------------------------------- versions of the scans


def noised_name(strength: float) -> str:
    """Name of the scans noised to a strength and denoised; strength 0 is the round-trip."""
    return ROUND_TRIPS if strength == ROUND_TRIP else f"noised-{strength:g}"


def check_strengths(strengths: Sequence[float], num_inference_steps: int) -> None:
    """Refuse strengths of partial noising that make nothing of their own (ValueError).

    Outside (0, 1) they are round-trips or full samples; with too few steps they take none.
    """
    if not all(0 < strength < 1 and round(strength * num_inference_steps) > 0 for strength in strengths):
        raise ValueError(
            f"strengths must lie between 0 and 1 and take a step of the {num_inference_steps}, got {list(strengths)}."
        )


def scan_versions(
    pipeline: MedDiffusion3DPipeline,
    scans: VolumeSet,
    folder: str | Path,
    data: DataArguments,
    strengths: Sequence[float] = STRENGTHS,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    background: float = FOREGROUND_THRESHOLD,
    like: VolumeDataset | None = None,
) -> dict[str, VolumeSet]:
    """Round-trips of scans through the autoencoder, and the scans noised partially and denoised (SDEdit), as sets.

    A version bears the subject of its scan, with which it is never paired in a distance. Goes on where a killed run
    stopped; with several processes each makes its share.

    Args:
        pipeline: the generator.
        scans: of subjects that it was not trained on.
        folder: one folder per version is made in it.
        data: what the scans were read with.
        strengths: of partial noising, in (0, 1).
        num_inference_steps: of a full sample; strength s takes s of them.
        guidance_scale: classifier-free guidance; 1 is off.
        eta: noise of DDIM, from 0 (deterministic) to 1.
        seed: of the noise.
        batch_size: volumes at once.
        background: voxels below become 0 before saving.
        like: what `scans` were made of, if the network takes more than class and spacing: each is denoised as its
            metadata say.

    Returns:
        name -> set: "round-trips", then "noised-0.2", ... by strength.

    Raises:
        ValueError: unusable strengths, another grid or other classes than the scans', missing conditions, a folder
            of versions of other scans.
    """
    check_pipeline(pipeline, data)
    pipeline.check_sampling(num_inference_steps, guidance_scale, eta)
    check_strengths(strengths, num_inference_steps)
    if like is not None and [item["subject"] for item in like] != scans.subjects:
        raise ValueError("like= must be the scans that the set was made of, in their order.")
    asked = asked_for(pipeline, scans.labels, data, like)
    folder, state = Path(folder), PartialState()
    settings = {
        "generator": pipeline_hash(pipeline),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "eta": eta,
        "seed": seed,
        "background": background,
        "classes": list(data.class_names),
    }
    if condition_names(pipeline):
        settings["like"] = asked.to_dict()
    made_of = {"subjects": scans.subjects, "labels": scans.labels, "voxels": tensor_hash([("", scans.volumes)])}
    with state.main_process_first():
        check_settings(folder, settings)
        check_settings(folder, made_of, SCANS)
    names = [f"{row:04d} {subject}" for row, subject in enumerate(scans.subjects)]
    levels = (ROUND_TRIP, *sorted(strengths))
    missing = [
        (level, row)
        for level in levels
        for row, name in enumerate(names)
        if not volume_file(folder / noised_name(level), name).is_file()
    ]
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(mine), desc="noising and denoising scans", unit="volume", disable=not mine) as progress:
        for level in levels:
            todo = [row for own, row in mine if own == level]
            for start in range(0, len(todo), batch_size):
                rows = todo[start : start + batch_size]
                made = pipeline(
                    **call_arguments(pipeline, asked.select(rows)),
                    volumes=scans.volumes[rows],
                    strength=level,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    eta=eta,
                    generator=[seeded("breakdown", seed, names[row], level) for row in rows],
                ).volumes.cpu()
                for volume, row in zip(clear_background(made, background), rows, strict=True):
                    save_volume(volume, names[row], folder / noised_name(level), pipeline.affine(), data.spacing)
                progress.update(len(rows))
    state.wait_for_everyone()
    versions = {}
    for level in levels:
        read = read_volumes(names, scans.labels, folder / noised_name(level), data, background)
        skipped = {one.row for one in read.left_out}
        subjects = [subject for row, subject in enumerate(scans.subjects) if row not in skipped]
        versions[noised_name(level)] = VolumeSet(read.volumes, read.labels, subjects, read.left_out)
    return versions


# ------------------------------------------------------------------------------------------------- pure decisions


def class_thirds(
    scores: Sequence[float], labels: Sequence[int], reference_labels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Rows of the best-scored and of the worst-scored third of samples, class by class, in the reference's class mix.

    Taken within each class, so that a reward that prefers a class is not taken for one that prefers good samples.

    Args:
        scores: of each sample, higher is better; NaN, "could not be scored", is left out.
        labels: class of each sample.
        reference_labels: class of each reference scan.

    Raises:
        ValueError: too few samples for a third with every class of the reference, or too few of a class with a score
            for two separate thirds.
    """
    if len(labels) // 3 < len(set(reference_labels)):
        raise ValueError(
            f"{len(labels)} samples have no third with all {len(set(reference_labels))} classes of the reference; take "
            "more samples."
        )
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    best: list[int] = []
    worst: list[int] = []
    for label, count in Counter(matched_labels(reference_labels, len(labels) // 3)).items():
        rows = np.flatnonzero((classes == label) & ~np.isnan(values))
        if len(rows) < 2 * count:
            raise ValueError(
                f"class {label} has {len(rows)} samples with a score, its best and worst third need {2 * count}; take "
                "more samples."
            )
        ordered = rows[np.argsort(-values[rows], kind="stable")]
        best += ordered[:count].tolist()
        worst += ordered[-count:].tolist()
    return sorted(best), sorted(worst)


def part_to_work_on(samples: Interval, round_trips_over_half: Interval) -> str:
    """The part that makes most of the samples' excess distance: "nothing", "autoencoder", "generator" or "undecided".

    "nothing" where the samples' excess is under two standard errors; "autoencoder" where round-trips, which no
    generator behind this autoencoder can beat, take more than half of it by two standard errors, "generator" where they
    take less than half by as many.

    Args:
        samples: excess of the samples over the floor.
        round_trips_over_half: excess of the unseen scans' round-trips less half of the samples'.
    """
    if not samples.value >= STANDARD_ERRORS * samples.stderr:
        return "nothing"
    if round_trips_over_half.value >= STANDARD_ERRORS * round_trips_over_half.stderr:
        return "autoencoder"
    if -round_trips_over_half.value >= STANDARD_ERRORS * round_trips_over_half.stderr:
        return "generator"
    return "undecided"


def ranks_samples(differences: Mapping[str, Interval], seen: Sequence[str] = ()) -> bool | None:
    """Whether a reward tells better samples from worse ones; None where too few feature spaces can say.

    True where, in two spaces that the reward did not see, its worst third is further from the scans than its best third
    by at least two standard errors.

    Args:
        differences: feature space -> distance of the worst third less that of the best.
        seen: feature spaces that the reward itself is made of.
    """
    unseen = [own for space, own in differences.items() if space not in seen]
    if len(unseen) < SPACES_TO_RANK:
        return None
    return sum(own.value >= STANDARD_ERRORS * own.stderr for own in unseen) >= SPACES_TO_RANK


def spaces_seen(reward: Callable[..., Any]) -> list[str]:
    """Feature space that a reward declares in its attribute `feature_space`, by the name that `--extractors` gives it.

    A reward without that attribute saw none of them.
    """
    return [reward.feature_space] if hasattr(reward, "feature_space") else []


# ------------------------------------------------------------------------------------------------------------ findings


def plus_minus(interval: Interval) -> str:
    """Value and standard error, as "0.27 ± 0.02"; empty where there is no value."""
    if math.isnan(interval.value):
        return ""
    return f"{interval.value:.3g} ± {interval.stderr:.2g}"


@dataclass(frozen=True)
class SpaceFinding:
    """What one feature space says, by KID.

    Args:
        space: feature space.
        samples: excess of the samples over the floor.
        round_trips: excess of the round-trips.
        work_on: see `part_to_work_on`.
    """

    space: str
    samples: Interval
    round_trips: Interval
    work_on: str

    @property
    def sentence(self) -> str:
        excess = plus_minus(self.samples)
        if self.work_on == "nothing":
            return (
                f"{self.space}: the samples' excess over the floor, {excess}, is under {STANDARD_ERRORS:g} standard "
                "errors, so no part is found wanting with so many volumes."
            )
        if self.work_on == "undecided":
            return (
                f"{self.space}: samples exceed the floor by {excess} and round-trips by "
                f"{plus_minus(self.round_trips)}, which is too uncertain to tell autoencoder from generator."
            )
        share = f"{max(0.0, self.round_trips.value / self.samples.value):.0%}"
        return (
            f"{self.space}: the {self.work_on} is to be worked on, because samples exceed the floor by {excess} and "
            f"round-trips take {share} of that."
        )


@dataclass(frozen=True)
class RewardFinding:
    """What the best and the worst third of the samples say of a reward, by KID.

    Args:
        reward: its name.
        seen: feature spaces that it declares as its own.
        differences: feature space -> KID of the worst third less that of the best.
        ranks: see `ranks_samples`.
    """

    reward: str
    seen: list[str]
    differences: dict[str, Interval]
    ranks: bool | None

    @property
    def sentence(self) -> str:
        found = ", ".join(
            f"{space}{' (its own)' if space in self.seen else ''} {plus_minus(own)}"
            for space, own in self.differences.items()
        )
        if self.ranks is None:
            return (
                f"{self.reward} is not judged: that needs {SPACES_TO_RANK} feature spaces that it did not see, give "
                f"further --extractors (KID of its worst third less that of its best: {found})."
            )
        verdict = "ranks samples" if self.ranks else "does not rank samples and is to be worked on"
        return f"{self.reward} {verdict}: the KID of its worst third less that of its best is {found}."


@dataclass(frozen=True)
class Breakdown:
    """Distances of every stage to the reference scans, and what they say.

    Args:
        figures: "KID" and "Fréchet ..." of every feature space (`extractor` is its name), sharpness, detail.
        stages: in order, from round-trips to samples, then the thirds of each reward.
        counts: set -> its volumes, subjects and classes.
        spaces: one finding per feature space.
        rewards: one finding per reward.
        notes: what a reader must know.
    """

    figures: list[Figure]
    stages: list[str]
    counts: dict[str, dict]
    spaces: list[SpaceFinding]
    rewards: list[RewardFinding]
    notes: list[str]

    @property
    def headline(self) -> str:
        """What is to be worked on, in one sentence."""
        parts: dict[str, list[str]] = {}
        for one in self.spaces:
            parts.setdefault(one.work_on, []).append(one.space)
        named = [part for part in parts if part in ("autoencoder", "generator")]
        found = [f"the {part} (by {' and '.join(parts[part])})" for part in named]
        found += [f"the reward {one.reward}, which does not rank samples" for one in self.rewards if one.ranks is False]
        return f"To be worked on: {'; '.join(found) or 'nothing that can be found with so many volumes'}."

    def table(self) -> str:
        """Markdown: a row per stage, a column per figure, value ± standard error.

        Distances are given as excess over the floor, but for the floor's own row; the rest as they are.
        """
        columns = [f"{one.name}, {one.extractor}" if one.extractor else one.name for one in self.figures]
        rows = []
        for title, name in (("reference scans", REFERENCE), ("training scans (floor)", FLOOR)):
            cells = [plus_minus(one.sets[name]) if name in one.sets else "" for one in self.figures]
            rows.append([title, str(self.counts[name]["volumes"]), *cells])
        for name in self.stages:
            cells = [plus_minus(one.excess[name] if one.baseline == FLOOR else one.sets[name]) for one in self.figures]
            rows.append([name, str(self.counts[name]["volumes"]), *cells])
        return markdown_table(["stage", "volumes", *columns], rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the resamples, ready for JSON: what is not finite is None."""
        return json_ready(
            {
                "headline": self.headline,
                "stages": self.stages,
                "counts": self.counts,
                "spaces": [{**vars(one), "sentence": one.sentence} for one in self.spaces],
                "rewards": [{**vars(one), "sentence": one.sentence} for one in self.rewards],
                "figures": [
                    {key: value for key, value in vars(one).items() if key not in ("draws", "differences")}
                    for one in self.figures
                ],
                "notes": self.notes,
            }
        )


# ------------------------------------------------------------------------------------------------------------ distances


def _frechet_draws(sets: Sets, features: Mapping[str, Tensor], dimensions: int) -> Draws:
    """Fréchet distance of every set to the reference on the training scans' leading principal components, less the
    bias that few volumes give it.

    The bias is estimated by the bootstrap (Efron and Tibshirani 1993, section 10.2). It differs from set to set: by
    count, and because a version of a scan differs less from that scan than another subject's does. The bootstrap draws
    a scan and its version together and so sees both.
    """
    if dimensions < features[REFERENCE].shape[1]:
        mean, directions = principal_components(features[FLOOR], dimensions)
        features = {name: (own.double() - mean) @ directions for name, own in features.items()}
    weights = {name: torch.from_numpy(sets.weights[name] * _class_balance(sets, name)) for name in features}
    draws = {}
    for name in (FLOOR, *sets.models):
        own = frechet(features[name], features[REFERENCE], weights[name], weights[REFERENCE]).numpy()
        draws[name] = np.concatenate([[2 * own[0] - own[1:].mean()], own[1:]])
    return draws


def _class_balance(sets: Sets, name: str) -> NDArray[np.float64]:
    """Factor (N,) of each volume of a set that gives the set the class mix of the reference."""
    labels = sets.labels[name]
    return np.array([sets.shares.get(c, 0.0) * len(labels) / (labels == c).sum() for c in labels])


def _space_figures(sets: Sets, space: str, extractor: Extractor, features: Mapping[str, Tensor]) -> list[Figure]:
    """KID and Fréchet of every stage in one feature space, averaged over the parts of the features."""
    parts = [{name: own[:, place] for name, own in features.items()} for place in extractor.blocks.values()]
    kids = [kid_draws(sets, part) for part in parts]
    mean = {name: np.mean([one[name] for one in kids], axis=0) for name in kids[0]}
    found = [sets.figure("KID", "lower", FLOOR, mean, space)]
    smallest = min(len(one) for one in sets.all.values())
    size = min(part[REFERENCE].shape[1] for part in parts)
    dimensions = frechet_dimensions(smallest, len(features[REFERENCE]), size)
    if dimensions < 2:
        sets.notes.append(
            f"{space}: without a Fréchet distance, which needs {2 * SAMPLES_PER_DIMENSION} volumes in every set; the "
            f"smallest has {smallest}."
        )
        return found
    distances = [_frechet_draws(sets, part, dimensions) for part in parts]
    mean = {name: np.mean([one[name] for one in distances], axis=0) for name in distances[0]}
    return [*found, sets.figure(f"Fréchet on {dimensions} components", "lower", FLOOR, mean, space)]


def breakdown(
    versions: Mapping[str, VolumeSet],
    samples: VolumeSet,
    scores: Mapping[str, Sequence[float]],
    reference: VolumeSet,
    train: VolumeSet,
    extractors: Mapping[str, Extractor],
    seen: Mapping[str, Sequence[str]] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 8,
    cache: FeatureCache | None = None,
) -> Breakdown:
    """Distances to scans that no model saw, stage by stage, and which part is to be worked on.

    Args:
        versions: of the reference scans, from `scan_versions`; "round-trips" must be among them.
        samples: of the generator, with the class mix of the reference.
        scores: reward -> score of each sample.
        reference: scans of subjects that no model was trained on.
        train: the generator's training scans, which make the floor.
        extractors: feature space -> extractor.
        seen: reward -> feature spaces that it is made of; see `spaces_seen`.
        num_resamples: of the bootstrap over subjects and samples.
        seed: of the bootstrap.
        batch_size: volumes at once through an extractor.
        cache: of features; None computes them in this call, each once.

    Raises:
        ValueError: sets that cannot be compared (other shapes, another class mix), too few samples for thirds.
    """
    cache = FeatureCache() if cache is None else cache
    thirds = {}
    for reward, own in scores.items():
        thirds[f"best third by {reward}"], thirds[f"worst third by {reward}"] = class_thirds(
            own, samples.labels, reference.labels
        )
    chosen = {
        name: VolumeSet(samples.volumes[rows], [samples.labels[i] for i in rows], [samples.subjects[i] for i in rows])
        for name, rows in thirds.items()
    }
    sets = Sets({**versions, SAMPLES: samples, **chosen}, reference, train, num_resamples, seed)
    measured = {REFERENCE: reference, FLOOR: train, **versions, SAMPLES: samples}

    def of_all(measure: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        values = {name: measure(one.volumes) for name, one in measured.items()}
        return values | {name: values[SAMPLES][rows] for name, rows in thirds.items()}

    found: list[Figure] = []
    with tqdm(total=len(extractors) + 1, desc="measuring", unit="step") as progress:
        for space, extractor in extractors.items():
            progress.set_postfix_str(space)
            features = of_all(partial(cache.features_of, extractor, batch_size=batch_size))
            found += _space_figures(sets, space, extractor, features)
            progress.update()
        progress.set_postfix_str("detail")
        detail = of_all(interior_detail)
        scale = sets.mean(REFERENCE, detail[REFERENCE])[0]
        for name, values in (
            ("sharpness", of_all(sharpness)),
            ("high-frequency power less noise, scans = 1", {one: own / scale for one, own in detail.items()}),
        ):
            found.append(
                sets.figure(name, "scans", REFERENCE, {one: sets.mean(one, own) for one, own in values.items()})
            )
        progress.update()

    kids = {one.extractor: one for one in found if one.name == "KID"}
    spaces = []
    for space, one in kids.items():
        excess = {name: one.draws[name] - one.draws[FLOOR] for name in (SAMPLES, ROUND_TRIPS)}
        over_half = bootstrap_interval(excess[ROUND_TRIPS] - excess[SAMPLES] / 2)
        part = part_to_work_on(one.excess[SAMPLES], over_half)
        spaces.append(SpaceFinding(space, one.excess[SAMPLES], one.excess[ROUND_TRIPS], part))
    rewards = []
    for reward in scores:
        differences = {
            space: bootstrap_interval(one.draws[f"worst third by {reward}"] - one.draws[f"best third by {reward}"])
            for space, one in kids.items()
        }
        declared = list((seen or {}).get(reward, ()))
        rewards.append(RewardFinding(reward, declared, differences, ranks_samples(differences, declared)))
    unscored = [(reward, sum(map(math.isnan, own)), len(own)) for reward, own in scores.items()]
    sets.notes += [
        f"{lost} of {count} samples have no score by {reward}; they are in neither of its thirds."
        for reward, lost, count in unscored
        if lost
    ]
    return Breakdown(found, sets.models, sets.counts, spaces, rewards, sets.notes)


def write_breakdown(found: Breakdown, folder: str | Path, settings: Mapping[str, Any], title: str) -> str:
    """Writes breakdown.json, breakdown.md and breakdown.png, each whole or not at all; returns the Markdown.

    Args:
        found: from `breakdown`.
        folder: made if missing.
        settings: what the figures depend on and a reader must know; JSON-able.
        title: first heading.
    """
    folder = Path(folder)
    distances = [one for one in found.figures if one.baseline == FLOOR]
    picture = stage_distances(
        {
            f"{one.name}\n{one.extractor}": {
                name: (one.excess[name].value, one.excess[name].stderr) for name in found.stages
            }
            for one in distances
        },
        [one.sets[FLOOR].stderr for one in distances],
        found.headline,
    )
    text = "\n".join(
        [
            f"# {title}\n",
            f"**{found.headline}**\n",
            *(f"- {one.sentence}" for one in found.spaces),
            *(f"- {one.sentence}" for one in found.rewards),
            "\nDistances to the reference scans are excess over the floor (training scans in place of samples; the row "
            "of the floor has the distance itself), with standard errors by bootstrap over subjects and samples. No "
            "KID pairs a reference scan with its own round-trip or noised version. Never for clinical use.\n",
            found.table(),
            "\n![excess distance of every stage](breakdown.png)\n",
            *(f"- {note}" for note in found.notes),
            "\nSettings: " + ", ".join(f"{key} {value}" for key, value in settings.items()),
            "",
        ]
    )
    save(picture, folder / "breakdown.png")
    write_json(folder / "breakdown.json", {"settings": dict(settings), **found.to_dict()})
    write_whole(folder / "breakdown.md", text)
    return text
