"""Bundled checkpoints, model cards, and what a saved config may tell about the machine that wrote it."""

import os
from collections.abc import Iterable
from pathlib import Path

from diffusers.configuration_utils import ConfigMixin
from huggingface_hub import ModelCard, ModelCardData

CHECKPOINTS = Path(__file__).parent / "checkpoints"

NOT_FOR_CLINICAL_USE = (
    "> **Never for clinical use.** Generated volumes show no real person and scores are no diagnosis. "
    "Do not use either to diagnose, treat, or decide anything about a patient."
)


def bundled_names() -> list[str]:
    """Names of the checkpoints inside the package, sorted."""
    return sorted(folder.name for folder in CHECKPOINTS.glob("*/") if folder.is_dir())


def resolve(name_or_path: str | os.PathLike) -> str:
    """Turn a bundled name into its folder; leave local paths and Hub ids as they are.

    A bundled name is a bare name: without a slash, and not itself a local folder.

    Args:
        name_or_path: ``"brain-t1"``, a local folder, or a Hub id ``"org/name"``.

    Raises:
        ValueError: a bare name that is neither bundled nor a local folder.
    """
    name = os.fspath(name_or_path)
    if os.path.isdir(name) or "/" in name or os.sep in name:
        return name
    if name not in bundled_names():
        raise ValueError(
            f"{name!r} is no bundled checkpoint and no local folder. Bundled: {', '.join(bundled_names()) or 'none'}. "
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


def write_model_card(
    folder: str | os.PathLike,
    title: str,
    body: str,
    license: str = "apache-2.0",
    tags: Iterable[str] = (),
    datasets: Iterable[str] = (),
    base_model: str | None = None,
) -> Path:
    """Write ``folder/README.md``: the Hub's metadata block, the title, the clinical warning, then ``body``.

    Args:
        folder: where the model was saved; created if missing.
        title: first heading.
        body: Markdown: how it was made, on what, with which figures.
        license: SPDX-like Hub identifier of the weights' licence (``"cc-by-sa-3.0"`` for weights trained on IXI).
        tags: added to ``diffusers-med3d``, ``medical-imaging`` and ``3d``.
        datasets: Hub ids of the training data.
        base_model: Hub id or bundled name of what was fine-tuned.
    """
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        tags=["diffusers-med3d", "medical-imaging", "3d", *tags],
        datasets=list(datasets) or None,
        base_model=base_model,
    )
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{NOT_FOR_CLINICAL_USE}\n\n{body.strip()}\n").save(path)
    return path
