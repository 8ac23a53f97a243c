"""Model cards: one template, filled from a saved folder, by a trainer, or from a source file and its report."""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.files import write_whole
from .resolve import REWARDS

TEMPLATE = Path(__file__).parent / "card_template.md"

NOT_FOR_CLINICAL_USE = (
    "> **Never for clinical use.** Generated volumes show no real person and scores are no diagnosis. "
    "Do not use either to diagnose, treat, or decide anything about a patient."
)

SECTIONS = (
    "Not for clinical use",
    "What it is",
    "Use",
    "Data and licence",
    "Training command",
    "Evaluation",
    "Bias and limits",
    "Memorisation audit",
    "Citation",
)
"""Second-level headings of every card, in this order."""

METADATA = ("license", "library_name", "pipeline_tag", "tags")
"""What the metadata block of every card has."""

GENERATION = "unconditional-image-generation"
"""The Hub's nearest task for a generator of volumes."""

CITATION = """```bibtex
@misc{diffusers_med3d,
  title = {diffusers-med3d: 3D generators of medical volumes, fine-tuned by reinforcement learning},
  year = {2026},
  note = {Python package diffusers-med3d}
}
@misc{multiscale_reward_2026,
  title = {Optimizing 3D Diffusion Models for Medical Imaging via Multi-Scale Reward Learning},
  year = {2026},
  eprint = {2603.06173},
  archivePrefix = {arXiv}
}
```"""

NO_AUDIT = "Not done: nobody has compared samples with the training scans."
"""What a card says where no copies were looked for."""

_UNKNOWN = "Not stated by whoever published these weights."


@dataclass(frozen=True)
class Figure:
    """One measured figure of a report.

    Args:
        metric: identifier for the metadata, such as "kid".
        name: what was measured, in words, with its extractor.
        value: the figure.
        floor: the same figure for real scans against real scans, or in words why there is none.
        error: standard error or half the interval, None where it was not measured.
        dataset: name of the data.
        split: "validation" or "test".
        note: how many samples, anything else that is needed to read the figure.
    """

    metric: str
    name: str
    value: float
    floor: float | str
    error: float | None = None
    dataset: str = "scans of subjects that nothing was trained on"
    split: str = "validation"
    note: str = ""


@dataclass
class Card:
    """What a card says: metadata, and Markdown for each section of ``SECTIONS``.

    Args:
        name: of the checkpoint; first heading.
        what, use, data, training, evaluation, limits, memorisation, citation: Markdown.
        license: the Hub's identifier of the weights' licence.
        pipeline_tag: the Hub's task.
        base_model: bundled name or Hub id of what was fine-tuned; empty for weights trained from scratch.
        datasets: names of the training data, Hub ids where there are any.
        tags: added to ``diffusers-med3d``, ``medical-imaging`` and ``3d``.
        figures: go into the metadata as model-index, and as a table to the head of the evaluation.
    """

    name: str
    what: str
    use: str
    data: str = _UNKNOWN
    training: str = _UNKNOWN
    evaluation: str = ""
    limits: str = _UNKNOWN
    memorisation: str = NO_AUDIT
    citation: str = CITATION
    license: str = "other"
    pipeline_tag: str = GENERATION
    base_model: str = ""
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    figures: Sequence[Figure] = field(default_factory=list)

    def render(self) -> ModelCard:
        """The card as huggingface_hub's `ModelCard`."""
        data = ModelCardData(
            license=self.license,
            library_name="diffusers",
            pipeline_tag=self.pipeline_tag,
            tags=list(dict.fromkeys(["diffusers-med3d", "medical-imaging", "3d", *self.tags])),
            datasets=list(self.datasets) or None,
            base_model=self.base_model or None,
            model_name=self.name if self.figures else None,
            eval_results=[_result(figure, self.pipeline_tag) for figure in self.figures] or None,
        )
        table = [figure_table(self.figures)] if self.figures else []
        evaluation = "\n\n".join([*table, self.evaluation]).strip() or "Not done."
        texts = {
            name: getattr(self, name).strip()
            for name in ("name", "what", "use", "data", "training", "limits", "memorisation", "citation")
        }
        return ModelCard.from_template(
            data, str(TEMPLATE), warning=NOT_FOR_CLINICAL_USE, evaluation=evaluation, **texts
        )

    def write(self, folder: str | os.PathLike) -> Path:
        """Write ``folder/README.md``; the folder is made if missing."""
        path = Path(folder) / "README.md"
        write_whole(path, str(self.render()) + "\n")
        return path


def _result(figure: Figure, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type="medical-volumes",
        dataset_name=figure.dataset,
        dataset_split=figure.split,
        metric_type=figure.metric,
        metric_name=figure.name,
        metric_value=figure.value,
    )


def figure_table(figures: Sequence[Figure]) -> str:
    """Figures as a Markdown table, each beside its floor."""
    lines = ["| figure | value | floor (real against real) | data | note |", "|---|---|---|---|---|"]
    for figure in figures:
        error = "" if figure.error is None else f" ± {figure.error:.3g}"
        floor = figure.floor if isinstance(figure.floor, str) else f"{figure.floor:.4g}"
        data = f"{figure.dataset}, {figure.split}"
        lines.append(f"| {figure.name} | {figure.value:.4g}{error} | {floor} | {data} | {figure.note} |")
    return "\n".join(lines)


def of_folder(folder: str | os.PathLike, name: str, volume_shape: Sequence[int] | None = None) -> Card:
    """A card with what a saved folder says: what it is, how it is used, its geometry and classes.

    Args:
        folder: what ``save_pretrained`` of a pipeline or of a model wrote.
        name: Hub id or name that the snippet loads.
        volume_shape: size (X, Y, Z) in voxels that a model was trained on, where its config does not say it.

    Raises:
        FileNotFoundError: neither model_index.json nor config.json is there.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return _of_pipeline(json.loads((folder / "model_index.json").read_text()), name)
    if (folder / "config.json").is_file():
        return _of_model(json.loads((folder / "config.json").read_text()), name, volume_shape)
    raise FileNotFoundError(f"{folder} has neither model_index.json nor config.json: no saved pipeline or model.")


def _of_pipeline(index: Mapping[str, Any], name: str) -> Card:
    parts = {key: value[1] for key, value in index.items() if _is_component(value)}
    classes, channels = index.get("class_names"), index.get("channel_names")
    networks = ", ".join(f"`{key}` {value}" for key, value in parts.items())
    what = [f"3D latent diffusion of medical volumes: {networks}.", _grid(index), f"Intensity: {index['intensity']}."]
    if channels:
        what.append("Channels: " + ", ".join(sorted(channels, key=channels.__getitem__)) + ".")
    if classes:
        what.append("Classes: " + ", ".join(sorted(classes, key=classes.__getitem__)) + ", and a null class.")
    return Card(
        name=name.split("/")[-1],
        what="\n".join(what),
        use=_use(
            f"""import torch
from diffusers_med3d import MedDiffusion3DPipeline

pipe = MedDiffusion3DPipeline.from_pretrained("{name}")
out = pipe(num_samples=2, num_inference_steps=30, generator=torch.Generator().manual_seed(0))
out.volumes  # float32 (2, {len(channels) if channels else "C"}, {", ".join(map(str, index["volume_shape"]))}) in [0, 1]
out.save_nifti("samples")""",
            "model_index.json",
        ),
    )


def _of_model(config: Mapping[str, Any], name: str, volume_shape: Sequence[int] | None) -> Card:
    kind = config["_class_name"]
    channels = config.get("in_channels", 1)
    known = {"volume_shape": volume_shape, **(config.get("data_settings") or {})}
    shape = known["volume_shape"] or _fitting_shape(config)
    size = ", ".join(map(str, shape))
    what, grid = f"`{kind}`, a network of diffusers-med3d.", _grid(known)
    snippet = f"""from diffusers_med3d import {kind}

model = {kind}.from_pretrained("{name}")"""
    if kind in REWARDS:
        reward = REWARDS[kind]
        what = f"`{kind}`: scores volumes by realism, about 1 for a real scan, lower the less real."
        if kind == "WitnessRewardModel":
            what = f"`{kind}`: scores volumes by whether they lie where scans are common and samples are rare."
        snippet = f"""import torch
from diffusers_med3d import {reward}

reward = {reward}.from_pretrained("{name}")
volumes = torch.rand(1, {channels}, {size})  # yours: (B, {channels}, X, Y, Z) in [0, 1], RAS axes
scores = reward(volumes)  # (B,)"""
    elif "latents_mean" in config:
        what = f"`{kind}`: compresses volumes to latents and back; the statistics of the latents are in its config."
        snippet = f"""import torch
from diffusers_med3d import {kind}

vae = {kind}.from_pretrained("{name}")
volumes = torch.rand(1, {channels}, {size})  # yours: (B, {channels}, X, Y, Z) in [0, 1], RAS axes
with torch.no_grad():
    latents = vae.encode_latents(volumes)
    again = vae.decode_latents(latents)"""
    tag = "other" if kind in REWARDS else GENERATION
    return Card(
        name=name.split("/")[-1],
        what="\n".join(filter(None, (what, grid))),
        use=_use(snippet, "config.json"),
        pipeline_tag=tag,
    )


def _fitting_shape(config: Mapping[str, Any]) -> list[int]:
    """A size (X, Y, Z) that the network of this config takes: that of its latents' atlas, or eight latent voxels."""
    levels = len(config.get("channels", ()))
    if config["_class_name"] in REWARDS:
        return [2 ** (levels + 2) if levels else 32] * 3
    factor = 2 ** (levels if config["_class_name"] == "VQModel3D" else levels - 1)
    return [factor * side for side in config.get("atlas_shape") or (8, 8, 8)]


def _grid(settings: Mapping[str, Any]) -> str:
    """Size, spacing and axes in a sentence, as far as they are known."""
    parts = []
    if settings.get("volume_shape"):
        parts.append(f"{_sides(settings['volume_shape'])} voxels")
    if settings.get("spacing"):
        parts.append(f"of {_sides(settings['spacing'])} mm")
    if not parts:
        return ""
    return f"Volumes: {' '.join(parts)}, {settings.get('orientation') or 'RAS'} axes."


def _use(code: str, config_file: str) -> str:
    return (
        f"`pip install diffusers-med3d` first: `{config_file}` names classes of this package.\n\n```python\n{code}\n```"
    )


def _is_component(value: Any) -> bool:
    """Whether an entry of model_index.json is ``[library, class]``."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _sides(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def from_source(path: str | os.PathLike) -> Card:
    """The card that ``<name>.toml`` and the figures in ``<name>.report.json`` beside it describe.

    The TOML file has one key per argument of `Card`, but ``name`` and ``figures``; the report is
    ``{"figures": [{...}, ...]}`` with the arguments of `Figure`.

    Raises:
        ValueError: a key that no card has, or one of the sections missing; a report without figures.
    """
    path = Path(path)
    source = tomllib.loads(path.read_text())
    known = set(Card.__dataclass_fields__) - {"name", "figures"}
    wanted = known - {"citation"}
    if set(source) - known or wanted - set(source):
        raise ValueError(
            f"{path.name}: unknown keys {sorted(set(source) - known)}, missing keys {sorted(wanted - set(source))}."
        )
    report = json.loads(path.with_name(f"{path.stem}.report.json").read_text())
    figures = [Figure(**figure) for figure in report["figures"]]
    if not figures:
        raise ValueError(f"{path.stem}.report.json holds no figures; a card needs at least one.")
    return Card(name=path.stem, figures=figures, **source)


def sections(text: str) -> dict[str, str]:
    """Second-level sections of a card: heading -> Markdown; headings inside code blocks do not count."""
    found: dict[str, list[str]] = {}
    heading, in_code = None, False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            heading = line[3:].strip()
            found[heading] = []
        elif heading is not None:
            found[heading].append(line)
    return {name: "\n".join(lines).strip() for name, lines in found.items()}


def has_audit(text: str) -> bool:
    """Return whether a card says what a search for copies of training scans found."""
    found = sections(text).get("Memorisation audit", "")
    return bool(found) and not found.startswith("Not done")


def missing(text: str) -> list[str]:
    """What a card lacks: metadata keys, sections, the warning, a code block that shows how it is used."""
    data = ModelCard(text).data.to_dict()
    lacks = [f"metadata {key}" for key in METADATA if not data.get(key)]
    found = sections(text)
    lacks += [f"section {name!r}" for name in SECTIONS if not found.get(name)]
    if [name for name in found if name in SECTIONS] != [name for name in SECTIONS if name in found]:
        lacks.append(f"order of sections {SECTIONS}")
    if NOT_FOR_CLINICAL_USE not in text:
        lacks.append("the clinical warning")
    if "```python" not in found.get("Use", ""):
        lacks.append("a snippet in section 'Use'")
    return lacks


def for_hub(text: str, namespace: str, names: Sequence[str]) -> str:
    """The card of a bundled checkpoint as it stands on the Hub under ``namespace``.

    Bundled names in ``from_pretrained("...")`` and in ``base_model``, and links to the cards of others, become Hub ids.

    Args:
        text: the card.
        namespace: user or organisation.
        names: all bundled names.
    """
    card = ModelCard(text)
    data = card.data
    if data.get("base_model") in names:
        data["base_model"] = f"{namespace}/{data['base_model']}"
    text = str(card)
    for name in names:
        text = text.replace(f'from_pretrained("{name}")', f'from_pretrained("{namespace}/{name}")')
        text = text.replace(f"]({name}.md)", f"](https://huggingface.co/{namespace}/{name})")
    return text


def for_repository(text: str, repo_id: str) -> str:
    """The card from beside a saved folder as it stands on the Hub: its snippet loads ``repo_id``, and the clinical
    warning is there.
    """
    local = re.search(r'from_pretrained\("([^"]+)"', sections(text).get("Use", ""))
    if local:
        text = text.replace(f'from_pretrained("{local[1]}"', f'from_pretrained("{repo_id}"')
    if NOT_FOR_CLINICAL_USE not in text:
        card = ModelCard(text, ignore_metadata_errors=True)
        card.text = f"\n{NOT_FOR_CLINICAL_USE}\n{card.text}"
        text = str(card)
    return text


def pictures(text: str) -> list[str]:
    """Paths of the pictures that a card shows, below its folder; others and addresses on the web are left out."""
    found = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    return [path for path in found if "://" not in path and not path.startswith("/") and ".." not in path.split("/")]
