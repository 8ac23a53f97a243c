"""Stage 3: train a reward model on the spectrum of versions of each scan, from real to damaged noise.

A batch holds several versions of each of several subjects; ranking stays within a subject:

    subject 1: real | round-trip | 2 of its partial noisings and full sample | 3 of these four, damaged
    subject 2: real | ...

Scan and round-trip are in every step and are damaged equally often: were only scans damaged, looking like a scan would
speak for hidden damage, and round-trips would score higher. Kinds of damage are dealt like cards, so that no kind comes
twice before all have come.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import default_collate

from .. import viz
from ..hub.origin import inherited_license
from ..models.reward import SliceRewardModel, VolumeRewardModel
from ..rewards.damage import (
    DAMAGE_NAMES,
    DAMAGES,
    HALF_SWAP,
    HALF_SWAP_SEVERITY,
    augment,
    brightness,
    clear_haze,
    damage,
    mirror_hemisphere,
    nearest_in_brightness,
)
from ..rewards.spectrum import REAL, ROUND_TRIP, clean_label, damaged_label, dominance, spectrum_loss
from ..rewards.spectrum_dataset import SpectrumDataset
from ..rewards.spectrum_scores import level_name, score_spectrum, summarise, usable_scans
from ..utils.checks import check_least
from ..utils.seeding import seeded
from ..utils.wrappers import unwrapped
from .base import Med3DConfig, Med3DTrainer


@dataclass
class RewardModelConfig(Med3DConfig):
    """Arguments of ``RewardModelTrainer``. A batch counts scans, of each of which several versions are scored."""

    output_dir: str = field(default="outputs/reward", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Scans per device and step, at least 2 (a hemisphere comes from another one)."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Volumes at a time in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps of linear warm-up."})
    ema_decay: float = field(default=0.98, metadata={"help": "Decay of the average of the weights; 0 is off."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch of an epoch."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate: no, steps, epoch."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between two validations."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    clean_versions: int = field(
        default=4, metadata={"help": "Undamaged versions per subject and step: scan, round-trip, others drawn."}
    )
    damaged_versions: int = field(default=3, metadata={"help": "Damaged versions per subject and step."})
    min_severity: float = field(default=0.2, metadata={"help": "Damage is drawn between this and 1."})
    ranking_weight: float = field(
        default=1.0, metadata={"help": "Weight of the ranking loss beside the regression loss."}
    )
    ranking_temperature: float = field(
        default=0.1, metadata={"help": "Difference of scores that counts as one unit of log-odds in the ranking loss."}
    )
    ranking_margin: float = field(
        default=0.5, metadata={"help": "Share of the difference of two labels by which the scores have to differ."}
    )
    symmetric_share: float = field(
        default=0.1,
        metadata={
            "help": "Share of undamaged versions of which one half becomes the mirror image of the other, the label "
            "unchanged: perfect symmetry is no damage, and no merit either."
        },
    )
    max_shift: int = field(default=3, metadata={"help": "Volumes are shifted by up to this many voxels per axis."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(vars(self), {"max_shift": 0})
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size must be at least 2 scans, got {self.per_device_train_batch_size}."
            )
        if self.clean_versions < 2 or self.damaged_versions < 0:
            raise ValueError(
                "clean_versions must be at least 2 and damaged_versions at least 0, "
                f"got {self.clean_versions} and {self.damaged_versions}."
            )
        if not 0 < self.min_severity <= 1:
            raise ValueError(f"min_severity must lie in (0, 1], got {self.min_severity}.")
        if self.ranking_weight < 0 or self.ranking_temperature <= 0:
            raise ValueError(
                "ranking_weight must not be negative and ranking_temperature must be positive, "
                f"got {self.ranking_weight} and {self.ranking_temperature}."
            )
        if not 0 <= self.ranking_margin <= 1 or not 0 <= self.symmetric_share <= 1:
            raise ValueError(
                "ranking_margin and symmetric_share must lie in [0, 1], "
                f"got {self.ranking_margin} and {self.symmetric_share}."
            )


@dataclass
class Versions:
    """Versions of several subjects, with what is known about each.

    Args:
        volumes: (N, C, X, Y, Z) in [0, 1].
        labels: (N,) target score.
        better: bool (N, N), True at [i, j] where i must score higher than j; both are of one subject.
        names: N names, such as "real" or "strength_0.3 blur".
    """

    volumes: Tensor
    labels: Tensor
    better: Tensor
    names: list[str]


def draw_versions(batch: dict[str, Tensor], args: RewardModelConfig, generator: torch.Generator) -> Versions:
    """Draw the versions of a training step.

    Args:
        batch: ``real`` (S, C, X, Y, Z), ``versions`` (S, L, C, X, Y, Z), ``strengths`` (S, L), ``subject`` (S,).
            Scans of one subject alone are not half-swapped.
        args: how many of which, and how they are augmented.
        generator: all randomness, on the CPU.
    """
    real, versions, strengths = batch["real"], batch["versions"], batch["strengths"].tolist()
    count = real.shape[0]
    light = torch.tensor([brightness(volume) for volume in real])
    subjects = batch["subject"].cpu()
    possible = DAMAGE_NAMES if len(subjects.unique()) > 1 else tuple(DAMAGES)  # a half comes from another subject
    kinds = iter(_deal(len(possible), count * args.damaged_versions, generator))
    volumes, labels, names = [], [], []
    orders: list[tuple[float, float, int]] = []  # strength, severity, kind; kind -1 is undamaged
    for subject in range(count):
        levels = list(zip(strengths[subject], versions[subject], strict=True))
        round_trip = strengths[subject].index(ROUND_TRIP)
        rest = [i for i in _permutation(len(levels), generator) if i != round_trip][: args.clean_versions - 2]
        clean = [(REAL, real[subject]), levels[round_trip], *(levels[i] for i in rest)]
        group = []
        for strength, volume in clean:
            symmetric = _share(generator) < args.symmetric_share
            group.append(mirror_hemisphere(volume, generator) if symmetric else volume)
            labels.append(clean_label(strength))
            orders.append((strength, 0.0, -1))
            names.append(level_name(round(strength, 4)))
        for _ in range(args.damaged_versions):
            strength, volume = clean[_damaged_one(len(clean), generator)]
            kind = next(kinds)
            swap = DAMAGE_NAMES[kind] == HALF_SWAP
            share = _share(generator)
            severity = HALF_SWAP_SEVERITY if swap else args.min_severity + (1 - args.min_severity) * share
            other = _same_level(batch, nearest_in_brightness(light, subjects, subject), strength) if swap else None
            group.append(damage(volume, DAMAGE_NAMES[kind], severity, generator, other))
            labels.append(damaged_label(strength, severity))
            orders.append((strength, severity, kind))
            names.append(f"{level_name(round(strength, 4))} {DAMAGE_NAMES[kind]}")
        # all versions of a subject are moved alike, as if they were channels of one volume
        moved = augment(torch.cat(group), seeded(int(torch.randint(2**31, (), generator=generator))), args.max_shift)
        volumes += moved.split(real.shape[1])
    size = len(volumes) // count
    cleared = torch.stack([clear_haze(volume, generator) for volume in volumes])
    order = torch.tensor(orders)
    better = torch.block_diag(*[dominance(*group.unbind(1)) for group in order.split(size)])
    device = real.device
    return Versions(cleared, torch.tensor(labels, device=device), better.bool().to(device), names)


def _share(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _permutation(count: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=generator).tolist()


def _deal(kinds: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` cards from shuffled decks of ``kinds`` cards, one deck after the other."""
    return [card for _ in range(0, count, kinds) for card in _permutation(kinds, generator)][:count]


def _damaged_one(count: int, generator: torch.Generator) -> int:
    """Which of the undamaged versions is damaged: the scan, the round-trip (0.3 each) or another.

    Fine-tuning starts among the others, so the ways out must be closed there too.
    """
    share = _share(generator) * (0.6 if count == 2 else 1)
    if share < 0.6:
        return int(share < 0.3)
    return 2 + int(torch.randint(count - 2, (), generator=generator))


def _same_level(batch: dict[str, Tensor], subject: int, strength: float) -> Tensor:
    """The version of ``subject`` whose strength is nearest; both hemispheres of a swap are then of one quality."""
    if strength == REAL:
        return batch["real"][subject]
    return batch["versions"][subject, (batch["strengths"][subject] - strength).abs().argmin()]


class RewardModelTrainer(Med3DTrainer):
    """Trains ``VolumeRewardModel`` or ``SliceRewardModel`` by score regression plus ranking within a subject.

    Every member of an ensemble is trained by its own score. The versions of a step depend on (seed, rank, step) alone;
    where `SliceRewardModel` cuts in training comes from torch's generator, whose state checkpoints hold.

    Args:
        model: the reward model.
        args: arguments.
        train_dataset, eval_dataset: spectra of different subjects.
    """

    _name = "RewardModel"
    card_notes = (
        "Scores volumes (B, C, X, Y, Z) in [0, 1] by realism: about 1 for a real scan, lower the less real. The "
        "figures are mean scores of the versions of validation scans, and how often they stand in the right order."
    )

    def __init__(
        self,
        model: VolumeRewardModel | SliceRewardModel,
        args: RewardModelConfig,
        train_dataset: SpectrumDataset,
        eval_dataset: SpectrumDataset | None = None,
        **kwargs,
    ) -> None:
        wanted = args.per_device_train_batch_size * args.world_size
        if len(train_dataset) < wanted:
            raise ValueError(
                f"{len(train_dataset)} scans cannot fill a step of {wanted} ({args.world_size} process(es) with "
                f"{args.per_device_train_batch_size} each)."
            )
        model = self.reward_model = unwrapped(model)
        kwargs.setdefault("data_collator", default_collate)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        volume = train_dataset[0]["real"]
        self.card_volume_shape = tuple(volume.shape[1:])
        self.card_data = (
            f"Trained on {len(train_dataset)} scans of {' x '.join(map(str, volume.shape[1:]))} voxels, RAS axes, "
            "intensities in [0, 1], and on versions of them that a generator made."
        )
        self.inherited_license = inherited_license(model)
        self._micro_step = (-1, 0)  # optimizer step, batches seen in it
        self._versions_shown = False

    def compute_loss(
        self, model: Callable, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """One step's loss; its parts are averaged into the next log."""
        step, batch = self.state.global_step, 0
        if self._micro_step[0] == step:
            batch = self._micro_step[1] + 1
        self._micro_step = (step, batch)
        generator = seeded("reward", self.args.seed, self.args.process_index, step, batch)
        drawn = draw_versions(inputs, self.args, generator)
        scores = model(drawn.volumes, return_members=True).float()  # (N, M)
        losses = [
            spectrum_loss(member, drawn.labels, drawn.better, self.args.ranking_temperature, self.args.ranking_margin)
            for member in scores.unbind(1)
        ]
        regression, ranking = (torch.stack(values).mean() for values in zip(*losses, strict=True))
        for name, value in (("regression", regression), ("ranking", ranking)):
            self.record_part(name, value)
        loss = regression + self.args.ranking_weight * ranking
        return (loss, {"scores": scores}) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: SpectrumDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score the validation spectrum with the averaged weights; see ``summarise`` for the figures.

        Scans with a score that is NaN or infinite are left out, counted as `unjudged` and named in a warning.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs an eval_dataset: the spectrum of subjects that nothing was trained on.")
        self.model.eval()

        def score(volumes: Tensor) -> Tensor:
            return self.reward_model(volumes.to(self.args.device))

        with self.ema_weights(), self.accelerator.autocast():
            rows = score_spectrum(score, dataset, seed=self.args.seed, batch_size=self.args.per_device_eval_batch_size)
        usable = usable_scans(rows)
        summary = summarise([rows[i] for i in usable])
        results = {f"{metric_key_prefix}_{name}": value for name, value in summary.items()}
        if len(usable) < len(rows):
            results[f"{metric_key_prefix}_unjudged"] = float(len(rows) - len(usable))
        if usable:
            self._log_pictures(summary, dataset)
        return self.conclude_evaluation(results)

    def _log_pictures(self, summary: dict[str, float], dataset: SpectrumDataset) -> None:
        """The first scan's versions with the mean scores of all scans, and once that scan with every damage."""
        item = dataset[0]
        versions = _named_versions(item)
        scores = {"mean validation score": [summary[f"score/{level}"] for level in versions]}
        self.log_figure("spectrum", viz.spectrum_strip(versions, scores))
        if self._versions_shown:
            return
        self._versions_shown = True
        other = dataset[len(dataset) - 1]["real"]
        damaged = {kind: damage(item["real"], kind, 0.5, seeded("picture", kind), other) for kind in DAMAGE_NAMES}
        self.log_figure("damage", viz.volume_rows({kind: volume[None] for kind, volume in damaged.items()}))

    def film_figures(self) -> dict[str, Figure]:
        """The noise spectrum of the first validation scan, or else training scan, with its scores of now."""
        item = (self.train_dataset if self.eval_dataset is None else self.eval_dataset)[0]
        versions = _named_versions(item)
        batch = torch.stack(list(versions.values())).split(self.args.per_device_eval_batch_size)
        scores = torch.cat([self.reward_model(volumes.to(self.args.device)).float().cpu() for volumes in batch])
        return {"spectrum_of_one_scan": viz.spectrum_strip(versions, {"score": scores.tolist()}, title=self.film_title)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the reward model in half precision (fp16: bfloat16 would round small differences away)."""
        copy.deepcopy(self.reward_model).half().save_pretrained(folder)


def _named_versions(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name of a level -> (C, X, Y, Z), of one item of a `SpectrumDataset`: the scan, then its versions."""
    strengths = (REAL, *(round(strength, 4) for strength in item["strengths"].tolist()))
    names = [level_name(strength) for strength in strengths]
    return dict(zip(names, (item["real"], *item["versions"]), strict=True))
