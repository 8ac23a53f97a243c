"""The spectrum that reward models learn from: labels without a human (arXiv 2603.06173, weak points answered).

A real scan is noised to a strength s and denoised by the generator: the more noise, the less real. Every version has a
strength and, when damaged on top, a severity; both together give its label and who beats whom:

    version                        strength  label
    real scan                          -1    1
    autoencoder round-trip              0    0.95      near the top: the decoder's own signature is no fault
    partial noising                   0 - 1  0.95 - 0.6 s
    full sample, another anatomy        1    0.35      the reward must have seen globally wrong brains
    any of them, damaged by v           -    (its label, at most 0.95) x (1 - v)

Damage is what the generator does not make by itself, so that reinforcement learning finds no way out there: blur,
noise, noise on top of blur, over-sharpening, wrong contrast, bias field, thick slices, shuffled blocks, a hemisphere of
another subject, cut-off anatomy. Voxels up to ``FOREGROUND_THRESHOLD`` are background, which only damage that moves
anatomy changes. Pure functions on one volume (C, X, Y, Z) in [0, 1] in RAS; all randomness comes from
``generator``, on the CPU, so a seed gives the same damage on every device.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

REAL = -1.0
ROUND_TRIP = 0.0
FULL_SAMPLE = 1.0
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Levels that a spectrum is made at where nothing else is asked for."""

ROUND_TRIP_LABEL = 0.95
FULL_SAMPLE_LABEL = 0.35


def clean_label(strength: float) -> float:
    """Label of an undamaged version: 1 for ``REAL``, else linear in the strength in [0, 1]."""
    if strength == REAL:
        return 1.0
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be {REAL} (real scan) or lie in [0, 1], got {strength}.")
    return ROUND_TRIP_LABEL - (ROUND_TRIP_LABEL - FULL_SAMPLE_LABEL) * strength


def damaged_label(strength: float, severity: float) -> float:
    """Label of a version damaged with ``severity`` in (0, 1]; a damaged scan starts from the round-trip's label."""
    return clean_label(max(strength, ROUND_TRIP)) * (1 - severity)


def dominance(strengths: torch.Tensor, severities: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Which version of one subject is more real than which, wherever that is beyond doubt.

    i beats j if it is noised no more and damaged no more, and less in one of the two; two damaged versions compare only
    if the kind of damage is the same. Damage puts a scan below its round-trip (so a damaged scan counts as strength 0).

    Args:
        strengths, severities, kinds: (N,) strength, severity (0 = undamaged) and kind of damage of each version.

    Returns:
        bool (N, N), True at [i, j] where i must score higher than j.
    """
    damaged = severities > 0
    strengths = torch.where(damaged, strengths.clamp_min(ROUND_TRIP), strengths)
    less_noised, less_damaged = strengths[:, None] - strengths[None], severities[:, None] - severities[None]
    comparable = ~damaged[:, None] | (kinds[:, None] == kinds[None])
    return comparable & (less_noised <= 0) & (less_damaged <= 0) & ((less_noised < 0) | (less_damaged < 0))


# ---------------------------------------------------------------------------------------------------- partial noising


def check_strengths(strengths: Sequence[float], num_inference_steps: int) -> None:
    """Refuse levels that no spectrum can be made of.

    Raises:
        ValueError: no round-trip (0) among at least two levels up to 1, unless full samples (1) are all; a level of
            less than half a denoising step.
    """
    if set(strengths) == {FULL_SAMPLE}:
        return
    if len(set(strengths)) < 2 or ROUND_TRIP not in strengths or not all(0 <= s <= 1 for s in strengths):
        raise ValueError(f"strengths must be 0 (round-trip) and others up to 1, or 1 alone, got {list(strengths)}.")
    least = min(strength for strength in strengths if strength > 0)
    if round(least * num_inference_steps) == 0:
        raise ValueError(
            f"strength {least} is no more than half of one of {num_inference_steps} steps; take more denoising steps, "
            f"at least {math.floor(0.5 / least) + 1}, or leave it out of the strengths."
        )


def partial_noising(
    pipeline: Callable,
    volumes: torch.Tensor,
    class_labels: Sequence[int | str | None] | None,
    strength: float,
    num_inference_steps: int,
    generators: list[torch.Generator],
    conditions: Mapping[str, Sequence] | None = None,
) -> torch.Tensor:
    """One level of the spectrum, SDEdit (Meng et al. 2022, arXiv 2108.01073) in latent space.

    Args:
        pipeline: ``MedDiffusion3DPipeline`` whose generator never saw these subjects.
        volumes: real scans (B, C, X, Y, Z) in [0, 1].
        class_labels: B of them, None for a generator without classes.
        strength: 0 = autoencoder round-trip; 1 = full sample of the same class that never sees the scan.
        num_inference_steps: steps of a full sample; strength s takes s of them.
        generators: one per volume, so that a version does not depend on its batch.
        conditions: as the pipeline takes them, B of each; None for a generator that takes none.

    Returns:
        volumes (B, C, X, Y, Z) in [0, 1], on the CPU.
    """
    output = pipeline(
        volumes=volumes,
        strength=strength,
        class_labels=class_labels,
        conditions=conditions,
        num_inference_steps=num_inference_steps,
        generator=generators,
    )
    return output.volumes.cpu()


# ------------------------------------------------------------------------------------------------------------- damage


# ------------------------------------------------------------------------------------------------------- augmentation


# ------------------------------------------------------------------------------------------------------ loss and order


def spectrum_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    better: torch.Tensor,
    temperature: float,
    margin: float = 0.5,
    beta: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Regression on the label and ranking within a subject.

    Regression is smooth L1 (Huber with threshold ``beta``); ranking is the Bradley-Terry likelihood (Bradley & Terry
    1952; as in Ouyang et al. 2022, arXiv 2203.02155, eq. 1) of score / temperature, with a margin for how much better
    one is (Touvron et al. 2023, arXiv 2307.09288, eq. 2).

    Args:
        scores, labels: (N,).
        better: bool (N, N), True at [i, j] where i must score higher than j; never across subjects.
        temperature: difference of scores that counts as one unit of log-odds.
        margin: share of the difference of two labels by which the scores have to differ.

    Returns:
        regression loss and ranking loss (0 when there is no pair), scalars.
    """
    regression = F.smooth_l1_loss(scores, labels, beta=beta)
    gaps = (scores[:, None] - scores[None])[better]
    wanted = margin * (labels[:, None] - labels[None])[better]
    ranking = F.softplus((wanted - gaps) / temperature).mean() if gaps.numel() else scores.sum() * 0.0
    return regression, ranking


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of (N,) values from 0; equal values share the mean of their ranks."""
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return below + (equal - 1) / 2


def rank_correlation(scores: torch.Tensor, strengths: torch.Tensor) -> float:
    """Spearman's rho of (N,) scores and *cleanliness*: 1 if the score falls with every level, 0 if it is constant."""
    first, second = average_ranks(scores.double()), average_ranks(-strengths.double())
    first, second = first - first.mean(), second - second.mean()
    scale = first.norm() * second.norm()
    return float((first * second).sum() / scale) if scale > 0 else 0.0


def neighbours_in_order(scores: torch.Tensor, strengths: torch.Tensor) -> float:
    """Share of neighbouring levels (in order of strength) whose less noised version scores strictly higher."""
    if scores.numel() < 2:
        raise ValueError(f"neighbouring levels need at least two of them, got {scores.numel()}.")
    ordered = scores[strengths.argsort()]
    return float((ordered[:-1] > ordered[1:]).double().mean())
