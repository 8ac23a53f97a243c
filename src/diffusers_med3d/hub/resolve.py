"""Bundled checkpoints by name, and the public name of what was loaded."""

import os
from pathlib import Path

from diffusers.configuration_utils import ConfigMixin

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def bundled_names() -> list[str]:
    """Names of the checkpoints inside the package, sorted."""
    return sorted(folder.name for folder in CHECKPOINTS.glob("*/") if folder.is_dir())


def resolve(name_or_path: str | os.PathLike) -> str:
    """Turn a bundled name into its folder; leave local paths and Hub ids as they are.

    A bundled name is a bare name: without a slash, and not itself a local folder or file.

    Args:
        name_or_path: ``"brain-t1"``, a local folder or file, or a Hub id ``"org/name"``.

    Raises:
        ValueError: a bare name that is neither bundled nor a local folder or file.
    """
    name = os.fspath(name_or_path)
    if os.path.exists(name) or "/" in name or os.sep in name:
        return name
    if name not in bundled_names():
        raise ValueError(
            f"{name!r} is no bundled checkpoint and no local folder or file. "
            f"Bundled: {', '.join(bundled_names()) or 'none'}. "
            "A model on the Hub has an id with a slash, such as 'org/name'."
        )
    return str(CHECKPOINTS / name)


def forget_local_paths(*parts: object) -> None:
    """Cut the folder a component was loaded from down to its last part, before its config is written for others.

    diffusers records that folder as ``_name_or_path`` and saves it. Hub ids stay whole; parts without a config are left
    alone.
    """
    for part in parts:
        if not isinstance(part, ConfigMixin):
            continue
        source = str(part.config.get("_name_or_path") or "")
        if source.count("/") > 1 or os.path.isabs(source) or os.path.isdir(source):
            part.register_to_config(_name_or_path=Path(source).name)


def public_name(part: ConfigMixin) -> str:
    """What others can load ``part`` by: the bundled name or Hub id it came from, empty for a local folder."""
    source = str(part.config.get("_name_or_path") or "")
    if source in bundled_names() or Path(source).parent == CHECKPOINTS:
        return Path(source).name
    is_id = source.count("/") == 1 and not os.path.isabs(source) and not os.path.isdir(source)
    return source if is_id else ""
