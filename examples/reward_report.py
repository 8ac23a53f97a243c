"""How well do rewards tell real from unreal volumes, on subjects that nothing was trained on?

    python examples/reward_report.py --data_dir DATA --split_file split.json --model_name_or_path brain-t1 \\
        --reward_funcs brain-t1-reward-3d brain-t1-reward-2d --output_dir outputs/reward-report

Prints a table, and whether the rewards prefer the scans that they were trained on; writes report.json, report.md,
spectrum.png and damage.png. --part test is for the final proof only.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from diffusers_med3d import viz
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.data.split import load_split
from diffusers_med3d.data.training_subjects import read_training_subjects, refuse_seen_subjects
from diffusers_med3d.metrics import training_above_unseen
from diffusers_med3d.pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from diffusers_med3d.rewards.damage import DAMAGE_NAMES, damage
from diffusers_med3d.rewards.learned import LearnedReward
from diffusers_med3d.rewards.loading import DEFAULT_REWARDS, load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rewards.spectrum import REAL, STRENGTHS, check_strengths
from diffusers_med3d.rewards.spectrum_dataset import SpectrumDataset, build_spectrum
from diffusers_med3d.rewards.spectrum_scores import level_name, score_spectrum, summarise, usable_scans
from diffusers_med3d.rl import check_signature, reward_names
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.files import write_json, write_whole
from diffusers_med3d.utils.seeding import seeded

WANTED = {"rank_correlation": ">= 0.95", "damage_below_round_trip": "1"}


@dataclass
class ReportArguments:
    """What is judged, and on what."""

    model_name_or_path: str = field(
        default="brain-t1", metadata={"help": "Generator that makes the spectrum: bundled name, folder or Hub id."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: list(DEFAULT_REWARDS),
        metadata={
            "help": "Rewards: bundled name, folder or Hub id of a reward model, file.py:function or "
            "package.module:function, which is called with volumes alone."
        },
    )
    part: str = field(
        default="validation", metadata={"help": "Subjects: validation or test.", "choices": ["validation", "test"]}
    )
    num_subjects: int | None = field(
        default=None, metadata={"help": "The first so many subjects of the part, for a quick look. Not set: all."}
    )
    output_dir: str = field(default="outputs/reward-report", metadata={"help": "Where the report and the spectrum go."})
    strengths: list[float] = field(
        default_factory=lambda: list(STRENGTHS),
        metadata={"help": "Noise levels: 0 is the autoencoder round-trip, 1 a full sample of the same class."},
    )
    severities: list[float] = field(
        default_factory=lambda: [0.3, 0.7], metadata={"help": "Severities of every damage, in (0, 1]."}
    )
    spectrum_steps: int = field(default=20, metadata={"help": "Denoising steps of a full sample of the spectrum."})
    spectrum_batch_size: int = field(default=8, metadata={"help": "Scans at a time when the spectrum is made."})
    seed: int = field(default=0, metadata={"help": "Seed of the spectrum's noise and of the damage."})

    def __post_init__(self) -> None:
        if self.num_subjects is not None and self.num_subjects < 2:
            raise ValueError(f"num_subjects must be at least 2, got {self.num_subjects}.")
        check_strengths(self.strengths, self.spectrum_steps)
        if not all(0 < severity <= 1 for severity in self.severities):
            raise ValueError(f"severities must lie in (0, 1], got {self.severities}.")


def table(reports: dict[str, dict[str, float]], spread: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per figure, a column per reward; mean scores with their standard deviation over scans."""
    names = list(next(iter(reports.values())))
    lines = [f"| figure | {' | '.join(reports)} | wanted |", "|---|" + "---|" * (len(reports) + 1)]
    for name in names:
        cells = []
        for reward, report in reports.items():
            deviation = spread[reward].get(name)
            cells.append(f"{report[name]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}"))
        lines.append(f"| {name} | {' | '.join(cells)} | {WANTED.get(name, '')} |")
    return "\n".join(lines)


def named_rewards(given: list[str], device: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The rewards by the names that a trainer logs, each from volumes (B, C, X, Y, Z) to scores (B,) on the CPU."""
    rewards = load_rewards(given)
    names = reward_names(rewards)
    for func, name in zip(rewards, names, strict=True):
        check_signature(func, name, [])
        if isinstance(func, LearnedReward):
            func.to(device)
    return {
        name: lambda volumes, func=func, name=name: score([func], [name], volumes, {})[:, 0]
        for func, name in zip(rewards, names, strict=True)
    }


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    return {name: score if math.isfinite(score) else None for name, score in row.items()}


def main() -> None:
    """Make the spectrum of the unseen subjects, damage their scans, score, write."""
    args, data = ScriptParser(ReportArguments, DataArguments, description=__doc__).parse()
    use_all_cores()
    output = Path(args.output_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with refused_in_one_line():
        rewards = named_rewards(args.reward_funcs, device)
        pipeline = MedDiffusion3DPipeline.from_pretrained(args.model_name_or_path).to(device)
        trained_on = read_training_subjects(args.model_name_or_path)
        data.adopt(settings_of(pipeline), f"the generator {args.model_name_or_path}")
        subjects = load_split(data.split_file)[args.part][: args.num_subjects]
        scans = VolumeDataset(data.data_dir, subjects, **data.reading())
        refuse_seen_subjects([item["subject"] for item in scans], trained_on, args.model_name_or_path)
    paths = build_spectrum(
        pipeline,
        scans,
        trained_on,
        output / f"spectrum-{args.part}",
        args.strengths,
        args.spectrum_steps,
        batch_size=args.spectrum_batch_size,
        seed=args.seed,
    )
    dataset = SpectrumDataset(paths)
    rows = {name: score_spectrum(reward, dataset, args.severities, args.seed) for name, reward in rewards.items()}
    usable = {name: usable_scans(scores) for name, scores in rows.items()}
    for name, kept in usable.items():
        if not kept:
            raise SystemExit(f"the reward {name} gives no scan a finite score.")
    judged = {name: [rows[name][i] for i in kept] for name, kept in usable.items()}
    reports = {name: summarise(scores) for name, scores in judged.items()}
    spread = {
        name: {f"score/{v}": torch.tensor([row[v] for row in scores]).std(unbiased=False).item() for v in scores[0]}
        for name, scores in judged.items()
    }
    seen = VolumeDataset.from_arguments(data, "train")
    seen_volumes = seen.stack()
    seen_scores = {
        name: torch.cat([reward(batch) for batch in seen_volumes.split(8)]).tolist() for name, reward in rewards.items()
    }
    for name, scores in seen_scores.items():
        if not all(math.isfinite(score) for score in scores):
            raise SystemExit(f"the reward {name} gives a training scan a score that is NaN or infinite.")
    seen_subjects, subjects = ([item["subject"] for item in part] for part in (seen, scans))
    seen_labels, labels = ([item["class_label"] for item in part] for part in (seen, scans))
    memory = {
        name: training_above_unseen(
            seen_scores[name],
            [row["real"] for row in judged[name]],
            seen_subjects,
            [subjects[i] for i in kept],
            seen_labels,
            [labels[i] for i in kept],
        )
        for name, kept in usable.items()
    }
    text = f"{len(scans)} scans of the {args.part} subjects\n\n"
    for name, kept in usable.items():
        if len(kept) < len(scans):
            text += f"{name}: {len(scans) - len(kept)} scans without a finite score are left out\n\n"
    text += f"{table(reports, spread)}\n\n"
    text += f"Memorisation: of {len(seen)} training scans, share above an unseen scan of their class (0.5 by chance): "
    text += ", ".join(f"{name} {interval}" for name, interval in memory.items()) + "\n"
    print(text)

    write_whole(output / "report.md", text)
    write_json(
        output / "report.json",
        {
            "part": args.part,
            "scans": len(scans),
            "report": reports,
            "scores": {name: [_finite(row) for row in scores] for name, scores in rows.items()},
            "training_scores": seen_scores,
            "training_above_unseen": {name: interval and asdict(interval) for name, interval in memory.items()},
        },
    )
    item, other = dataset[0], dataset[len(dataset) - 1]["real"]
    levels = [level_name(round(strength, 4)) for strength in (REAL, *item["strengths"].tolist())]
    versions = dict(zip(levels, (item["real"], *item["versions"]), strict=True))
    scores = {name: [report[f"score/{level}"] for level in levels] for name, report in reports.items()}
    title = "One scan and its versions, and the mean score of all scans"
    viz.save(viz.spectrum_strip(versions, scores, spacing=data.spacing, title=title), output / "spectrum.png")
    damaged = {"real": item["real"]}
    damaged |= {
        kind: damage(item["real"], kind, args.severities[-1], seeded("picture", kind), other) for kind in DAMAGE_NAMES
    }
    rows = {name: volume[None] for name, volume in damaged.items()}
    viz.save(viz.volume_rows(rows, spacing=data.spacing), output / "damage.png")


if __name__ == "__main__":
    main()
