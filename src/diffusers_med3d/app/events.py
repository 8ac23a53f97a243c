"""What the page's controls call: values of the page in, values of the page out; the work itself is in `work`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from monai.data import MetaTensor

from ..evaluation.sampling import short_names
from ..pipelines import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput
from ..pipelines.conditions import condition_names
from ..utils.wording import times
from .store import VolumeStore
from .work import (
    NO_CLASS,
    Reward,
    Settings,
    class_choices,
    compare,
    generate,
    load_pipeline,
    parse_conditions,
    prepare_scan,
    read_scan,
    sampler_choices,
    score_volume,
)

FITS = {"refuse the scan": "refuse", "shrink the scan": "shrink", "crop the scan": "crop"}
"""What becomes of anatomy that is larger than a checkpoint's grid, in words of the page."""

FROM_NOISE = "Both start from the same noise."
FROM_SCAN = "Both start from your scan, with the same noise added."


@contextmanager
def shown_in_one_sentence() -> Iterator[None]:
    """Inside, an error about what was asked for appears on the page as one line, and not as a traceback in the log."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from error


class Events:
    """The functions behind the page's controls; what they share between users is read only.

    Args:
        models: generators that can be chosen; the page shows their names without the folders that they lie in.
        rewards: what volumes are scored with.
        store: where volumes go that the browser shows.
        any_model: whether folders of this machine and Hub ids may be typed in besides.
    """

    def __init__(self, models: Sequence[str], rewards: Sequence[Reward], store: VolumeStore, any_model: bool) -> None:
        self.models = {name: model for model, name in short_names(models).items()}
        self.rewards, self.store, self.any_model = list(rewards), store, any_model

    def pipeline(self, model: str) -> MedDiffusion3DPipeline:
        """The generator of a name of the page, or of what was typed in if this page may load it."""
        if not self.any_model and model not in self.models:
            raise ValueError(f"{model!r} is none of the checkpoints of this page: {', '.join(self.models)}.")
        return load_pipeline(self.models.get(model, model or ""))

    def choose(self, model: str) -> tuple[Any, Any, Any, str]:
        """Choices of class, further conditions and sampler of a generator, and a sentence about it."""
        with shown_in_one_sentence():
            pipeline = self.pipeline(model)
        classes, samplers, conditions = class_choices(pipeline), sampler_choices(pipeline), condition_names(pipeline)
        return (
            gr.Dropdown(choices=classes, value=classes[0] if classes else None, visible=bool(classes)),
            gr.Textbox(visible=bool(conditions), info=f"A JSON object with {', '.join(conditions)}."),
            gr.Dropdown(choices=samplers, value=samplers[0]),
            about(pipeline),
        )

    def take_scan(self, path: str) -> tuple[MetaTensor | None, str, Any]:
        """An uploaded scan in memory, or None where it cannot be read; a sentence about it; and an empty upload box.

        The box is emptied because it would link to the file, which is deleted.
        """
        file = Path(path)
        try:
            scan = read_scan(_read_and_delete(file), file.name)
        except ValueError as error:
            return None, " ".join(str(error).split()), None
        sides, spacing = times(scan.shape[-3:]), times(scan.affine[:3, :3].norm(dim=0).tolist())
        sentence = f"{file.name} ({sides} voxels of {spacing} mm) is in memory for this page; its file is deleted."
        return scan, sentence, None

    def take_start(self, path: str) -> tuple[MetaTensor | None, str, Any, Any, Any]:
        """What `take_scan` returns, for the scan to start from; the controls that need one; and Compare's choice."""
        scan, sentence, empty = self.take_scan(path)
        return scan, sentence, empty, *_with_start(scan)

    def remove_start(self) -> tuple[None, str, Any, Any]:
        """No scan to start from, no sentence, and the controls of `take_start` without one."""
        return None, "", *_with_start(None)

    def generate(
        self,
        model: str,
        class_label: str | None,
        conditions: str,
        seed: float,
        steps: float,
        guidance: float,
        sampler: str,
        scan: MetaTensor | None,
        strength: float,
        fit: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio hands it over
    ) -> tuple[dict[str, Any], str]:
        """One volume: its address and scores for the viewer, and the scores as a table."""
        with shown_in_one_sentence():
            settings = _settings(class_label, conditions, seed, steps, guidance, sampler, strength)
            pipeline = self.pipeline(model)
            prepared = None if scan is None else prepare_scan(scan, pipeline, FITS[fit])
            output = generate(pipeline, settings, prepared, _to_progress_bar(progress))
        (name,) = _titles([model])
        scores = score_volume(output.volumes, self.rewards, settings)
        shown = self._shown("generate", request, output, _file_name(name, settings, prepared), name, scores)
        return shown, table({name: scores})

    def compare(
        self,
        model: str,
        other_model: str,
        class_label: str | None,
        conditions: str,
        seed: float,
        steps: float,
        guidance: float,
        sampler: str,
        scan: MetaTensor | None,
        strength: float,
        fit: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """One volume of each of two generators, from the same noise and scan, and their scores side by side."""
        with shown_in_one_sentence():
            if model == other_model:
                raise ValueError(f"both checkpoints are {model!r}; choose another one to compare it with.")
            settings = _settings(class_label, conditions, seed, steps, guidance, sampler, strength)
            pipelines = [self.pipeline(model), self.pipeline(other_model)]
            prepared = None if scan is None else [prepare_scan(scan, one, FITS[fit]) for one in pipelines]
            outputs = compare(pipelines, settings, prepared, _to_progress_bar(progress))
        names = _titles([model, other_model])
        scores = [score_volume(output.volumes, self.rewards, settings) for output in outputs]
        files = [_file_name(name, settings, prepared) for name in names]
        left, right = (
            self._shown(slot, request, output, file, name, own)
            for slot, output, file, name, own in zip(("left", "right"), outputs, files, names, scores, strict=True)
        )
        return left, right, table(dict(zip(names, scores, strict=True)))

    def score(self, model: str, scan: MetaTensor | None, fit: str, request: gr.Request) -> tuple[dict[str, Any], str]:
        """The uploaded scan on the grid of a generator, and its scores."""
        with shown_in_one_sentence():
            if scan is None:
                raise ValueError("there is no scan to score; upload one first.")
            pipeline = self.pipeline(model)
            prepared = prepare_scan(scan, pipeline, FITS[fit])
        volumes, affine = prepared.as_tensor()[None], prepared.affine.cpu().numpy()
        scores = score_volume(volumes, self.rewards)
        output = MedDiffusion3DPipelineOutput(volumes, affine, tuple(pipeline.config.spacing))
        shown = self._shown("score", request, output, "scan-prepared", "the scan, prepared", scores)
        return shown, table({"the scan": scores})

    def close(self, request: gr.Request) -> None:
        """Delete the files of a page that was closed."""
        self.store.forget(_session(request))

    def _shown(
        self,
        slot: str,
        request: gr.Request,
        output: MedDiffusion3DPipelineOutput,
        file_name: str,
        title: str,
        scores: dict[str, float | str],
    ) -> dict[str, Any]:
        url = self.store.add(_session(request), output, file_name)
        return {"slot": slot, "url": url, "file_name": url.rpartition("/")[2], "title": title, "scores": scores}


def about(pipeline: MedDiffusion3DPipeline) -> str:
    """Return a sentence on what a generator makes."""
    return f"Makes {times(pipeline.config.volume_shape)} voxels of {times(pipeline.config.spacing)} mm."


def table(columns: dict[str, dict[str, float | str]]) -> str:
    """Return scores as a Markdown table with a column for each volume; reasons for missing ones stand below it."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    lines = [f"| score | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    reasons = []
    for name in names:
        values = [scores[name] for scores in columns.values()]
        lines.append(f"| {name} | {' | '.join(f'{v:.3f}' if isinstance(v, float) else 'none' for v in values)} |")
        reasons += [f"- {name}: {value}" for value in values if isinstance(value, str)]
    return "\n".join([*lines, "", *dict.fromkeys(reasons)])


def _with_start(scan: MetaTensor | None) -> tuple[Any, Any]:
    """The controls that need a scan to start from, and Compare's choice, which says what both start from."""
    return gr.Group(visible=scan is not None), gr.Dropdown(info=FROM_NOISE if scan is None else FROM_SCAN)


def _settings(
    class_label: str | None,
    conditions: str | None,
    seed: float | None,
    steps: float,
    guidance: float,
    sampler: str,
    strength: float,
) -> Settings:
    if seed is None or int(seed) != seed:
        raise ValueError(f"the seed must be a whole number, got {seed}.")
    return Settings(class_label, parse_conditions(conditions or ""), int(seed), int(steps), guidance, sampler, strength)


def _titles(models: Sequence[str]) -> list[str]:
    """Names of generators without the folders that they lie in, with a number where two are alike."""
    names = [Path(model.strip()).name for model in models]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _file_name(name: str, settings: Settings, scan: object | None) -> str:
    label = "" if settings.class_label in (None, NO_CLASS) else f"-{settings.class_label}"
    changed = "" if scan is None else f"-strength{settings.strength:g}"
    plain = f"{name}{label}{changed}-seed{settings.seed}"
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in plain)


def _to_progress_bar(progress: gr.Progress) -> Any:
    progress(0, desc="generating")
    return lambda done, total: progress((done, total), desc="denoising", unit="steps")


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _read_and_delete(path: Path) -> bytes:
    """Content of an uploaded file, which is gone afterwards with its folder."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError("the upload is not there any more; upload the file again.") from error
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # someone else's upload of the same content is in it
            path.parent.rmdir()
