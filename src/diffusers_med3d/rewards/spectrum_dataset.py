"""The spectrum on disk: made once per subject by a generator that never saw that subject, then read by training and
evaluation of reward models."""

import json
import math
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..data import VolumeDataset
from ..data.training_subjects import read_training_subjects, refuse_seen_subjects
from ..pipelines.conditions import LABEL_COLUMN, call_arguments, encode_rows, scan_rows
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from ..utils.files import whole_file
from ..utils.hashing import pipeline_hash
from ..utils.seeding import seeded
from .spectrum import FULL_SAMPLE, STRENGTHS, check_strengths, partial_noising

KNOWN_BY_HEART = 0.8
"""`recall` below which a generator is said to know its training scans by heart. Scans of other people and classes
differ by some percent in how hard they are to bring back."""


def subject_levels(subject: str, strengths: Sequence[float], levels_per_subject: int | None, seed: int) -> list[float]:
    """Which levels a subject gets: first and last always, the others drawn; all if ``levels_per_subject`` is None."""
    strengths = sorted(strengths)
    if levels_per_subject is None or levels_per_subject >= len(strengths):
        return strengths
    drawn = random.Random(f"{seed}|{subject}").sample(strengths[1:-1], levels_per_subject - 2)
    return sorted([strengths[0], *drawn, strengths[-1]])


def build_spectrum(
    pipeline: MedDiffusion3DPipeline,
    volumes: VolumeDataset,
    trained_on: Collection[str],
    folder: str | Path,
    strengths: Sequence[float],
    num_inference_steps: int = 20,
    levels_per_subject: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Make the partial noisings of scans, one file per scan; files that are there already are kept.

    A file holds ``real`` (C, X, Y, Z), ``versions`` (L, C, X, Y, Z), both float16, and ``strengths`` (L,). It appears
    whole or not at all, so a run that was killed goes on with the scans it had not finished. A version depends on the
    generator's weights, the scan and its class and conditions, the strength, the steps and the seed, not on its batch
    (to rounding).

    Args:
        pipeline: the generator.
        volumes: scans of subjects that the generator has not seen, which are denoised as their classes and metadata say
            (see ``scan_rows``).
        trained_on: subjects that it has seen. For them too there may be full samples alone (``strengths`` [1]): new
            volumes of a scan's class, for which no scan is denoised.
        folder: where the files are.
        strengths: levels in [0, 1], 0 among them and at least two, or 1 alone; see ``partial_noising``.
        num_inference_steps: steps of a full sample.
        levels_per_subject: how many of the levels each subject gets, None for all.
        batch_size: scans at a time.
        seed: of the noise and of the choice of levels.
        share: number of this process and of all processes, of which each makes the files of its own scans.

    Returns:
        the files of all scans, in the order of ``volumes``.

    Raises:
        ValueError: a subject that the generator has seen; files made with other settings or from another scan; a scan
            without a condition that the generator takes.
    """
    if set(strengths) != {FULL_SAMPLE}:
        refuse_seen_subjects([item["subject"] for item in volumes], trained_on, "the generator")
    check_strengths(strengths, num_inference_steps)
    if levels_per_subject is not None and levels_per_subject < 2:
        raise ValueError(f"levels_per_subject must be at least 2 (the first and the last), got {levels_per_subject}.")
    asked = scan_rows(pipeline, volumes)
    encode_rows(pipeline, asked)  # refuses now what could not be denoised later
    labels, conditions = call_arguments(pipeline, asked).values()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"generator": pipeline_hash(pipeline), "num_inference_steps": num_inference_steps, "seed": seed}
    paths, todo = [], []
    scans_of: dict[str, int] = {}
    for scan, item in enumerate(volumes):
        subject = item["subject"]
        number = scans_of[subject] = scans_of.get(subject, 0) + 1
        path = folder / f"{quote(subject, safe='')}-{number}.safetensors"
        levels = subject_levels(subject, strengths, levels_per_subject, seed)
        own = {LABEL_COLUMN: labels[scan]}
        own |= {"conditions": {name: values[scan] for name, values in conditions.items()}} if conditions else {}
        metadata = {"settings": json.dumps(settings | {"strengths": levels} | own, sort_keys=True)}
        paths.append(path)
        if scan % share[1] != share[0]:
            continue
        if path.exists():
            _check_file(path, metadata["settings"], item["volume"].as_tensor())
        else:
            todo.append((path, f"{subject}-{number}", scan, levels, metadata))
    pipeline.set_progress_bar_config(disable=True)
    total = sum(len(levels) for *_, levels, _ in todo)
    with tqdm(total=total, desc="making the spectrum", unit="volume", disable=total == 0) as progress:
        for start in range(0, len(todo), batch_size):
            chunk = todo[start : start + batch_size]
            versions: list[dict[float, Tensor]] = [{} for _ in chunk]
            for strength in sorted(set(strengths)):
                rows = [i for i, (*_, levels, _) in enumerate(chunk) if strength in levels]
                if not rows:
                    continue
                scans = [chunk[i][2] for i in rows]
                made = partial_noising(
                    pipeline,
                    torch.stack([volumes[scan]["volume"].as_tensor() for scan in scans]),
                    strength=strength,
                    num_inference_steps=num_inference_steps,
                    generators=[seeded("spectrum", seed, chunk[i][1], strength) for i in rows],
                    **call_arguments(pipeline, asked.select(scans)),
                )
                for i, volume in zip(rows, made, strict=True):
                    if not volume.isfinite().all():
                        raise ValueError(
                            f"the generator makes NaN or infinite voxels of the scan {chunk[i][1]} at strength "
                            f"{strength}; nothing can be learned from them."
                        )
                    versions[i][strength] = volume
                progress.update(len(rows))
            for (path, _, scan, levels, metadata), own_versions in zip(chunk, versions, strict=True):
                tensors = {
                    "real": volumes[scan]["volume"].as_tensor().half().contiguous(),
                    "versions": torch.stack([own_versions[strength] for strength in levels]).half(),
                    "strengths": torch.tensor(levels),
                }
                with whole_file(path) as temporary:
                    save_file(tensors, temporary, metadata=metadata)
    return paths


def _check_file(path: Path, settings: str, volume: Tensor) -> None:
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("settings")
        same_scan = file.get_slice("real").get_shape() == list(volume.shape)
        same_scan = same_scan and torch.equal(file.get_tensor("real"), volume.half())
    if found != settings or not same_scan:
        what = f"settings {found} instead of {settings}" if found != settings else "another scan or another preparation"
        raise ValueError(f"{path} was made with {what}; delete {path.parent} or choose another folder.")


def recall(train: "SpectrumDataset", validation: "SpectrumDataset") -> tuple[float, float]:
    """How close a generator brings noised training scans to their originals, compared with validation scans.

    At every strength between 0.3 and 0.8 that both have: the mean squared error of a denoised scan over the mean error
    of validation scans. Noise of that strength hides most of a scan, so a generator that knows a scan by heart stays
    far below 1.

    Returns:
        the mean over training scans, and the standard error of its difference to validation's mean, which is 1. NaN
        and infinity where there is nothing to compare.
    """

    def errors(spectrum: "SpectrumDataset") -> list[dict[float, float]]:
        found = []
        for item in map(spectrum.__getitem__, range(len(spectrum))):
            error = (item["versions"] - item["real"]).square().flatten(1).mean(1).tolist()
            levels = [round(level, 4) for level in item["strengths"].tolist()]
            found.append({level: one for level, one in zip(levels, error, strict=True) if 0.3 <= level <= 0.8})
        return found

    seen, unseen = errors(train), errors(validation)
    means = {level: fmean(row[level] for row in unseen if level in row) for level in set().union(*unseen)}

    def ratios(rows: list[dict[float, float]]) -> list[float]:
        own = [[error / means[level] for level, error in row.items() if means.get(level)] for row in rows]
        return [fmean(one) for one in own if one]

    sides = ratios(seen), ratios(unseen)
    if min(map(len, sides)) < 2:
        return math.nan, math.inf
    return fmean(sides[0]), math.hypot(*(stdev(side) / math.sqrt(len(side)) for side in sides))


def build_fold_spectra(
    scans: Mapping[str, VolumeDataset],
    fold_a_model: str | None,
    fold_b_model: str | None,
    model: str | None,
    folder: str | Path,
    strengths: Sequence[float] = STRENGTHS,
    levels_per_subject: int | None = 6,
    num_inference_steps: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
) -> tuple["SpectrumDataset", "SpectrumDataset"]:
    """Return the spectra of training and validation, of which no scan is denoised by a generator that has seen it.

    The scans of each fold are denoised by the generator of the other fold. The generator to be fine-tuned has seen
    both, so of the training scans it adds full samples alone; it makes the spectrum of validation.

    Without generators of folds it makes the spectrum of all training scans, which it has seen. A warning says so where
    it brings them back closer than validation scans (`recall`), that is, where it knows them by heart.

    Args:
        scans: of "b" and "validation", with ``fold_b_model`` also of "a"; without both, of "train" and "validation".
        fold_a_model, fold_b_model: generators trained on folds a and b: bundled names, folders or Hub ids. Without the
            second, fold b alone is trained on. Without both, ``model`` makes everything.
        model: the generator to be fine-tuned. Without it, that of fold a makes the spectrum of validation.
        folder: the files lie in one folder below it for each part and generator.
        levels_per_subject: of training; validation has all.
        strengths, num_inference_steps, batch_size, seed, share: see ``build_spectrum``.
        device: where the generators run.

    Raises:
        ValueError: a generator that has seen subjects whose spectrum it would make, among others; see
            ``build_spectrum``.
    """

    @cache  # one generator makes several parts
    def pipeline(name: str) -> MedDiffusion3DPipeline:
        return MedDiffusion3DPipeline.from_pretrained(name).to(device)

    def make(
        part: str, name: str, suffix: str, levels: Sequence[float], per_subject: int | None, seen: bool = False
    ) -> list[Path]:
        return build_spectrum(
            pipeline(name),
            scans[part],
            () if seen else read_training_subjects(name),
            Path(folder) / f"{part}-by-generator{suffix}",
            levels,
            num_inference_steps,
            per_subject,
            batch_size,
            seed,
            share,
        )

    if fold_a_model is None:
        if model is None or fold_b_model is not None:
            raise ValueError("a spectrum needs the generator of fold a, or the generator to be fine-tuned alone.")
        own = SpectrumDataset(make("train", model, "", strengths, levels_per_subject, seen=True))
        unseen = SpectrumDataset(make("validation", model, "", strengths, None))
        if share[1] == 1:
            _warn_of_recall(*recall(own, unseen))
        return own, unseen
    makers = {"b": (fold_a_model, "-a")} | ({"a": (fold_b_model, "-b")} if fold_b_model is not None else {})
    train, full_samples = [], []
    for part, (name, suffix) in makers.items():
        train += make(part, name, suffix, strengths, levels_per_subject)
        if model is not None:
            full_samples += make(part, model, "", [FULL_SAMPLE], None)
    judge, suffix = (fold_a_model, "-a") if model is None else (model, "")
    validation = make("validation", judge, suffix, strengths, None)
    return SpectrumDataset(train, full_samples), SpectrumDataset(validation)


def _warn_of_recall(ratio: float, error: float) -> None:
    if ratio < min(KNOWN_BY_HEART, 1 - 2 * error):
        warnings.warn(
            f"The generator brings noised training scans back closer than validation scans (squared error "
            f"{ratio:.2f} +- {error:.2f} of theirs): it knows them by heart, and the reward would learn from that. "
            "Train two generators on the folds (train_diffusion.py --part a and --part b) and give them as "
            "--fold_a_model and --fold_b_model.",
            stacklevel=3,
        )


class SpectrumDataset(TorchDataset):
    """Scans and their partial noisings, read from the files of ``build_spectrum`` when asked for.

    An item is ``{"real": (C, X, Y, Z), "versions": (L, C, X, Y, Z), "strengths": (L,)}``, float32, and ``"subject"``
    (): a number that scans of one subject share.

    Args:
        paths: one file per scan.
        more: further versions of the same scans, in files of the same names; of another generator, say.
    """

    def __init__(self, paths: Sequence[str | Path], more: Sequence[str | Path] = ()) -> None:
        if not paths:
            raise ValueError("the spectrum has no files.")
        self.paths = [Path(path) for path in paths]
        self.more = [Path(path) for path in more]
        if self.more and [path.name for path in self.more] != [path.name for path in self.paths]:
            raise ValueError(
                f"the further versions are of {len(self.more)} other scans than the {len(self.paths)} given."
            )
        names = [path.stem.rsplit("-", 1)[0] for path in self.paths]
        self.subjects = torch.tensor([names.index(name) for name in names])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tensors = load_file(self.paths[index])
        if self.more:
            further = load_file(self.more[index])
            tensors |= {name: torch.cat([tensors[name], further[name]]) for name in ("versions", "strengths")}
        return {name: tensor.float() for name, tensor in tensors.items()} | {"subject": self.subjects[index]}
