"""The sets of volumes of one evaluation: their checks, classes, weights and pairings."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..metrics.bootstrap import bootstrap_interval, bootstrap_weights, class_shares, weighted_mean, weighted_pair_mean
from .report import FLOOR, REFERENCE, Draws, Figure
from .volume_set import VolumeSet


def distinct(first: Sequence[str], second: Sequence[str]) -> NDArray[np.bool_]:
    """True (N, M) where two volumes are not of the same subject."""
    return np.array([[mine != other for other in second] for mine in first])


def check_scans(reference: VolumeSet, train: VolumeSet) -> None:
    """Refuse scans by which no samples can be judged; worth asking before hours of sampling.

    Raises:
        ValueError: subjects in both sets, shapes that differ, a class of the reference that nobody trained on, fewer
            than two reference or three training subjects.
    """
    for kind, one, least in (("reference", reference, 2), ("training", train, 3)):
        if len(set(one.subjects)) < least:
            raise ValueError(
                f"at least {least} {kind} subjects are needed, to compare one with others; got "
                f"{sorted(set(one.subjects))}."
            )
    both = sorted(set(reference.subjects) & set(train.subjects))
    if both:
        raise ValueError(
            f"{len(both)} reference subject(s) are among the training subjects, the first is {both[0]!r}; the "
            "reference must be scans that the models never saw."
        )
    if train.volumes.shape[1:] != reference.volumes.shape[1:]:
        raise ValueError(
            f"the training scans are {tuple(train.volumes.shape[1:])}, the reference "
            f"{tuple(reference.volumes.shape[1:])}; all must come through one loader."
        )
    missing = sorted(set(reference.labels) - set(train.labels))
    if missing:
        raise ValueError(f"there is no training scan of class {missing}, which the reference has.")


def check_mix(name: str, labels: Sequence[int], reference_labels: Sequence[int]) -> None:
    """Refuse samples of another class mix than the reference's (ValueError with both), a volume per class aside."""
    shares, mix = class_shares(reference_labels), class_shares(labels)
    missing = set(shares) - set(mix)
    if missing:
        raise ValueError(f"{name!r} has no volume of class {sorted(missing)}, which the reference has.")
    if set(mix) - set(shares) or any(abs(mix[c] - share) * len(labels) >= 1 for c, share in shares.items()):
        raise ValueError(
            f"{name!r} has the class mix { {c: round(v, 3) for c, v in mix.items()} }, the reference "
            f"{ {c: round(v, 3) for c, v in shares.items()} }; sample the reference's mix."
        )


class Sets:
    """The sets of one evaluation with their classes, weights and pairings."""

    def __init__(
        self, models: Mapping[str, VolumeSet], reference: VolumeSet, train: VolumeSet, num_resamples: int, seed: int
    ) -> None:
        self.models = list(models)
        self.all = {REFERENCE: reference, FLOOR: train, **models}
        self.notes: list[str] = []
        self._check(models, reference, train)
        self.notes += [note for name, one in models.items() if (note := one.note(name))]
        self.counts = {
            name: {
                "volumes": len(one),
                "subjects": len(set(one.subjects)),
                "classes": {str(c): one.labels.count(c) for c in sorted(set(one.labels))},
                **({"left_out": len(one.left_out)} if one.left_out else {}),
            }
            for name, one in self.all.items()
        }
        self.labels = {name: np.asarray(one.labels) for name, one in self.all.items()}
        few = [
            (name, label)
            for name, one in self.all.items()
            for label in set(reference.labels)
            if len({s for s, c in zip(one.subjects, one.labels, strict=True) if c == label}) < 2
        ]
        if few:
            self.notes.append(
                f"Classes were pooled: {few[0][0]!r} has fewer than two subjects of class {few[0][1]}, so averages "
                "over pairs within a class are impossible."
            )
            self.labels = {name: np.zeros_like(labels) for name, labels in self.labels.items()}
        if few:
            wanted, found = class_shares(reference.labels), class_shares(train.labels)
            balance = np.array([wanted.get(c, 0.0) / found[c] for c in train.labels])
            self.labels[FLOOR][balance == 0] = -1  # a class that the reference lacks
        self.shares = class_shares(self.labels[REFERENCE])
        self.weights = {
            name: bootstrap_weights(one.subjects, self.labels[name], num_resamples, seed)
            for name, one in self.all.items()
        }
        self.floor_resamples = self.weights[FLOOR]  # for what `floor_rows` draws, which has the reference's mix
        if few:
            self.weights[FLOOR] = self.floor_resamples * balance
        # made from the reference scans themselves, as round-trips are: no independent set
        self.derived = {name for name, one in models.items() if set(one.subjects) & set(reference.subjects)}
        self.rng = np.random.default_rng([seed, 1])
        self.num_resamples = num_resamples
        # Volumes per class that every model and the training scans have. Training scans are drawn by their own classes,
        # also where classes are pooled.
        self.floor_labels = np.asarray(train.labels)
        sized = [self.labels[name] for name in self.models if name not in self.derived]
        if few:
            most = min(len(train) * found[c] / share for c, share in wanted.items())
            count = min([int(most), *map(len, sized)])
            self.floor_counts = {c: round(count * share) for c, share in wanted.items()}
            self.matched_counts = {0: sum(self.floor_counts.values())}
        else:
            sized.append(self.floor_labels)
            self.matched_counts = {c: min(int((labels == c).sum()) for labels in sized) for c in self.shares}
            self.floor_counts = self.matched_counts

    def _check(self, models: Mapping[str, VolumeSet], reference: VolumeSet, train: VolumeSet) -> None:
        if not models or {REFERENCE, FLOOR} & set(models):
            raise ValueError(f"Expected models by names other than 'reference' and 'floor', got {list(models)}.")
        check_scans(reference, train)
        for name, one in models.items():
            if one.volumes.shape[1:] != reference.volumes.shape[1:]:
                raise ValueError(
                    f"{name!r} has volumes {tuple(one.volumes.shape[1:])}, the reference "
                    f"{tuple(reference.volumes.shape[1:])}; all must come through one loader."
                )
            if len(set(one.subjects)) < 2:
                raise ValueError(f"{name!r} has one volume; averages over pairs need at least two.")
            check_mix(name, [*one.labels, *(lost.label for lost in one.left_out)], reference.labels)
            gone = sorted(set(reference.labels) - set(one.labels))
            if gone:
                raise ValueError(f"no volume of class {gone} is left: {one.note(name)}")

    def matched_rows(self, name: str) -> NDArray[np.int64]:
        """The first volumes of each class of a model, as many as every model and the training scans have."""
        rows = [np.flatnonzero(self.labels[name] == c)[:count] for c, count in self.matched_counts.items()]
        return np.sort(np.concatenate(rows))

    def floor_rows(self) -> NDArray[np.int64]:
        """A draw of as many training scans of each class, without replacement."""
        labels = self.floor_labels
        rows = [
            self.rng.choice(np.flatnonzero(labels == c), count, replace=False) for c, count in self.floor_counts.items()
        ]
        return np.sort(np.concatenate(rows))

    def floor_weights(self) -> NDArray[np.float64]:
        """(R, T): on average as many training scans of each class as matched; subjects are drawn, with replacement."""
        subjects = np.asarray(self.all[FLOOR].subjects)
        weights = np.zeros((self.num_resamples, len(subjects)))
        for c, count in self.floor_counts.items():
            members = np.flatnonzero(self.floor_labels == c)
            own = list(dict.fromkeys(subjects[members]))
            scans = len(members) / len(own)  # of a subject
            draws = max(1, round(count / scans))
            counts = self.rng.multinomial(draws, [1 / len(own)] * len(own), self.num_resamples)
            drawn = dict(zip(own, counts.T, strict=True))
            chosen = np.stack([drawn[subject] for subject in subjects[members]], axis=1)
            weights[:, members] = chosen * (count / (draws * scans))
        return weights

    def floor_mean(self, values: NDArray) -> NDArray[np.float64]:
        """Mean of one value per training scan, NaN where `floor_rows` never drew it, under all weights: (1 + R,)."""
        drawn = [c for c in self.all[REFERENCE].labels if self.floor_counts[c]]
        return weighted_mean(values, self.floor_resamples, self.floor_labels, class_shares(drawn))

    def mean(self, name: str, values: Tensor | NDArray, rows: NDArray | None = None) -> NDArray[np.float64]:
        """Class-weighted mean of one value per volume (or per row in `rows`) under all weights: (1 + R,)."""
        rows = np.arange(len(self.all[name])) if rows is None else rows
        return weighted_mean(
            np.asarray(values, dtype=np.float64), self.weights[name][:, rows], self.labels[name][rows], self.shares
        )

    def pair_mean(self, a: str, b: str, pairs: NDArray) -> NDArray[np.float64]:
        """Class-weighted mean over pairs of different subjects: (1 + R,)."""
        return weighted_pair_mean(
            pairs, distinct(self.all[a].subjects, self.all[b].subjects),
            self.weights[a], self.labels[a], self.weights[b], self.labels[b], self.shares,
        )  # fmt: skip

    def figure(self, name: str, aim: str, baseline: str, draws: Draws, extractor: str = "") -> Figure:
        first = self.models[0]
        return Figure(
            name=name,
            extractor=extractor,
            aim=aim,
            baseline=baseline,
            sets={one: bootstrap_interval(values) for one, values in draws.items()},
            excess={
                one: bootstrap_interval(draws[one] - draws[baseline])
                for one in self.models
                if one in draws and baseline in draws
            },
            differences={
                f"{one} - {first}": bootstrap_interval(draws[one] - draws[first])
                for one in self.models[1:]
                if one in draws and first in draws
            },
            draws=draws,
        )
