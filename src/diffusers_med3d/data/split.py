"""The split by subject: made once, written to a file, read by every stage."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_json
from ..utils.wording import few
from .settings import DataSettings

PARTS = ("train", "validation", "test")
SETTINGS = "settings"


def class_of_each(
    subjects: Sequence[str], labels: Sequence[int], num_classes: int
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The class of every subject, and the classes of those whose scans have several.

    Of several classes the commonest among a subject's labelled scans counts, the lowest of equally common ones.

    Args:
        subjects: of each scan.
        labels: class index of each scan.
        num_classes: labels from this number on are no class.
    """
    own = defaultdict(list)
    for subject, label in zip(subjects, labels, strict=True):
        own[subject].append(label)
    classes, several = {}, {}
    for subject, found in own.items():
        counts = Counter(sorted(label for label in found if label < num_classes) or found)
        classes[subject] = counts.most_common(1)[0][0]
        if len(counts) > 1:
            several[subject] = sorted(counts)
    return classes, several


def say_several_classes(several: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> list[str]:
    """One sentence that names the subjects whose scans have several classes (``class_of_each``), or none."""
    names = (*class_names, "no class")
    odd = [f"{subject} ({', '.join(names[label] for label in own)})" for subject, own in sorted(several.items())]
    said = "subject(s) have scans of several classes, of which the commonest counts in the split"
    return [f"{len(odd)} {said}: {few(odd)}."] if odd else []


def make_split(
    classes: Mapping[str, int],
    test: Sequence[int],
    validation: Sequence[int],
    seed: int = 0,
    people: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Draw a split stratified by class.

    Args:
        classes: class index of every subject; subjects whose index is ``len(test)`` (no label) all train.
        test, validation: subjects per class.
        seed: of the draw.
        people: subject -> person, where several subjects are one (``duplicates.people_of``): they are drawn together,
            count as one, and their class is that of the first of them.

    Returns:
        ``{"train", "validation", "test": sorted ids, "folds": {"a", "b": halves of train, stratified}}``.

    Raises:
        ValueError: more subjects asked for than there are; nobody left to validate or in a fold of the training
            subjects.
    """
    if len(test) != len(validation):
        raise ValueError(f"test and validation need one count per class, got {list(test)} and {list(validation)}.")
    of_person = defaultdict(list)
    for subject in sorted(classes):
        of_person[people[subject] if people else subject].append(subject)
    classes = {person: classes[own[0]] for person, own in of_person.items()}
    rng = random.Random(seed)
    split: dict[str, list[str]] = {part: [] for part in PARTS}
    folds: dict[str, list[str]] = {"a": [], "b": []}
    for index in range(len(test) + 1):
        subjects = sorted(subject for subject, label in classes.items() if label == index)
        rng.shuffle(subjects)
        n_test, n_validation = (test[index], validation[index]) if index < len(test) else (0, 0)
        if len(subjects) < n_test + n_validation:
            raise ValueError(f"class {index} has {len(subjects)} subjects, {n_test} + {n_validation} were asked for.")
        split["test"] += subjects[:n_test]
        split["validation"] += subjects[n_test : n_test + n_validation]
        rest = subjects[n_test + n_validation :]
        split["train"] += rest
        smaller, larger = sorted(folds, key=lambda name: len(folds[name]))  # an odd one out goes to the smaller fold
        folds[smaller] += rest[::2]
        folds[larger] += rest[1::2]
    empty = ["validation"] * (not split["validation"]) + [f"fold {name}" for name in folds if not folds[name]]
    if empty:
        counts = {part: len(split[part]) for part in PARTS} | {f"fold {name}": len(folds[name]) for name in folds}
        raise ValueError(
            f"no subject is left for {' and '.join(empty)} ({counts} of {len(classes)} subjects); every stage "
            "validates, and the rewards need two folds. Ask for fewer test subjects, or for some to validate."
        )

    def subjects_of(persons: list[str]) -> list[str]:
        return sorted(subject for person in persons for subject in of_person[person])

    return {part: subjects_of(split[part]) for part in PARTS} | {
        "folds": {name: subjects_of(fold) for name, fold in folds.items()}
    }


def save_split(split: Mapping, path: str | Path, settings: DataSettings | None = None) -> None:
    """Write a split, with the settings of its data set; refuses to overwrite one: every stage must use the same."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; a split is made once for all stages. Delete it only to start all over.")
    write_json(path, dict(split) | ({SETTINGS: settings.to_dict()} if settings else {}))


def read_split_settings(path: str | Path) -> DataSettings:
    """Settings that ``save_split`` wrote into a split; nothing is said by one without."""
    return _settings_in(read_json(path), path)


def _settings_in(split: dict[str, Any], path: str | Path) -> DataSettings:
    found = split.get(SETTINGS, {})
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {SETTINGS} must be a JSON object, got {found!r:.60}.")
    return DataSettings.from_dict(found, str(path))


def load_split(path: str | Path) -> dict:
    """Read a split, subjects as text, and check that no subject is in two parts or two folds.

    Raises:
        FileNotFoundError, ValueError: with what was found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no split file {path}; make one with examples/make_split.py.")
    split = read_json(path)
    split.pop(SETTINGS, None)
    if not isinstance(split.get("folds", {}), dict):
        raise ValueError(f"{path}: folds must be a JSON object, got {split['folds']!r:.60}.")
    missing = [part for part in (*PARTS, "folds") if part not in split]
    missing = missing or [f"folds/{fold}" for fold in "ab" if fold not in split["folds"]]
    if missing:
        raise ValueError(f"{path} has no {missing}; expected train, validation, test and folds.")
    for parts, names in ((split, PARTS), (split["folds"], "ab")):
        for name in names:
            if not isinstance(parts[name], list):
                raise ValueError(f"{path}: {name} must be a list of subjects, got {parts[name]!r:.60}.")
            parts[name] = [str(subject) for subject in parts[name]]
    groups = [set(split[part]) for part in PARTS]
    for i, first in enumerate(groups):
        for second in groups[i + 1 :]:
            if first & second:
                raise ValueError(f"{path}: subjects in two parts of the split: {sorted(first & second)}.")
    fold_a, fold_b = set(split["folds"]["a"]), set(split["folds"]["b"])
    if fold_a & fold_b or (fold_a | fold_b) != groups[0]:
        raise ValueError(f"{path}: folds a and b must part the training subjects without overlap.")
    return split
