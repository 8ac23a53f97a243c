"""From a folder as it was distributed to a data set for every stage: scans, metadata, settings, split, report."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.files import write_json
from ..utils.hashing import json_hash
from ..utils.parallel import parallel
from ..utils.wording import few
from .duplicates import find_duplicates, people_of
from .grid import MAX_VOXELS, choose_grid, odd_sizes, odd_spacings
from .labels import class_of, is_missing, number_of
from .layouts import Found, LeftOut, Options, Scan, find_scans
from .report import MONTAGE, Section, montage, write_report
from .settings import DATASET_FILE, INTENSITY, DataSettings, write_settings
from .split import PARTS, class_of_each, load_split, make_split, save_split, say_several_classes
from .writing import people_and_names, write_metadata, write_scan

PROGRESS = ".progress"
MOST_CLASSES = 10
OLDEST = 120  # years
IN_MONTAGE = 12


@dataclass(frozen=True)
class Preparation:
    """What is prepared and how; see the fields of the same names in ``examples/prepare_dataset.py``."""

    layout: str
    input: Path
    output: Path
    options: Options = field(default_factory=Options)
    class_names: tuple[str, ...] = ()
    class_edges: tuple[float, ...] = ()
    renumber: bool = False
    spacing: tuple[float, ...] | None = None
    volume_shape: tuple[int, ...] | None = None
    max_voxels: int = MAX_VOXELS
    split_file: Path | None = None
    test_share: float = 0.2
    validation_share: float = 0.1
    allow_duplicates: bool = False
    register: str = "none"
    rounds: int = 3
    smoothing: float = 0.7
    jittered_copies: int = 0
    num_proc: int = 1
    seed: int = 0


@dataclass
class Entry:
    """A scan that was written: who, where, what."""

    person: str
    file: str
    scan: Scan
    record: dict[str, Any]
    label: int = 0


def plan(what: Preparation) -> Found:
    """The scans that would be prepared.

    Raises:
        FileNotFoundError: no scan at all, with the reasons against those there are.
    """
    found = find_scans(what.layout, what.input, what.options)
    if not found.scans:
        reasons = Counter(entry.reason for entry in found.left_out).most_common(3)
        why = "; ".join([*(f"{count} x {reason}" for reason, count in reasons), *found.notes])
        why = why or "no file of that layout"
        raise FileNotFoundError(f"no scan to prepare of layout {what.layout} in {what.input}: {why}.")
    return found


def check_table(what: Preparation, found: Found) -> None:
    """Refuse what the table alone shows to be wrong, before any scan is read.

    Raises:
        ValueError: labels that make no classes, with file and row, or too few people for a split.
    """
    column, names, edges = _classes_of_set(what, found, found.scans)
    labels = [_class_of_scan(what, scan, column, names, edges) for scan in found.scans]
    people, _ = people_and_names(found.scans, _is_renumbered(what))
    classes, _ = class_of_each(people, labels, max(1, len(names)))
    with _left_out_named(found.left_out, len(found.scans) + len(found.left_out)):
        _split(what, classes, {name: name for name in people}, names)


def prepare_dataset(what: Preparation) -> tuple[DataSettings, list[str]]:
    """Prepare a data set; one that was interrupted goes on. Returned are its settings and what its user should know.

    The output is a niftifolder (``images/``, ``metadata.csv``) with ``dataset.json``, ``split.json``, ``report.md``,
    ``report.html`` and ``montage.png``. A scan that cannot be used is named in the report and left out.

    Raises:
        FileExistsError: the output holds a finished data set.
        ValueError: nothing is left to prepare, an input that changed since the run was interrupted, the same scan under
            two people's names, labels that make no classes, too few people for a split, or a grid that is too small.
    """
    output = what.output
    if (output / DATASET_FILE).is_file():
        raise FileExistsError(f"{output} holds a prepared data set already; delete it to make it again.")
    if output.resolve() == what.input.resolve():
        raise ValueError(f"input and output are the same folder, {output}.")
    found = plan(what)
    check_table(what, found)
    written, damaged = _convert(what, found)
    left_out = [*damaged, *found.left_out]
    with _left_out_named(left_out, len(written) + len(left_out), what):
        doubles, people = _duplicates(what, written)
        settings = _settings(what, found, written)
        column, class_names, edges = settings.label_column, settings.class_names or [], settings.class_edges or []
        for entry in written:
            entry.label = _class_of_scan(what, entry.scan, column, class_names, edges)
        persons, labels = [people[entry.person] for entry in written], [entry.label for entry in written]
        classes, several = class_of_each(persons, labels, max(1, len(class_names)))
        split, unsplit = _split(what, classes, people, class_names)
        boxes, sides = ([entry.record[name] for entry in written] for name in ("foreground", "spacing"))
        shape, spacing, sentence = choose_grid(
            boxes, sides, what.spacing, what.volume_shape, what.max_voxels, what.register != "none"
        )
    notes = [*found.notes, *say_several_classes(several, class_names)]
    if unsplit:
        notes.append(f"{len(unsplit)} people are in no part of the split and are not used: {few(unsplit)}.")
    notes.append(sentence)
    names = [Path(entry.file).name for entry in written]
    for odd in filter(None, (odd_spacings(names, sides), odd_sizes(names, boxes))):
        notes.append(f"Warning: {odd} They are kept; remove them or mend their headers if the size is wrong.")
    settings.volume_shape, settings.spacing = shape, spacing
    coarser = np.array(spacing) > 1.25 * np.median(sides, axis=0)
    settings.antialias = bool(what.register == "none" and coarser.any())
    rows = _rows(what, written, split, shape, spacing)
    write_metadata(rows, output / "metadata.csv")
    if not (output / "split.json").is_file():
        save_split(split, output / "split.json", settings)
    _picture(written, rows, settings, output)
    sections = _sections(what, written, split, settings, doubles, left_out, notes)
    write_report(output, f"Data set from {what.layout}", sections)
    write_settings(settings, output)
    shutil.rmtree(output / PROGRESS)
    return settings, notes


@contextmanager
def _left_out_named(left_out: Sequence[LeftOut], total: int, what: Preparation | None = None) -> Iterator[None]:
    """Inside, a refusal ends with what was left out; with ``what``, a report with all of it is written as well."""
    try:
        yield
    except ValueError as error:
        if not left_out:
            raise
        listed = ""
        if what is not None:
            refused = "The data set was refused after its scans were read; the script's message says why."
            # The message itself stays out of the report, since it may name folders of this machine
            write_report(what.output, f"Refused: data set from {what.layout}", [_left_out_section(left_out, [refused])])
            listed = f" All of them: {what.output / 'report.html'}"
        reasons = [f"{entry.path} ({entry.reason.rstrip('.')})" for entry in left_out]
        raise ValueError(
            f"{error} {len(left_out)} of {total} files were left out: {few(reasons, 3, '; ')}.{listed}"
        ) from error


def _is_renumbered(what: Preparation) -> bool:
    return what.renumber or what.layout == "dicom"


def _convert(what: Preparation, found: Found) -> tuple[list[Entry], list[LeftOut]]:
    """Write every scan that is not written yet; the unusable ones with their reasons."""
    progress = what.output / PROGRESS
    folder = progress if what.register != "none" else what.output
    people, names = people_and_names(found.scans, _is_renumbered(what))
    files = [
        [path.as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for scan in found.scans for path in scan.files
    ]
    fingerprint = json_hash([files, names, what.register != "none"])
    marker = progress / "plan.json"
    if marker.is_file() and json.loads(marker.read_text()) != fingerprint:
        raise ValueError(f"the input or the options changed since {what.output} was begun; delete it to begin anew.")
    write_json(marker, fingerprint)
    jobs = [
        (scan, folder / name, progress / f"{Path(name).name}.json")
        for scan, name in zip(found.scans, names, strict=True)
    ]
    waiting = [job for job in jobs if not job[2].is_file()]
    for _ in parallel(_convert_one, waiting, what.num_proc, "reading and writing scans"):
        pass
    written, damaged = [], []
    for person, name, (scan, _, record_path) in zip(people, names, jobs, strict=True):
        record = json.loads(record_path.read_text())
        if "reason" in record:
            damaged.append(LeftOut(_public_name(scan, name, what.input), record["reason"]))
        else:
            written.append(Entry(person, name, scan, record))
    if not written:
        raise ValueError(f"none of {len(jobs)} scans can be used; the first: {damaged[0].path}: {damaged[0].reason}.")
    channels = Counter(entry.record["channels"] for entry in written)
    usual = channels.most_common(1)[0][0]
    odd = [entry for entry in written if entry.record["channels"] != usual]
    for entry in odd:
        reason = f"{entry.record['channels']} channel(s), the others have {usual}"
        damaged.append(LeftOut(_public_name(entry.scan, entry.file, what.input), reason))
        (folder / entry.file).unlink(missing_ok=True)
    return [entry for entry in written if entry.record["channels"] == usual], damaged


def _convert_one(job: tuple[Scan, Path, Path]) -> None:
    scan, path, record_path = job
    write_json(record_path, write_scan(scan, path, record_path.with_suffix(".npy")))


def _public_name(scan: Scan, name: str, folder: Path) -> str:
    if scan.kind == "dicom":
        return Path(name).name.removesuffix(".nii.gz")
    return scan.files[0].relative_to(folder).as_posix()


def _duplicates(what: Preparation, written: list[Entry]) -> tuple[list[list[str]], dict[str, str]]:
    """Pairs of scans that are the same (rows of the report), and the one name of people who share a scan."""
    progress = what.output / PROGRESS
    prints = [np.load(progress / f"{Path(entry.file).name}.npy") for entry in written]
    pairs = find_duplicates(prints)
    names = [Path(entry.file).name for entry in written]
    inputs = [_public_name(entry.scan, entry.file, what.input) for entry in written]
    people = people_of([entry.person for entry in written], inputs, pairs, what.allow_duplicates)
    return [[names[pair.first], names[pair.second], f"{pair.score:.3f}"] for pair in pairs], people


def _settings(what: Preparation, found: Found, written: list[Entry]) -> DataSettings:
    label, names, edges = _classes_of_set(what, found, [entry.scan for entry in written])
    channels = list(found.channel_names)
    count = written[0].record["channels"]
    if len(channels) != count:
        channels = [f"{channels[0]}_{i}" for i in range(count)]
    return DataSettings(
        orientation="RAS",
        intensity=INTENSITY,
        registration=None if what.register == "none" else _frame(what.register),
        channel_names=channels,
        subject_column="participant_id",
        label_column=label,
        class_names=names,
        class_edges=edges,
    )


def _frame(register: str) -> str:
    return "group" if register == "group" else Path(register).name


def _classes_of_set(
    what: Preparation, found: Found, scans: Sequence[Scan]
) -> tuple[str | None, list[str], list[float]]:
    """Label column, names of the classes and edges between them; without labels None and two empty lists."""
    column = what.options.label_column or found.label_column
    names, edges = what.class_names or found.class_names, what.class_edges or found.class_edges
    if column is None:
        if what.class_names:
            raise ValueError("--class_names needs --label_column.")
        return None, [], []
    if what.class_names and not what.class_edges:
        edges = ()
    return column, list(names or _classes(what, scans, column)), list(edges)


def _class_of_scan(
    what: Preparation, scan: Scan, column: str | None, names: Sequence[str], edges: Sequence[float]
) -> int:
    """Class index of a scan's label by `class_of`, 0 without labels.

    Raises:
        ValueError: a label that cannot be read, or an age that no person has, with file and row.
    """
    if column is None:
        return 0
    value = scan.columns.get(column, "")
    try:
        label = class_of(value, names, edges)
        is_age = column.lower() == "age" and edges and not is_missing(value)
        if is_age and not 0 <= number_of(value) <= OLDEST:
            raise ValueError(
                f"{value!r} is nobody's age in years, 0 to {OLDEST}; a column of months or days must have another name."
            )
    except ValueError as error:
        raise ValueError(f"{_where(what, scan)}, column {column!r}: {error}") from error
    return label


def _where(what: Preparation, scan: Scan) -> str:
    """Where a scan's label stands, for a message: its row, where the layout knows it, and its file."""
    name = _public_name(scan, scan.participant_id, what.input)
    return f"{scan.row} ({name})" if scan.row else name


def _classes(what: Preparation, scans: Sequence[Scan], column: str) -> tuple[str, ...]:
    """Names of the classes in a column of few different values.

    Raises:
        ValueError: a column of many values, with what it holds.
    """
    values = [scan.columns.get(column, "") for scan in scans]
    distinct = sorted({value for value in values if not is_missing(value)})
    if not distinct:
        raise ValueError(f"no scan has a value in the column {column!r}.")
    if len(distinct) <= MOST_CLASSES:
        return tuple(distinct)
    numbers, refusals = [], {}
    for value in distinct:
        try:
            numbers.append(number_of(value))
        except ValueError as error:
            refusals[value] = error
    if len(refusals) > len(numbers):
        raise ValueError(
            f"the column {column!r} has {len(distinct)} different values such as {distinct[0]!r}; say which are "
            "classes with --class_names."
        )
    if refusals:
        first = next(scan for scan, value in zip(scans, values, strict=True) if value in refusals)
        raise ValueError(f"{_where(what, first)}, column {column!r}: {refusals[first.columns[column]]}")
    raise ValueError(
        f"the column {column!r} holds numbers from {min(numbers):g} to {max(numbers):g}; say --class_names and "
        "--class_edges, such as: --class_names young old --class_edges 50."
    )


def _split(
    what: Preparation, classes: dict[str, int], people: dict[str, str], class_names: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The split that is there, or one with as many people of every class in test, and in validation.

    Also returned are the people who are in no part of a split that was given.
    """
    made = what.output / "split.json"
    given = what.split_file or (made if made.is_file() else None)
    if given is not None:
        known = load_split(given)
        part_of = {name: part for part in PARTS for name in known[part]}
        absent = sorted(set(part_of) - set(people))
        if absent:
            raise ValueError(f"{len(absent)} people of the split have no scan, the first is {absent[0]!r}.")
        first: dict[str, str] = {}
        for name in sorted(part_of):
            other = first.setdefault(people[name], name)
            if part_of[other] != part_of[name]:
                raise ValueError(
                    f"{other} ({part_of[other]}) and {name} ({part_of[name]}) of {given} have the same scan, but are "
                    "in two parts of the split."
                )
        return {name: known[name] for name in (*PARTS, "folds")}, sorted(set(people) - set(part_of))
    counts = Counter(classes.values())
    labelled = range(max(1, len(class_names)))  # who has no label only trains
    smallest, which = min(((counts[label], label) for label in labelled if counts[label]), default=(0, 0))
    test, validation = (max(1, round(share * smallest)) for share in (what.test_share, what.validation_share))
    if smallest < test + validation + 2:
        raise ValueError(
            f"{smallest} people in the smallest class{f' ({class_names[which]})' if class_names else ''}; at least "
            f"{test + validation + 2} are needed for a test set, a validation set and two folds of training people."
        )
    number = [counts[label] > 0 for label in labelled]
    of_all = {name: classes[person] for name, person in people.items()}
    drawn = make_split(of_all, [test * n for n in number], [validation * n for n in number], what.seed, people)
    return drawn, []


def _rows(
    what: Preparation, written: list[Entry], split: dict[str, Any], shape: Sequence[int], spacing: Sequence[float]
) -> list[dict[str, str]]:
    """Rows of metadata.csv; with registration, the volumes are written here."""
    files, copies = [[entry.file] for entry in written], what.register != "none"
    if copies:
        from .group import GroupOptions, register_group  # SimpleITK is an extra
        from .registration import Grid

        template = None if what.register == "group" else Path(what.register)
        (x, y, z), (dx, dy, dz) = shape, spacing
        files = register_group(
            [what.output / PROGRESS / entry.file for entry in written],
            [entry.person in set(split["train"]) for entry in written],
            what.output,
            Grid((x, y, z), (dx, dy, dz)),
            GroupOptions(template, what.rounds, what.smoothing, what.jittered_copies, what.num_proc, what.seed),
        )
    sessions = any(entry.scan.session for entry in written)
    rows = []
    for entry, own in zip(written, files, strict=True):
        for number, file in enumerate(own):
            row = {"file_name": file, "participant_id": entry.person, **entry.scan.columns}
            if sessions:
                row["session"] = _session_in(entry.file)
            rows.append(row | ({"jitter": str(number)} if copies else {}))
    return rows


def _session_in(file: str) -> str:
    """The session as the file's name has it, which holds no dates; "" for a person of one session."""
    return next((part[4:] for part in Path(file).name.split(".")[0].split("_") if part.startswith("ses-")), "")


def _picture(written: list[Entry], rows: list[dict[str, str]], settings: DataSettings, output: Path) -> None:
    """Montage of scans of all classes in turn."""
    by_class = defaultdict(list)
    for entry in written:
        by_class[entry.label].append(entry)
    turns = [own[i] for i in range(IN_MONTAGE) for _, own in sorted(by_class.items()) if i < len(own)][:IN_MONTAGE]
    names = (*(settings.class_names or ["scan"]), "no class")
    titles = [f"{entry.person}, {names[entry.label]}" for entry in turns]
    montage([output / entry.file for entry in turns], titles, output / MONTAGE)


def _sections(
    what: Preparation,
    written: list[Entry],
    split: dict[str, Any],
    settings: DataSettings,
    doubles: list[list[str]],
    left_out: list[LeftOut],
    notes: list[str],
) -> list[Section]:
    people = {entry.person for entry in written}
    part_of = {name: part for part in PARTS for name in split[part]}
    names = (*(settings.class_names or ["all"]), "no class")
    parts = []
    for label in sorted({entry.label for entry in written}):
        own = {entry.person for entry in written if entry.label == label}
        scans = sum(entry.label == label for entry in written)
        counts = Counter(part_of.get(person, "none") for person in own)
        parts.append([names[label], scans, len(own), *(counts[part] for part in PARTS)])
    shapes = Counter(" x ".join(map(str, entry.record["shape"])) for entry in written)
    spacings = Counter(" x ".join(f"{side:.3g}" for side in entry.record["spacing"]) for entry in written)
    stored = Counter(entry.record["stored"] for entry in written)
    boxes = np.array([entry.record["foreground"] for entry in written])
    low, high = (min(entry.record["minimum"] for entry in written), max(entry.record["maximum"] for entry in written))
    said = f"from the column {settings.label_column!r}" if settings.label_column else "none, so unconditional"
    edges = f", edges {settings.class_edges}" if settings.class_edges else ""
    frame = {
        "none": "Scans are stored as they were, in the axes nearest to RAS; training brings them onto the grid.",
        "group": "All scans are registered (affine) to the mean of the training scans and lie on the grid.",
    }.get(what.register, f"All scans are registered (affine) to {_frame(what.register)} and lie on the grid.")
    smoothed = " They are smoothed first, since the grid is coarser than they are." if settings.antialias else ""
    noted = Counter(note for entry in written for note in entry.record["notes"])
    sections = [
        Section(
            "Counts",
            [
                f"{len(written)} scans of {len(people)} people; {len(left_out)} entries were left out (below).",
                f"Channels: {', '.join(settings.channel_names or [])}. Classes {said}{edges}.",
                "The split is by person; test and validation hold as many people of every class.",
            ],
            ["class", "scans", "people", *(f"people in {part}" for part in PARTS)],
            parts,
        ),
        Section(
            "Grid",
            [
                f"{frame}{smoothed}",
                f"Foreground: {_range(boxes[:, 0])} x {_range(boxes[:, 1])} x {_range(boxes[:, 2])} mm. Intensities "
                f"reach from {low:g} to {high:g}; in training, {settings.intensity}.",
            ],
        ),
        Section("Shapes", (), ["voxels", "scans"], shapes.most_common(10)),
        Section("Voxel sizes", (), ["mm", "scans"], spacings.most_common(10)),
        Section("Axes as they were stored", (), ["axes", "scans"], stored.most_common()),
    ]
    if notes or noted:
        sections.append(Section("Notes", [*notes, *(f"{note} ({count} scans)" for note, count in noted.most_common())]))
    if doubles:
        sections.append(
            Section(
                "The same scan twice",
                ["These pairs are one scan. People who share a scan count as one in the split."],
                ["first", "second", "detail correlation"],
                doubles,
            )
        )
    sections.append(_left_out_section(left_out))
    return sections


def _left_out_section(left_out: Sequence[LeftOut], first: Sequence[str] = ()) -> Section:
    """Reasons with their counts, below the sentences ``first``, and all that was left out."""
    reasons = Counter(entry.reason for entry in left_out)
    sentences = [f"{count} x {reason}" for reason, count in reasons.most_common(10)] or ["Nothing."]
    return Section("Left out", [*first, *sentences], ["what", "why"], [list(entry) for entry in left_out])


def _range(values: np.ndarray) -> str:
    low, high = round(float(values.min())), round(float(values.max()))
    return f"{low}" if low == high else f"{low} to {high}"
