"""Draw the split by subject once, for all stages.

python examples/make_split.py --data_dir DATA --split_file split.json --test 16 8 16 --validation 4 4 4

All scans are read and compared: the same scan under the names of two subjects is refused, whatever was done to it.
"""

import os
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
from diffusers_med3d.data.duplicates import find_duplicates, people_of, print_of_entry
from diffusers_med3d.data.grid import odd_spacings
from diffusers_med3d.data.nifti import scan_name
from diffusers_med3d.data.split import class_of_each, say_several_classes
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.parallel import parallel


@dataclass
class SplitArguments:
    """How many subjects of each class are set apart."""

    test: list[int] = field(metadata={"help": "Test subjects per class, in the order of class_names."})
    validation: list[int] = field(metadata={"help": "Validation subjects per class."})
    seed: int = field(default=0, metadata={"help": "Seed of the draw."})
    allow_duplicates: bool = field(
        default=False, metadata={"help": "Subjects who share a scan count as one person, where else they are refused."}
    )
    num_proc: int = field(default=os.cpu_count() or 1, metadata={"help": "Processes that read the scans."})


def main() -> None:
    """Read labels and scans, draw, write."""
    args, data = ScriptParser(SplitArguments, DataArguments, description=__doc__).parse()
    with refused_in_one_line():
        data.say_defaults()
        num_classes = max(len(data.class_names), 1)  # without classes all subjects are one group
        if len(args.test) != num_classes:
            raise ValueError(f"--test needs one count for each of {data.class_names or ['all']}, got {args.test}.")
        rows = read_scans(data.data_dir)
        check_columns(rows, data.subject_column, data.label_column if data.class_names else None)
        subjects = [str(subject) for subject in rows[data.subject_column]]
        labels = classes_of(rows, data.label_column, data.class_names, data.class_edges)
        num_channels, spacings = check_scans(rows, subjects, data.num_channels)
        jobs = [(entry, subject, num_channels) for entry, subject in zip(rows["nifti"], subjects, strict=True)]
        num_proc = min(args.num_proc, 1 + len(jobs) // 16)  # a process takes seconds to start
        prints = list(parallel(print_of_entry, jobs, num_proc, "fingerprints of scans"))
        files = [scan_name(entry, subject) for entry, subject, _ in jobs]
        people = people_of(subjects, files, find_duplicates(prints), args.allow_duplicates)
        persons, several = class_of_each([people[subject] for subject in subjects], labels, num_classes)
        classes = {subject: persons[person] for subject, person in people.items()}
        split = make_split(classes, args.test, args.validation, args.seed, people)
        save_split(split, data.split_file, data.settings_for_split())
    for note in (*say_several_classes(several, data.class_names), odd_spacings(files, spacings)):
        if note:
            print(note)
    for part in ("train", "validation", "test"):
        counts = Counter(classes[subject] for subject in split[part])
        print(part, {(*data.class_names, "unlabelled")[label]: counts[label] for label in sorted(counts)})


if __name__ == "__main__":
    main()
