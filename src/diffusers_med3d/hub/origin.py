"""Where a model came from: the folder or repository it was loaded from, its public name, its licence."""

import json
import os
from pathlib import Path

from diffusers.configuration_utils import ConfigMixin
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .resolve import CHECKPOINTS, bundled_names

BUNDLED_LICENSE = "cc-by-sa-3.0"
"""Licence of all bundled checkpoints, which were trained on IXI."""


def loaded_from(part: ConfigMixin) -> str:
    """What ``from_pretrained`` was called with: a folder or a Hub id; empty for a model that was made in Python."""
    return str(part.config.get("_name_or_path") or "")


def source_folder(part: ConfigMixin) -> Path | None:
    """Local folder that a pipeline or model was loaded from, or None."""
    source = loaded_from(part)
    return Path(source) if source and os.path.isdir(source) else None


def without_local_path(source: str) -> str:
    """Hub ids as they are, of a local folder the last part alone: what a config that others read may say."""
    is_local = source.count("/") > 1 or os.path.isabs(source) or os.path.isdir(source)
    return Path(source).name if is_local else source


def forget_local_path(part: ConfigMixin) -> None:
    """Cut the folder a component was loaded from down to its last part, before its config is written for others."""
    if source := loaded_from(part):
        part.register_to_config(_name_or_path=without_local_path(source))


def public_name(part: ConfigMixin) -> str:
    """What others can load ``part`` by: the bundled name or Hub id it came from, empty for a local folder."""
    source = loaded_from(part)
    if source in bundled_names() or Path(source).parent == CHECKPOINTS:
        return Path(source).name
    is_id = source.count("/") == 1 and not os.path.isabs(source) and not os.path.isdir(source)
    return source if is_id else ""


def inherited_license(*parts: object) -> str | None:
    """Licence of what the first of ``parts`` that has a known one was loaded from; None where none has.

    Args:
        parts: pipelines, models or components of a pipeline; what has no config is left out.
    """
    found = (license_of(loaded_from(part)) for part in parts if isinstance(part, ConfigMixin))
    return next((name for name in found if name is not None), None)


def license_of(source: str) -> str | None:
    """Licence of saved weights by the Hub's identifier, such as "cc-by-sa-3.0"; None where nothing says it.

    It stands in the metadata of README.md beside the weights. Without one, the model counts that these weights were
    made from, by its name in their config.

    Args:
        source: bundled name, folder (of a pipeline, a model, or a component of a pipeline) or Hub id.
    """
    if not source:
        return None
    if source in bundled_names() or CHECKPOINTS in Path(source).parents:
        return BUNDLED_LICENSE
    if not os.path.isdir(source):
        card = _hub_card(source)
        return None if card is None else _license_in(card)
    folder = Path(source)
    folders = [folder, folder.parent] if (folder.parent / "model_index.json").is_file() else [folder]
    for folder in folders:
        if (folder / "README.md").is_file() and (license := _license_in(folder / "README.md")):
            return license
        for name in ("model_index.json", "config.json"):
            if (folder / name).is_file():
                made_from = json.loads((folder / name).read_text()).get("_name_or_path") or ""
                if made_from in bundled_names() or "/" in made_from:
                    return license_of(made_from)
    return None


def _license_in(card: Path) -> str | None:
    license = ModelCard(card.read_text(), ignore_metadata_errors=True).data.get("license")
    return license if isinstance(license, str) and license != "other" else None


def _hub_card(repo_id: str) -> Path | None:
    try:
        return Path(hf_hub_download(repo_id, "README.md"))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
