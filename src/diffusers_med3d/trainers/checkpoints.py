"""Checkpoints on disk: which are whole, which is the newest, which are kept."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.files import read_json, write_json

COMPLETE_MARKER = "complete"
"""Last file written into a checkpoint, with size and SHA-256 of all others; without it the run was killed while it
saved."""

RUN_FILE = "run.json"
"""What the run of a checkpoint began from, and the arguments that shape its result."""

_NAME = re.compile(r"checkpoint-(\d+)")


def mark_whole(folder: str | Path) -> None:
    """Write down size and SHA-256 of every file of a checkpoint, which makes it a whole one."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_MARKER)
    found = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_json(folder / COMPLETE_MARKER, found)


def damage(folder: str | Path) -> str | None:
    """Say in a few words why a checkpoint cannot be used; None for a whole one.

    Checkpoints of earlier versions, whose marker is empty, are taken for whole.
    """
    folder = Path(folder)
    marker = folder / COMPLETE_MARKER
    if not marker.is_file():
        return f"it has no file {COMPLETE_MARKER!r}: the run was killed while it saved, or it is no checkpoint"
    text = marker.read_text(errors="replace")
    if not text:
        return None
    try:
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"its file {COMPLETE_MARKER!r} cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"its file {name} is not what was saved (SHA-256)"
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>`` of a run, whole or not, the newest first; others are left alone."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest whole checkpoint in ``output_dir``, None where none was ever finished.

    Those that are passed over are named in a warning.

    Raises:
        ValueError: no whole one, and at least one that was whole once and is damaged now.
    """
    damaged = []
    for folder in checkpoints(output_dir):
        reason = damage(folder)
        if reason is None:
            return str(folder)
        warnings.warn(f"{folder} is passed over: {reason}.", stacklevel=2)
        if (folder / COMPLETE_MARKER).exists():
            damaged.append(f"{folder.name} ({reason})")
    if damaged:
        raise ValueError(
            f"{output_dir} holds no checkpoint to resume from: {', '.join(damaged)}. Delete it to start anew."
        )
    return None


def keep_newest(output_dir: str | Path, limit: int | None, best: str | None, saved: Path) -> None:
    """Delete what is left of saves that were cut off, then the oldest checkpoints beyond ``limit``.

    Args:
        output_dir: where they are.
        limit: how many stay; None for all.
        best: the best checkpoint, which stays.
        saved: the one that was just written, which stays.
    """
    if limit is None:
        return
    kept = {saved.name} | ({Path(best).name} if best else set())
    whole = _marked_whole(output_dir)
    cut_off = [folder for folder in checkpoints(output_dir) if folder not in whole]
    others = [folder for folder in whole if folder.name not in kept]
    surplus = others[max(0, limit - len(kept)) :]
    for folder in [*cut_off, *surplus]:
        (folder / COMPLETE_MARKER).unlink(missing_ok=True)  # first: half a folder must not pass for a checkpoint
        shutil.rmtree(folder, ignore_errors=True)


def tidy_after_kill(resumed: str | Path, limit: int | None, best: str | None) -> None:
    """Finish what a killed run left half done beside the checkpoint that it is resumed from.

    Files of writes that were cut off go. If it is the newest whole checkpoint, those beyond ``limit`` go too.

    Args:
        resumed: the checkpoint.
        limit: see `keep_newest`.
        best: see `keep_newest`.
    """
    resumed = Path(resumed)
    for pattern in (".*.[0-9]*.tmp", "*/.*.[0-9]*.tmp"):  # in checkpoints, figures and film too
        for path in resumed.parent.glob(pattern):
            path.unlink(missing_ok=True)
    if _marked_whole(resumed.parent)[:1] == [resumed]:
        keep_newest(resumed.parent, limit, best, resumed)


def save_run(folder: str | Path, origin: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Write into a checkpoint what `compare_with_run` compares."""
    write_json(Path(folder) / RUN_FILE, {"arguments": dict(arguments), **origin})


def compare_with_run(folder: str | Path, origin: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Compare the run that a checkpoint is of with the one that goes on from it; changed arguments are a warning.

    Args:
        folder: the checkpoint. One of an earlier version, without the file, is taken as it is.
        origin: what the run begins from, such as rewards and start weights.
        arguments: those that shape the result; what is missing has its default.

    Raises:
        ValueError: a run of another origin.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return
    then = read_json(path)
    for name, value in origin.items():
        if then.get(name) != value:
            found = f": {then.get(name)} there, {value} here" if isinstance(value, list) else ""
            raise ValueError(
                f"{folder} is of a run with other {name}{found}. Give those, or begin a run in another --output_dir."
            )
    before = then["arguments"]
    changed = [
        f"{name} ({before.get(name, 'the default')} before, now {arguments.get(name, 'the default')})"
        for name in sorted(before.keys() | arguments.keys())
        if before.get(name) != arguments.get(name)
    ]
    if changed:
        warnings.warn(
            f"{folder} was saved with other arguments: {', '.join(changed)}. The run goes on with the new ones; "
            "optimizer and learning rate schedule stay those of the checkpoint.",
            stacklevel=4,
        )


def _marked_whole(output_dir: str | Path) -> list[Path]:
    """Checkpoints that were whole when they were saved, the newest first."""
    return [folder for folder in checkpoints(output_dir) if (folder / COMPLETE_MARKER).is_file()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
