"""Scores of a reward model on the noise spectrum and on damaged scans, and the figures by which it is judged."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..utils.seeding import seeded
from .damage import DAMAGES, HALF_SWAP, HALF_SWAP_SEVERITY, brightness, damage, nearest_in_brightness
from .spectrum import FULL_SAMPLE, REAL, ROUND_TRIP, neighbours_in_order, rank_correlation
from .spectrum_dataset import SpectrumDataset

FIGURES = (
    "rank_correlation",
    "rank_correlation_worst",
    "neighbours_in_order",
    "real_above_round_trip",
    "damage_below_round_trip",
)


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


def usable_scans(rows: Sequence[dict[str, float]]) -> list[int]:
    """Numbers of the scans of ``score_spectrum`` all of whose scores are finite; a warning names the others."""
    lost = [(i, name, score) for i, row in enumerate(rows) for name, score in row.items() if not math.isfinite(score)]
    broken = {i for i, _, _ in lost}
    if lost:
        index, name, score = lost[0]
        warnings.warn(
            f"{len(broken)} of {len(rows)} scans have a score that is NaN or infinite and are left out, the first is "
            f"scan {index} (counted from 0) with {name} = {score}.",
            stacklevel=2,
        )
    return [i for i in range(len(rows)) if i not in broken]


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures by which a reward model is judged, from the scores of ``score_spectrum``.

    ``rank_correlation``: mean over scans of Spearman's rho between score and cleanliness over the levels from
    round-trip to full sample, ``rank_correlation_worst``: that of the worst scan; ``neighbours_in_order``: share of
    neighbouring levels in order; ``real_above_round_trip``: share of scans that score above their round-trip;
    ``damage_below_round_trip``: share of damaged scans that score below the round-trip of the same scan;
    ``score/<name>``: mean scores.

    Where there are no rows the figures are minus infinity, and there are no mean scores.
    """
    if not rows:
        return dict.fromkeys(FIGURES, -math.inf)
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
    figures = (
        sum(correlations) / len(correlations),
        min(correlations),
        sum(neighbours) / len(neighbours),
        sum(real_above) / len(real_above),
        sum(damage_below) / len(damage_below),
    )
    results = dict(zip(FIGURES, figures, strict=True))
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        results[f"score/{name}"] = sum(values) / len(values)
    return results


def _strength_of(name: str) -> float | None:
    if name in (level_name(ROUND_TRIP), level_name(FULL_SAMPLE)):
        return ROUND_TRIP if name == level_name(ROUND_TRIP) else FULL_SAMPLE
    return float(name.removeprefix("strength_")) if name.startswith("strength_") else None
