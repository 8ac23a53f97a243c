"""Results on disk that are whole or absent, so that a run that was killed goes on where it stopped."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name in the same folder (made if missing); what the block writes there is moved to ``path``.

    When the block fails, ``path`` is as it was and nothing else is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: a temporary name beside it, not made yet; ``path`` must be absent or empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # a name that diffusers takes for none of its own pipelines (docs/pitfalls.md, P2)
        written = Path(temporary) / "written"
        yield written
        os.replace(written, path)


def check_output_folder(folder: str, scans: Sequence[str | None] = ()) -> None:
    """Refuse a folder for results that cannot be one, or that lies in a folder of scans, where results pass for scans.

    Raises:
        ValueError: an empty name, a file, a folder in a file or in one of ``scans``.
    """
    if not folder.strip():
        raise ValueError(f"output_dir must name a folder, got {folder!r}.")
    path = Path(folder).resolve()
    for one in (path, *path.parents):
        if one.exists() and not one.is_dir():
            raise ValueError(f"output_dir must name a folder, got {folder!r}, but {one} is a file.")
    for own in scans:
        if own is not None and path.is_relative_to(Path(own).resolve()):
            raise ValueError(f"output_dir must lie outside the folder of scans {own}, got {folder}.")


def write_whole(path: str | Path, text: str) -> None:
    """Write text with ``whole_file``."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any) -> None:
    """`write_whole` of a JSON document; NaN and infinity are refused, because other readers choke on them."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: anything else, with the path and what is there.
        OSError: no such file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too; thousands of open brackets
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {found!r:.60}.")
    return found


def once(path: str | Path, make: Callable[[], Any]) -> Any:
    """The JSON document at `path`; made by `make()` and written, as the last thing, where there is none yet."""
    path = Path(path)
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())
