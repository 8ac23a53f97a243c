"""Bundled checkpoints by name, and which class saved a folder or repository."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..utils.files import read_json

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
REWARDS = {f"{name}RewardModel": f"{name}Reward" for name in ("Volume", "Slice", "Witness")}
"""Class of a saved reward model -> class that scores with it."""


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
        FileNotFoundError: a local path, by its form no Hub id, where nothing is.
    """
    name = os.fspath(name_or_path)
    if os.path.exists(name):
        return name
    if name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1:
        raise FileNotFoundError(f"no such folder or file: {name!r}.{did_you_mean(name)}")
    if "/" in name or os.sep in name:
        return name
    if name not in bundled_names():
        raise ValueError(
            f"{name!r} is no bundled checkpoint and no local folder or file. "
            f"Bundled: {', '.join(bundled_names()) or 'none'}. "
            "A model on the Hub has an id with a slash, such as 'org/name'."
        )
    return str(CHECKPOINTS / name)


def did_you_mean(path: str) -> str:
    """The existing folder or file that differs from ``path`` in a few letters of its last part, as a sentence that
    follows an error; empty where there is none.
    """
    parent, last = os.path.split(path.rstrip("/" + os.sep))
    siblings = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    near = get_close_matches(last, siblings, n=1)
    return f" Did you mean {os.path.join(parent, near[0])!r}?" if near else ""


def check_class(wanted: type[ConfigMixin], source: str, options: dict[str, Any]) -> None:
    """Refuse a folder or repository that another class saved: diffusers would start from random weights.

    Args:
        wanted: class whose ``from_pretrained`` was called.
        source: local folder or Hub id; what cannot be read is left to diffusers to report.
        options: what ``from_pretrained`` was called with besides: ``subfolder``, ``revision``, ``token``, ...

    Raises:
        ValueError: names the class that saved it.
    """
    for name in (wanted.config_name, "config.json", "model_index.json"):
        config = _read_json(source, name, options)
        if config is None:
            continue
        found = config.get("_class_name")
        found = found[-1] if isinstance(found, list) and found else found  # custom pipelines: [module, class]
        if not isinstance(found, str) or not found.isidentifier():
            raise ValueError(f"{source} holds no {wanted.__name__}: its {name} names no class of diffusers.")
        if name == wanted.config_name and found in {base.__name__ for base in wanted.__mro__}:
            return
        use = f"use {REWARDS.get(found, found)}.from_pretrained"
        parts = [part for part, value in config.items() if isinstance(value, list) and value[-1:] == [wanted.__name__]]
        if name == "model_index.json" and parts:
            use += f", or give subfolder={parts[0]!r} for its {wanted.__name__}"
        raise ValueError(f"{source} was saved by {found}, not by {wanted.__name__}; {use}.")


def _read_json(source: str, name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON file of a local folder or a Hub repository, None where it is not there or cannot be had."""
    subfolder = options.get("subfolder") or ""
    if os.path.exists(source):
        path = Path(source, subfolder, name)
    else:
        hub = {option: options[option] for option in _HUB_OPTIONS if option in options}
        try:
            path = Path(hf_hub_download(source, name, subfolder=subfolder or None, **hub))
        except (HfHubHTTPError, HFValidationError, OSError):
            return None
    return read_json(path) if path.is_file() else None
