"""Draw the split by subject once, for all stages.

python examples/make_split.py --data_dir DATA --split_file split.json --test 16 8 16 --validation 4 4 4
"""

from collections import Counter
from dataclasses import dataclass, field

from diffusers_med3d.data import (
    DataArguments,
    check_columns,
    check_scans,
    classes_of,
    make_split,
    read_scans,
    save_split,
)
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line


@dataclass
class SplitArguments:
    """How many subjects of each class are set apart."""

    test: list[int] = field(metadata={"help": "Test subjects per class, in the order of class_names."})
    validation: list[int] = field(metadata={"help": "Validation subjects per class."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw."})


def main() -> None:
    """Read labels, draw, write."""
    args, data = ScriptParser(SplitArguments, DataArguments, description=__doc__).parse()
    with refused_in_one_line():
        data.say_defaults()
        if len(args.test) != max(len(data.class_names), 1):  # without classes all subjects are one group
            raise ValueError(f"--test needs one count for each of {data.class_names or ['all']}, got {args.test}.")
        rows = read_scans(data.data_dir)
        check_columns(rows, data.subject_column, data.label_column if data.class_names else None)
        subjects = [str(subject) for subject in rows[data.subject_column]]
        labels = classes_of(rows, data.label_column, data.class_names, data.class_edges)
        check_scans(rows, subjects, data.num_channels)
        classes = dict(zip(subjects, labels, strict=True))
        split = make_split(classes, args.test, args.validation, args.seed)
        save_split(split, data.split_file, data.settings_for_split())
    for part in ("train", "validation", "test"):
        counts = Counter(classes[subject] for subject in split[part])
        print(part, {(*data.class_names, "unlabelled")[label]: counts[label] for label in sorted(counts)})


if __name__ == "__main__":
    main()
