"""Does a classifier get better with generated scans? The protocol as functions on tensors, without files or flags.

A small 3D DenseNet tells two classes of real, unseen scans apart. It is trained on few real scans, on generated ones,
or on both; all arms of one seed share the real scans, the initial weights, the number of steps and the batch size, so
they differ by their training scans alone. Because an arm may win by regularisation rather than by what its volumes
say about the class, every synthetic set runs a second time with its labels shuffled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import binary_cross_entropy_with_logits

from ..data.transforms import flip_and_shift
from ..metrics import Interval, bootstrap_weights

MINIMUM_SIDE = 8  # voxels that the classifier needs along each axis


class Arm(NamedTuple):
    """What a classifier is trained on: real scans or not, which generator's volumes, and whether those keep labels."""

    real: bool
    synthetic: str | None = None  # "before" or "after" RL
    shuffled: bool = False


ARMS: Mapping[str, Arm] = {
    "real only": Arm(True),
    "real + before RL": Arm(True, "before"),
    "real + after RL": Arm(True, "after"),
    "real + before RL, labels shuffled": Arm(True, "before", shuffled=True),
    "real + after RL, labels shuffled": Arm(True, "after", shuffled=True),
    "before RL only": Arm(False, "before"),
    "after RL only": Arm(False, "after"),
}

CONTRASTS: Mapping[str, Mapping[str, int]] = {
    "before - real": {"real + before RL": 1, "real only": -1},
    "after - real": {"real + after RL": 1, "real only": -1},
    "after - before": {"real + after RL": 1, "real + before RL": -1},
    "before - before shuffled": {"real + before RL": 1, "real + before RL, labels shuffled": -1},
    "after - after shuffled": {"real + after RL": 1, "real + after RL, labels shuffled": -1},
    "after - before, beyond shuffled": {
        "real + after RL": 1,
        "real + after RL, labels shuffled": -1,
        "real + before RL": -1,
        "real + before RL, labels shuffled": 1,
    },
    "synthetic only: after - before": {"after RL only": 1, "before RL only": -1},
}
"""Differences that are reported: the figures of the arms, added up with these signs."""

FIGURES = ("log-loss", "AUC", "balanced accuracy", "F1")
"""Of log-loss less is better, of the others more."""


@dataclass(frozen=True)
class ClassifierSettings:
    """The classifier's training, the same for every arm."""

    steps: int = field(default=100, metadata={"help": "Optimizer steps of a classifier."})
    batch_size: int = field(
        default=16, metadata={"help": "Scans per step, a multiple of 4: half of each class, half real in mixed arms."}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of AdamW, cosine decay."})
    weight_decay: float = field(default=1e-2, metadata={"help": "Weight decay of AdamW."})
    downsample: int = field(
        default=2, metadata={"help": "Volumes are averaged over cubes of this many voxels a side before anything else."}
    )
    max_shift: int = field(
        default=1, metadata={"help": "Largest shift per axis in augmentation, in voxels after downsampling."}
    )

    def __post_init__(self) -> None:
        if self.batch_size < 4 or self.batch_size % 4:
            raise ValueError(f"batch_size must be a positive multiple of 4, got {self.batch_size}.")
        for name in ("steps", "downsample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def prepare(volumes: Tensor, settings: ClassifierSettings) -> Tensor:
    """Volumes (N, C, X, Y, Z), real and generated alike, to the classifier's size.

    Raises:
        ValueError: if less than 8 voxels a side are left.
    """
    small = F.avg_pool3d(volumes.float(), settings.downsample) if settings.downsample > 1 else volumes.float()
    if min(small.shape[2:]) < MINIMUM_SIDE:
        raise ValueError(
            f"The classifier needs {MINIMUM_SIDE} voxels a side; {tuple(volumes.shape[2:])} downsampled by "
            f"{settings.downsample} leaves {tuple(small.shape[2:])}."
        )
    return small


def draw_real(labels: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Which real scans a seed gets: `per_class` of each of the classes 0 and 1; those of 5 are among those of 10.

    Raises:
        ValueError: if a class has too few.
    """
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in (0, 1):
        rows = [row for row, own in enumerate(labels) if own == label]
        if len(rows) < per_class:
            raise ValueError(f"{per_class} real scans of class {label} were asked for, there are {len(rows)}.")
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen += [rows[i] for i in order[:per_class]]
    return chosen


def shuffle_labels(labels: Tensor, seed: int) -> Tensor:
    """The same labels (N,) in another order: as many of each class, none knows its volume."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def build_classifier(channels: int) -> DenseNet:
    """DenseNet (Huang et al. 2017, arXiv 1608.06993) with GroupNorm: (B, channels, X, Y, Z) -> logit of class 1 (B, 1).

    GroupNorm, because batches of 16 from a handful of scans make poor batch statistics, and mixed ones the more so.
    """
    return DenseNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=1,
        init_features=16,
        growth_rate=8,
        block_config=(3, 3),
        bn_size=2,
        norm=("group", {"num_groups": 4}),
    )


def train_classifier(
    sources: Sequence[tuple[Tensor, Tensor]], settings: ClassifierSettings, seed: int, device: str = "cpu"
) -> nn.Module:
    """A classifier trained for a fixed number of steps, in evaluation mode.

    Every batch holds as many scans of each source and of each class; scans are flipped left-right and shifted at
    random. On a CPU a seed and a number of threads give the same classifier every time.

    Args:
        sources: real scans, generated ones, or both: prepared volumes (N, C, X, Y, Z) and labels 0 or 1 (N,).
        settings: of the training.
        seed: of the initial weights and of what is drawn.
        device: where it is trained.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_classifier(sources[0][0].shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generators = [torch.Generator().manual_seed(seed + 1000 * i) for i in range(len(sources))]
    share = settings.batch_size // (2 * len(sources))
    rows_of = [[(labels == label).nonzero().flatten() for label in (0, 1)] for _, labels in sources]
    targets = torch.tensor([0.0, 1.0]).repeat_interleave(share).repeat(len(sources)).to(device)
    for _ in range(settings.steps):
        batch = []
        for (volumes, _), classes, generator in zip(sources, rows_of, generators, strict=True):
            for rows in classes:
                drawn = rows[torch.randint(len(rows), (share,), generator=generator)]
                batch += [flip_and_shift(volume, generator, settings.max_shift) for volume in volumes[drawn]]
        loss = binary_cross_entropy_with_logits(network(torch.stack(batch).to(device)).flatten(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def run_arm(
    arm: Arm,
    real: tuple[Tensor, Tensor],
    synthetic: Mapping[str, tuple[Tensor, Tensor]],
    unseen: Tensor,
    real_per_class: int,
    settings: ClassifierSettings,
    seed: int,
    device: str = "cpu",
) -> list[float]:
    """Train a classifier of one arm; logits of class 1 of the unseen scans.

    Args:
        arm: what it is trained on.
        real: all real training scans (N, C, X, Y, Z) and their labels (N,), prepared.
        synthetic: the same of each generator, "before" and "after".
        unseen: prepared scans (M, C, X, Y, Z) to judge by.
        real_per_class: real scans of each class; which ones depends on the seed alone.
        settings: of the training.
        seed: of everything drawn.
        device: where it is trained.
    """
    sources = []
    if arm.real:
        rows = draw_real(real[1].tolist(), real_per_class, seed)
        sources.append((real[0][rows], real[1][rows]))
    if arm.synthetic is not None:
        volumes, labels = synthetic[arm.synthetic]
        sources.append((volumes, shuffle_labels(labels, seed) if arm.shuffled else labels))
    with torch.enable_grad():
        network = train_classifier(sources, settings, seed, device)
    return torch.cat([network(chunk.to(device)).flatten().cpu() for chunk in unseen.split(8)]).tolist()


# -------------------------------------------------------------------------------------------- figures and intervals


def classification_figures(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Log-loss (nats), AUC, balanced accuracy and F1 of class 1 at probability 0.5, with weighted subjects.

    Args:
        logits: of class 1, (S, N): S classifiers, N subjects.
        labels: 0 or 1, (N,), both present.
        weights: how often each subject counts, (B, N), each class with a positive sum; None is once each (B = 1).

    Returns:
        name -> (B, S)
    """
    logits, labels = logits.double(), labels.bool()
    weights = torch.ones(1, len(labels)) if weights is None else weights
    weights = weights.double()
    positive, negative = weights[:, labels], weights[:, ~labels]  # (B, P), (B, Q)
    counts = positive.sum(1, keepdim=True), negative.sum(1, keepdim=True)
    if labels.all() or not labels.any() or (torch.cat(counts) <= 0).any():
        raise ValueError(f"Both classes must be among the subjects, got labels {labels.int().tolist()}.")
    losses = F.softplus(torch.where(labels, -logits, logits))  # -log of the probability of the true class
    difference = logits[:, labels, None] - logits[:, None, ~labels]  # (S, P, Q)
    won = (difference > 0).double() + 0.5 * (difference == 0).double()
    said = (logits > 0).double()
    hits, false_alarms = positive @ said[:, labels].T, negative @ said[:, ~labels].T  # (B, S)
    sensitivity, specificity = hits / counts[0], 1 - false_alarms / counts[1]
    return {
        "log-loss": weights @ losses.T / weights.sum(1, keepdim=True),
        "AUC": torch.einsum("bp,spq,bq->bs", positive, won, negative) / (counts[0] * counts[1]),
        "balanced accuracy": (sensitivity + specificity) / 2,
        "F1": 2 * hits / (counts[0] + hits + false_alarms),
    }


def estimates(
    logits: Mapping[str, Tensor], labels: Tensor, subjects: Sequence[str], repeats: int = 2000, seed: int = 0
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Figures of every arm and of every contrast whose arms are there, with intervals.

    The bootstrap draws subjects (within their class) *and* seeds, crossed (Owen 2007, "The pigeonhole bootstrap",
    Ann. Appl. Stat. 1(2)): an interval over seeds alone would speak of these few subjects only. Every arm sees the
    same draws, so that differences are paired.

    Args:
        logits: arm -> (S, N), the same S seeds and N scans in every arm.
        labels: (N,)
        subjects: whose scan each is.
        repeats: draws.
        seed: of the draws.

    Returns:
        arm -> figure -> interval, and contrast -> figure -> interval. A figure is the mean over seeds.

    Raises:
        ValueError: arms of other shapes.
    """
    shapes = {tuple(own.shape) for own in logits.values()}
    if len(shapes) != 1 or next(iter(shapes))[1] != len(labels):
        raise ValueError(f"Every arm needs logits (seeds, {len(labels)}), got {sorted(shapes)}.")
    count = next(iter(shapes))[0]
    of_subjects = torch.from_numpy(bootstrap_weights(subjects, labels.tolist(), repeats, seed))  # (1 + R, N)
    seed_names = [f"seed {s}" for s in range(count)]
    of_seeds = torch.from_numpy(bootstrap_weights(seed_names, [0] * count, repeats, seed)) / count  # (1 + R, S)
    draws = {
        arm: {
            name: (value * of_seeds).sum(1) for name, value in classification_figures(own, labels, of_subjects).items()
        }
        for arm, own in logits.items()
    }

    def combine(signs: Mapping[str, int], name: str) -> Interval:
        value, *resamples = torch.stack([sign * draws[arm][name] for arm, sign in signs.items()]).sum(0).tolist()
        low, high = np.percentile(resamples, [2.5, 97.5])  # not moved to the figure: the figures have bounds
        return Interval(value, float(low), float(high), float(np.std(resamples, ddof=1)))

    arms = {arm: {name: combine({arm: 1}, name) for name in FIGURES} for arm in logits}
    present = {name: signs for name, signs in CONTRASTS.items() if signs.keys() <= logits.keys()}
    return arms, {contrast: {name: combine(signs, name) for name in FIGURES} for contrast, signs in present.items()}
