"""The spectrum on disk: made once per subject by a generator that never saw that subject, then read by training and
evaluation of reward models."""

import json
import random
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..data import VolumeDataset
from ..data.latents import tensor_hash
from ..files import whole_file
from ..hub import resolve
from ..pipeline import MedDiffusion3DPipeline
from ..spectrum import (
    DAMAGES,
    FULL_SAMPLE,
    HALF_SWAP,
    HALF_SWAP_SEVERITY,
    REAL,
    ROUND_TRIP,
    brightness,
    damage,
    nearest_in_brightness,
    neighbours_in_order,
    partial_noising,
    rank_correlation,
)
from .conditions import LABEL_COLUMN, call_arguments, encode_rows, scan_rows

TRAINING_SUBJECTS = "training_subjects.json"
"""File beside a generator: JSON list of the subjects that it was trained on."""


def seeded(*key: object) -> torch.Generator:
    """CPU generator whose numbers depend on ``key`` alone: a resumed run draws what an uninterrupted one does."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def training_subjects_file(generator: str | Path) -> Path | None:
    """The file beside a generator (bundled name, folder or Hub id) that tells which subjects it was trained on.

    None where there is none; with a warning where the Hub cannot be asked.
    """
    folder = Path(resolve(generator))
    if folder.is_dir():
        return path if (path := folder / TRAINING_SUBJECTS).is_file() else None
    try:
        return Path(hf_hub_download(str(generator), TRAINING_SUBJECTS))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except OSError as error:
        warnings.warn(f"nobody knows which subjects {generator} was trained on: {error}", stacklevel=2)
        return None


def read_training_subjects(generator: str | Path) -> set[str]:
    """Subjects that a generator (bundled name, folder or Hub id) was trained on, from the file beside it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = training_subjects_file(generator)
    if path is None:
        folder = Path(generator) if Path(generator).is_dir() else Path("FOLDER")  # one from the Hub, downloaded
        raise FileNotFoundError(
            f"{generator} has no {TRAINING_SUBJECTS} (a JSON list of subject ids), so nobody can tell which subjects "
            "it has seen; examples/train_diffusion.py writes it. For a generator from elsewhere (a converted one, say) "
            "write it into its folder yourself: the ids that your metadata give to subjects it was trained on, or, if "
            f"there are none, echo '[]' > {folder / TRAINING_SUBJECTS}"
        )
    return set(map(str, json.loads(path.read_text())))


def refuse_seen_subjects(subjects: Collection[str], trained_on: Collection[str], generator: str) -> None:
    """Refuse a generator that was trained on subjects that are to judge it, or whose spectrum it is to make.

    It denoises the scans that it was trained on from memory: such a spectrum measures memorisation.

    Args:
        subjects, trained_on: ids.
        generator: its name, for the message.

    Raises:
        ValueError: with their number and the first of them.
    """
    seen = sorted(set(subjects) & set(trained_on))
    if seen:
        raise ValueError(
            f"{len(seen)} of {len(set(subjects))} subjects were in the training set of {generator}, the first is "
            f"{seen[0]!r}; they can neither judge it nor give it a spectrum to make (for that there is the generator "
            "of the other fold)."
        )


def fingerprint(pipeline: MedDiffusion3DPipeline) -> str:
    """Hash of the weights and the scheduler: tells generators apart without a path."""
    weights = chain(pipeline.vae.state_dict().items(), pipeline.unet.state_dict().items())
    return tensor_hash(weights, json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())


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
        if len(set(strengths)) < 2 or ROUND_TRIP not in strengths or not all(0 <= s <= 1 for s in strengths):
            raise ValueError(f"strengths must be 0 (round-trip) and others up to 1, or 1 alone, got {list(strengths)}.")
    if levels_per_subject is not None and levels_per_subject < 2:
        raise ValueError(f"levels_per_subject must be at least 2 (the first and the last), got {levels_per_subject}.")
    asked = scan_rows(pipeline, volumes)
    encode_rows(pipeline, asked)  # refuses now what could not be denoised later
    labels, conditions = call_arguments(pipeline, asked).values()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"generator": fingerprint(pipeline), "num_inference_steps": num_inference_steps, "seed": seed}
    paths, todo, scans_of = [], [], {}
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
                    versions[i][strength] = volume
                progress.update(len(rows))
            for (path, _, scan, levels, metadata), made in zip(chunk, versions, strict=True):
                tensors = {
                    "real": volumes[scan]["volume"].as_tensor().half().contiguous(),
                    "versions": torch.stack([made[strength] for strength in levels]).half(),
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


def level_name(strength: float) -> str:
    """Name of an undamaged version in reports."""
    names = {REAL: "real", ROUND_TRIP: "round_trip", FULL_SAMPLE: "full_sample"}
    return names.get(strength, f"strength_{strength:.2g}")


@torch.no_grad()
def score_spectrum(
    score: Callable[[Tensor], Tensor],
    dataset: SpectrumDataset,
    severities: Sequence[float] = (0.3, 0.7),
    seed: int = 0,
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """Score every version of every scan, and the scan with every damage.

    Args:
        score: volumes (B, C, X, Y, Z) to scores (B,), on the CPU both.
        dataset: spectrum of subjects that neither the reward nor the generator was trained on.
        severities: of every damage but "half_swap".
        seed: of the damage.
        batch_size: volumes per call.

    Returns:
        one ``{name: score}`` per scan; names are those of ``level_name`` and ``"blur_0.3"``, ..., ``"half_swap"``.
    """
    rows = []
    light = torch.tensor([brightness(dataset[index]["real"]) for index in range(len(dataset))])
    for index in tqdm(range(len(dataset)), desc="scoring", unit="scan", leave=False):
        item = dataset[index]
        named = {level_name(REAL): item["real"]}
        named |= {level_name(round(float(s), 4)): v for s, v in zip(item["strengths"], item["versions"], strict=True)}
        for kind in DAMAGES:
            for severity in severities:
                generator = seeded("damage", seed, index, kind, severity)
                named[f"{kind}_{severity:.2g}"] = damage(item["real"], kind, severity, generator)
        if (dataset.subjects != dataset.subjects[index]).any():
            other = dataset[nearest_in_brightness(light, dataset.subjects, index)]["real"]
            generator = seeded("damage", seed, index, HALF_SWAP)
            named[HALF_SWAP] = damage(item["real"], HALF_SWAP, HALF_SWAP_SEVERITY, generator, other)
        scores = torch.cat(
            [score(volumes).float().cpu() for volumes in torch.stack(list(named.values())).split(batch_size)]
        )
        rows.append(dict(zip(named, scores.tolist(), strict=True)))
    return rows


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures by which a reward model is judged, from the scores of ``score_spectrum``.

    ``rank_correlation``: mean over scans of Spearman's rho between score and cleanliness over the levels from
    round-trip to full sample, ``rank_correlation_worst``: that of the worst scan; ``neighbours_in_order``: share of
    neighbouring levels in order; ``real_above_round_trip``: share of scans that score above their round-trip;
    ``damage_below_round_trip``: share of damaged scans that score below the round-trip of the same scan;
    ``score/<name>``: mean scores.
    """
    correlations, neighbours, real_above, damage_below = [], [], [], []
    for row in rows:
        levels = {name: _strength_of(name) for name in row if _strength_of(name) is not None}
        scores = torch.tensor([row[name] for name in levels], dtype=torch.float64)
        strengths = torch.tensor(list(levels.values()), dtype=torch.float64)
        correlations.append(rank_correlation(scores, strengths))
        neighbours.append(neighbours_in_order(scores, strengths))
        round_trip = row[level_name(ROUND_TRIP)]
        real_above.append(float(row[level_name(REAL)] > round_trip))
        damage_below += [float(v < round_trip) for name, v in row.items() if name not in levels and name != "real"]
    results = {
        "rank_correlation": sum(correlations) / len(correlations),
        "rank_correlation_worst": min(correlations),
        "neighbours_in_order": sum(neighbours) / len(neighbours),
        "real_above_round_trip": sum(real_above) / len(real_above),
        "damage_below_round_trip": sum(damage_below) / len(damage_below),
    }
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        results[f"score/{name}"] = sum(values) / len(values)
    return results


def _strength_of(name: str) -> float | None:
    if name in (level_name(ROUND_TRIP), level_name(FULL_SAMPLE)):
        return ROUND_TRIP if name == level_name(ROUND_TRIP) else FULL_SAMPLE
    return float(name.removeprefix("strength_")) if name.startswith("strength_") else None
