"""The decisions of `reproduce_paper.py` as pure functions: what is tried and chosen, what equal compute is, which
sample of two is kept, when the test subjects may be opened, and what counts as evidence.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusers_med3d.evaluation import Report, VolumeSet
from diffusers_med3d.evaluation.report import FLOOR, REFERENCE
from diffusers_med3d.hub import cards
from diffusers_med3d.metrics import Extractor, Interval, bootstrap_interval, features_of, kid, ms_ssim_matrix
from diffusers_med3d.utils.files import once
from diffusers_med3d.utils.hashing import json_hash

PHASES = ("rollout", "decode", "reward", "metrics", "update")
"""Parts of an RL step that `ppo_finetune.py` takes the time of."""

NARROWING = 0.02
"""How much further from that of real scans the MS-SSIM between samples may lie after fine-tuning than before."""

REDUCTION = 0.15
"""Share of the base's excess distance over the floor by which fine-tuning shall lower it."""

RESAMPLING_SLACK = 0.005
"""How far above zero an interval may end by the draw of the resamples alone: where no sample is flagged as a copy, it
ends at zero but for that."""

NOT_RUN = "not run"

Setting = dict[str, float | int]


def coordinate_sweep(
    grid: Mapping[str, Sequence[float | int]], score: Callable[[Setting], float]
) -> tuple[Setting, list[tuple[Setting, float]]]:
    """Vary one setting at a time, in the order of the grid, each time keeping the best; start from the first values.

    A full grid costs the product of its sides, this costs their sum; what it cannot see is that two settings would have
    to change together.

    Args:
        grid: setting -> values to try.
        score: lower is better; infinite for a setting that may not be chosen. Called once for each setting.

    Returns:
        the best setting, and all that were tried with their scores.

    Raises:
        ValueError: an empty list of values, or no setting that may be chosen.
    """
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ValueError(f"The sweep has no values for {', '.join(empty)}.")
    best = {name: values[0] for name, values in grid.items()}
    tried = [(dict(best), score(best))]
    for name, values in grid.items():
        for value in values:
            candidate = best | {name: value}
            if candidate not in [setting for setting, _ in tried]:
                tried.append((candidate, score(candidate)))
        best = min(tried, key=lambda entry: entry[1])[0]
    if min(own for _, own in tried) == math.inf:
        raise ValueError("No setting may be chosen: every one of them narrows the samples beyond what is allowed.")
    return best, tried


def measure(samples: VolumeSet, scans: VolumeSet, extractor: Extractor, max_pairs: int = 100) -> dict[str, float]:
    """What a choice on the validation subjects looks at.

    Args:
        samples: of a model, with the class mix of the scans.
        scans: of the validation subjects.
        extractor: of features that were never rewarded.
        max_pairs: pairs of a class whose MS-SSIM is taken.

    Returns:
        "kid" to the scans; mean MS-SSIM between samples of a class, "similarity", and between scans,
        "similarity_of_scans".
    """
    features = [features_of(extractor, one.volumes) for one in (samples, scans)]
    alike = [ms_ssim_matrix(one.volumes, one.labels, max_pairs=max_pairs).nanmean().item() for one in (samples, scans)]
    return {"kid": kid(*features).value, "similarity": alike[0], "similarity_of_scans": alike[1]}


def selection_score(found: Mapping[str, float], base: Mapping[str, float]) -> float:
    """What a choice minimises: the kernel distance, unless the samples have become too much alike.

    Args:
        found: answer of `measure` for a model.
        base: that for the pre-trained model.

    Returns:
        the distance; infinity if the similarity is more than 0.02 further from the real one than the base's is.
    """
    real = base["similarity_of_scans"]
    allowed = abs(base["similarity"] - real) + NARROWING
    return found["kid"] if abs(found["similarity"] - real) <= allowed else math.inf


def equal_compute_steps(seconds: Mapping[str, float], transitions: int, batch_size: int, has_reference: bool) -> int:
    """Steps of continued pre-training that cost as much as a run of fine-tuning.

    Taken from the run's own clock: the update tells what a forward and backward pass costs, the other phases how much
    more there was (rollout, decoding, rewards). A transition costs a forward pass, a backward pass of twice that, and
    one of the reference; a latent of pre-training costs the first two. Shares of one run's time hold on a shared
    machine too, where two runs' times cannot be compared.

    Args:
        seconds: phase -> seconds, all of `PHASES`.
        transitions: (sample, step) pairs that were trained on.
        batch_size: of continued pre-training.
        has_reference: whether there was a KL term.
    """
    missing = [phase for phase in PHASES if phase not in seconds]
    if missing or seconds["update"] <= 0:
        raise ValueError(f"The seconds of the fine-tuning must hold {PHASES}, update above 0; got {dict(seconds)}.")
    per_transition = (4 if has_reference else 3) / 3  # in latents of pre-training
    latents = transitions * per_transition * sum(seconds[phase] for phase in PHASES) / seconds["update"]
    return math.ceil(latents / batch_size)


def best_of(rewards: Tensor) -> Tensor:
    """Which of several candidates has the highest sum of rewards, each scaled as in fine-tuning: by its spread about
    the mean of the candidates, so that differences between classes or noises, of which none is chosen, do not weigh.

    Args:
        rewards: (N, K, R): N samples, K candidates of each, R rewards.

    Returns:
        (N,) in [0, K)
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    scale = centred.flatten(0, 1).std(0, correction=0).clamp_min(1e-8)
    return (centred / scale).sum(-1).argmax(1)


def open_test(marker: str | Path, protocol: Mapping[str, Any]) -> None:
    """Let the test subjects be opened for one protocol only: the first time leaves a marker, any other is refused.

    Args:
        marker: file that remembers.
        protocol: all that was chosen and the hash of every model that is judged. The same protocol may come again, so
            that a run that was stopped can be finished.

    Raises:
        ValueError: the test subjects have been seen by another protocol.
    """
    key = json_hash(protocol)
    found = once(marker, lambda: {"protocol": key, "opened": datetime.now(UTC).isoformat(timespec="seconds")})
    if found["protocol"] != key:
        raise ValueError(
            f"The test subjects were opened on {found['opened']} with another configuration ({marker}). A second look "
            "would choose among results on the test set; report the first."
        )


# ------------------------------------------------------------------------------------------- what counts as shown


class Claim(NamedTuple):
    """What the issue of the experiment asks for, what was found, and whether that is enough: yes, no, not shown, or not
    run."""

    wanted: str
    found: Interval
    answer: str


def over_seeds(draws: Mapping[str, NDArray], runs: Sequence[str], seed: int = 0) -> NDArray[np.float64]:
    """Mean of the runs of one arm, (1 + R,): every resample of subjects and samples draws the runs anew as well.

    Args:
        draws: of one figure, set -> (1 + R,).
        runs: names of the sets that differ by their seed of fine-tuning alone.
        seed: of the draws of runs.
    """
    values = np.stack([draws[name] for name in runs])  # (S, 1 + R)
    counts = np.random.default_rng(seed).multinomial(len(runs), [1 / len(runs)] * len(runs), size=values.shape[1])
    counts[0] = 1
    return (counts.T * values).sum(0) / len(runs)


def below_zero(difference: Interval) -> str:
    """Whether a figure of which less is better got better: "yes" and "no" only where the interval is clear of zero."""
    if not math.isfinite(difference.low):
        return "not shown"
    return "yes" if difference.high < 0 else "no" if difference.low > 0 else "not shown"


def at_most(difference: Interval, limit: float) -> str:
    """Whether a figure stayed within a limit: "yes" and "no" only where the interval is clear of it."""
    if not math.isfinite(difference.low):
        return "not shown"
    return "yes" if difference.high <= limit else "no" if difference.low > limit else "not shown"


def claims(
    report: Report, base: str, runs: Sequence[str], alone: Sequence[str], controls: Sequence[str], ceiling: str
) -> list[Claim]:
    """What was wanted of fine-tuning with both rewards, against what a report found.

    Args:
        report: of `metrics.evaluate`, with base, runs and ceiling.
        base: the pre-trained model.
        runs: both rewards, one run per seed, at least one.
        alone: each reward alone; what the report lacks was not run.
        controls: what must be beaten, likewise.
        ceiling: round-trips of the reference scans through the autoencoder.
    """
    found: list[Claim] = []
    distances = {figure.extractor: figure for figure in reversed(report.figures) if figure.name.startswith("KID")}
    for extractor, figure in distances.items():  # the first KID of each extractor: the mean over its parts
        draws, name = figure.draws, f"{figure.name} ({extractor.split(',')[0]})"
        after = over_seeds(draws, runs)
        gain = bootstrap_interval(after - draws[base])
        reduction = bootstrap_interval(1 - (after - draws[FLOOR]) / (draws[base] - draws[FLOOR]))
        found.append(Claim(f"{name}: paired difference to {base} below zero", gain, below_zero(gain)))
        enough = reduction.value >= REDUCTION and below_zero(gain) == "yes"
        wanted = f"{name}: excess at least {100 * REDUCTION:g} % below that of {base}"
        found.append(Claim(wanted, reduction, "yes" if enough else "no"))
        worst = max((bootstrap_interval(draws[run] - draws[base]) for run in runs), key=lambda one: one.high)
        found.append(
            Claim(f"{name}: below {base} with every seed (the worst of {len(runs)})", worst, below_zero(worst))
        )
        for other in (*alone, *controls):
            wanted = f"{name}: both rewards below {other}"
            if other in draws:
                difference = bootstrap_interval(after - draws[other])
                found.append(Claim(wanted, difference, below_zero(difference)))
            else:
                found.append(Claim(wanted, Interval(math.nan), NOT_RUN))

    # In distance to the scans, so that too much detail closes nothing
    detail = report.figure("high-frequency power").draws
    after, before, best = (
        abs(one - detail[REFERENCE]) for one in (over_seeds(detail, runs), detail[base], detail[ceiling])
    )
    attainable = "at least half of the attainable gap in high-frequency power closed"
    if before[0] > best[0]:
        closed = bootstrap_interval((before - after) / (before - best))
        found.append(Claim(attainable, closed, "yes" if closed.value >= 0.5 and closed.low > 0 else "no"))
    else:
        found.append(Claim(attainable, Interval(math.nan), "nothing to close"))

    alike = report.figure("MS-SSIM, mean").draws
    further = abs(over_seeds(alike, runs) - alike[REFERENCE]) - abs(alike[base] - alike[REFERENCE])
    narrowed = bootstrap_interval(further)
    diverse = f"MS-SSIM between samples at most {NARROWING} further from that between scans than before"
    found.append(Claim(diverse, narrowed, at_most(narrowed, NARROWING)))

    copies = report.figure("copies flagged").draws
    more = bootstrap_interval(over_seeds(copies, runs) - copies[REFERENCE])
    found.append(Claim("no more samples flagged as copies than unseen scans", more, at_most(more, RESAMPLING_SLACK)))
    return found


def downstream_claims(results: Mapping[str, Any], real_per_class: int = 10) -> list[Claim]:
    """What was wanted of the classifier, from the results in report.json of `downstream_classification.py`.

    Args:
        results: real scans per class -> {"differences": contrast -> figure -> [value, low, high]}.
        real_per_class: which of them decides.
    """
    if str(real_per_class) not in results:
        return []
    wanted = (
        "before - real",
        "after - before",
        "after - before, beyond shuffled",
    )
    differences = results[str(real_per_class)]["differences"]
    intervals = {name: Interval(*differences[name]["log-loss"]) for name in wanted}
    return [
        Claim(f"log-loss with {real_per_class} real scans per class: {name}, below zero", own, below_zero(own))
        for name, own in intervals.items()
    ]


def claim_table(found: Sequence[Claim]) -> str:
    """Claims as a Markdown table."""
    return table(
        [
            {
                "wanted": one.wanted,
                "found [95 % interval]": "" if math.isnan(one.found.value) else one.found,
                "answer": one.answer,
            }
            for one in found
        ]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table; floats get four digits."""

    def cell(value: Any) -> str:
        return (
            f"{value:.4g}" if isinstance(value, float) else "; ".join(value) if isinstance(value, list) else str(value)
        )

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draft_card(
    folder: str | Path,
    name: str,
    base_model: str,
    training: str,
    proof: str,
    figures: Sequence[Mapping],
    run: str,
    part: str,
) -> cards.Card:
    """Draft of the card of a fine-tuned generator, to be finished by a person.

    Args:
        folder: the fine-tuned pipeline.
        name: of the checkpoint.
        base_model: what was fine-tuned.
        training: how, in Markdown.
        proof: what was found, in Markdown.
        figures: those of `Report.to_dict`.
        run: which set of the figures is this pipeline.
        part: of the split that judged.
    """
    card = cards.of_folder(folder, name)
    card.base_model, card.license, card.tags = base_model, "cc-by-sa-3.0", ["reinforcement-learning", "ppo"]
    card.data = f"As `{base_model}`: see its card. The rewards learned from the same training scans."
    card.training, card.evaluation = training, proof
    card.figures = [
        cards.Figure(
            metric="kid",
            name=f"{figure['name']}, {figure['extractor']}",
            value=figure["sets"][run]["value"],
            floor=figure["sets"][FLOOR]["value"],
            error=figure["sets"][run]["stderr"],
            split=part,
            note=f"{base_model}: {figure['sets'][next(iter(figure['excess']))]['value']:.4g}",
        )
        for figure in figures
        if figure["name"].startswith("KID")
    ]
    card.limits = (
        "Ageing of healthy adults from one site; no disease. The paper's claims about tumours and dementia were not "
        "tested here; BraTS 2019 (HGG against LGG) and OASIS-1 (dementia against none) are the data on which they "
        "could be. The generator was trained with the labels of all training scans, so the classifier's table says "
        "what volumes carry, not that labels were saved."
    )
    copies = next(figure["sets"] for figure in figures if figure["name"] == "copies flagged")
    card.memorisation = (
        f"Flagged as copies of training scans: {copies[run]['value']:.1%} of the samples, "
        f"{copies[REFERENCE]['value']:.1%} of unseen scans. A volume is flagged when the ratio of its nearest to its "
        "second nearest training scan is below that of 95 % of the training scans among themselves; blends of two "
        "subjects escape this."
    )
    return card
