"""Prepare a data set: from the folder as it was distributed to scans, metadata, settings, split and report.

    pip install -e ".[layouts]" -c constraints.txt
    python examples/prepare_dataset.py --layout oasis1 --input OASIS1 --output DATA
    python examples/prepare_dataset.py --layout brats2019 --input MICCAI_BraTS_2019_Data_Training --output DATA \\
        --modalities flair t1ce
    python examples/prepare_dataset.py --layout bids --input DS --output DATA --label_column diagnosis
    python examples/prepare_dataset.py --layout phantom --output DATA     # made-up brains, nothing is downloaded

Every later script reads OUTPUT: ``--data_dir DATA --split_file DATA/split.json``; shape, spacing and classes come from
``DATA/dataset.json``. A run that was interrupted goes on when it is started again. What could not be used, and why,
stands in ``report.html``; look at it first.

``--register group`` (needs ``diffusers-med3d[register]``) brings all scans into one pose and size: the training scans
are laid over each other and averaged, each is registered (affine) to the mean, and that again; all other scans are
registered to the last mean. ``--jittered_copies`` adds copies of every training scan that are turned, scaled, shifted
and warped a little. Every volume is interpolated once.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from diffusers_med3d.data.grid import MAX_VOXELS
from diffusers_med3d.data.layouts import LAYOUTS, Options
from diffusers_med3d.data.phantom import CLASS_NAMES, make_phantom
from diffusers_med3d.data.preparation import PROGRESS, Preparation, check_table, plan, prepare_dataset
from diffusers_med3d.data.settings import DATASET_FILE
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line


@dataclass
class PrepareArguments:
    """What is prepared and how."""

    output: str = field(metadata={"help": "Folder that the prepared data set is written to."})
    input: str | None = field(default=None, metadata={"help": "Folder of the data set as it was distributed."})
    layout: str = field(
        default="niftifolder",
        metadata={
            "help": "How the input is laid out. phantom makes up brains and needs no input.",
            "choices": [*LAYOUTS, "phantom"],
        },
    )
    modalities: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which images; several become the channels of one scan. bids: suffixes (T1w). brats2019: flair t1 "
            "t1ce t2 (t1). ixi: T1 T2 PD (T1). dicom: a text that the series description holds. niftifolder: names of "
            "the channels."
        },
    )
    metadata: str | None = field(
        default=None, metadata={"help": "Table with the labels, where the layout's own is elsewhere or missing."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column that the class is made from; brats2019, oasis1 and ixi have their own."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes in order; the values of the column if not given."}
    )
    class_edges: list[float] | None = field(
        default=None, metadata={"help": "For a column of numbers: where one class ends and the next begins."}
    )
    keep_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns that are kept beside age, sex and the label. All others reach no output."},
    )
    keep_unlabelled: bool = field(default=False, metadata={"help": "Keep scans without a label (they only train)."})
    renumber: bool = field(
        default=False,
        metadata={"help": "Call people sub-0001, sub-0002, ...; no list of which is which is kept. dicom: always."},
    )
    spacing: list[float] | None = field(
        default=None, metadata={"help": "Voxel size (X, Y, Z) in mm in training; chosen from the scans if not given."}
    )
    volume_shape: list[int] | None = field(
        default=None, metadata={"help": "Size (X, Y, Z) in voxels in training; chosen from the scans if not given."}
    )
    max_voxels: int = field(
        default=MAX_VOXELS, metadata={"help": "Most voxels of a grid that is chosen. More is finer and slower."}
    )
    split_file: str | None = field(
        default=None, metadata={"help": "A split by subject that is there already; it is copied to the output."}
    )
    test_share: float = field(
        default=0.2, metadata={"help": "Test subjects of every class, as a share of the smallest class."}
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Validation subjects of every class, as a share of the smallest class."}
    )
    allow_duplicates: bool = field(
        default=False,
        metadata={"help": "People who share a scan count as one in the split, where else they are refused."},
    )
    register: str = field(
        default="none",
        metadata={"help": "none; group: affine to the mean of the training scans; or a NIfTI file as template."},
    )
    rounds: int = field(default=3, metadata={"help": "How often the training scans are registered to their mean."})
    smoothing: float = field(
        default=0.7,
        metadata={
            "help": "Of registered scans: standard deviation in mm of a Gaussian before interpolation. 0.7 gives scans "
            "of 2 mm on a grid of 3 mm the sharpness and noise that training without registration gives them; 0.95 is "
            "without aliasing."
        },
    )
    jittered_copies: int = field(
        default=0, metadata={"help": "Copies of every training scan with small changes; needs --register."}
    )
    num_subjects: int = field(default=48, metadata={"help": "Brains of the phantom."})
    num_proc: int = field(default=os.cpu_count() or 1, metadata={"help": "Processes."})
    dry_run: bool = field(default=False, metadata={"help": "Say what would be prepared and write nothing."})
    seed: int = field(default=0, metadata={"help": "Of the split, the copies and the phantom."})


def preparation(args: PrepareArguments) -> Preparation:
    """The arguments as the package takes them.

    Raises:
        ValueError: arguments that do not go together.
    """
    if args.layout == "phantom":
        source, label = Path(args.output) / PROGRESS / "phantom", args.label_column or "class"
        modalities, keep = ("phantom-t1",), ("phantom",)
        args.class_names = args.class_names or list(CLASS_NAMES)
    else:
        if args.input is None:
            raise ValueError(f"--layout {args.layout} needs --input FOLDER.")
        source, label = Path(args.input), args.label_column
        modalities, keep = tuple(args.modalities or ()), tuple(args.keep_columns or ())
    if args.jittered_copies and args.register == "none":
        raise ValueError("--jittered_copies needs --register.")
    if args.register not in ("none", "group") and not Path(args.register).is_file():
        raise FileNotFoundError(f"--register must be none, group or a NIfTI file, got {args.register!r}.")
    metadata = Path(args.metadata) if args.metadata else None
    if metadata is not None and not metadata.is_file():
        raise FileNotFoundError(f"no such table: {metadata}")
    return Preparation(
        layout="niftifolder" if args.layout == "phantom" else args.layout,
        input=source,
        output=Path(args.output),
        options=Options(modalities, label, keep, args.keep_unlabelled, metadata),
        class_names=tuple(args.class_names or ()),
        class_edges=tuple(args.class_edges or ()),
        renumber=args.renumber,
        spacing=tuple(args.spacing) if args.spacing else None,
        volume_shape=tuple(args.volume_shape) if args.volume_shape else None,
        max_voxels=args.max_voxels,
        split_file=Path(args.split_file) if args.split_file else None,
        test_share=args.test_share,
        validation_share=args.validation_share,
        allow_duplicates=args.allow_duplicates,
        register=args.register,
        rounds=args.rounds,
        smoothing=args.smoothing,
        jittered_copies=args.jittered_copies,
        num_proc=args.num_proc,
        seed=args.seed,
    )


def say_plan(what: Preparation) -> None:
    """Print what would be prepared, then refuse what the table shows to be wrong."""
    found = plan(what)
    label = what.options.label_column or found.label_column
    people = {scan.participant_id for scan in found.scans}
    print(f"{len(found.scans)} scans of {len(people)} people, channels {', '.join(found.channel_names)}")
    if label:
        values = Counter(scan.columns.get(label) or "missing" for scan in found.scans)
        shown = ", ".join(f"{value}: {count}" for value, count in values.most_common(10))
        print(f"{label}: {shown}{', ...' if len(values) > 10 else ''}")
    for note in found.notes:
        print(note)
    print(f"{len(found.left_out)} left out")
    for reason, count in Counter(entry.reason for entry in found.left_out).most_common():
        print(f"  {count} x {reason}")
    check_table(what, found)


def main() -> None:
    """Find, read, check, split, write."""
    (args,) = ScriptParser(PrepareArguments, description=__doc__).parse()
    with refused_in_one_line():
        what = preparation(args)
        if args.layout == "phantom" and args.dry_run:
            print(f"would make {args.num_subjects} phantom brains")
            return
        if args.layout == "phantom" and not (what.output / DATASET_FILE).is_file():
            make_phantom(what.input, args.num_subjects, args.seed)
        if args.dry_run:
            say_plan(what)
            return
        settings, notes = prepare_dataset(what)
    print(f"volume shape {settings.volume_shape}, spacing {settings.spacing} mm, classes {settings.class_names}")
    print("\n".join(notes))
    print(f"report: {what.output / 'report.html'}")


if __name__ == "__main__":
    main()
